"""Training: a recipe in, a trained network out."""
