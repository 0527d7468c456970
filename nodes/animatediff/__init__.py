"""Motion modules and motion LoRAs on a MODEL."""
