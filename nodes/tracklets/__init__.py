"""Nodes that draw, load and apply tracklets: boxes that objects follow."""
