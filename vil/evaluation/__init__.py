"""Evaluation of any `nn.Module` that maps images (B, C, H, W) to logits (B, classes)."""
