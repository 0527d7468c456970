"""Frozen models that recipes train on, one file each."""
