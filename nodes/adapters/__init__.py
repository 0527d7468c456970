"""Nodes that load and apply adapters for image-to-video, start a video from a picture, and match its frames to it."""
