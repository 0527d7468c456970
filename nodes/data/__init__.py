"""Training data: reads clips and photos and encodes them as rows."""
