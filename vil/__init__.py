"""Multi-scale Vision Longformer: models, training and evaluation."""
