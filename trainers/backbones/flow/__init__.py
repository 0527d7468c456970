"""Video models that are trained with flow matching."""
