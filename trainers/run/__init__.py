"""The life of a run: its thread, its folder, its events and its files."""
