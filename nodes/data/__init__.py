"""Training data: from clips and photos to encoded rows."""
