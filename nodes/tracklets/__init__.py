"""Boxes that objects follow: drawing, loading and applying them."""
