"""Encodings on disk: each made once, named by the hash of all that went into it."""
