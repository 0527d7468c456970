"""Files as frames, masks and captions, and how they are cut."""
