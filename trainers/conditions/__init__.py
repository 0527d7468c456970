"""Conditions of a model other than text and images."""
