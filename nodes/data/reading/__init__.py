"""Reads video and image files as frames, masks and captions, and cuts them into training clips."""
