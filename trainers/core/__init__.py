"""Shared training machinery: knows no method and no model."""
