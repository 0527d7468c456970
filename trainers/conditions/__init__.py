"""What rides on a model or a row beside text and pictures."""
