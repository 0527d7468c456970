"""Encodes clips, captions and masks into a cache on disk; each file is named by the hash of its inputs."""
