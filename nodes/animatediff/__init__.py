"""Nodes that apply motion modules and motion LoRAs to a MODEL."""
