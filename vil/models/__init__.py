"""The multi-scale vision transformer, its zoo, and its attention maps."""

from vil.models.multiscale_vit import MultiScaleViT
from vil.models.zoo import create_model, list_models, model_from_config

__all__ = ["MultiScaleViT", "create_model", "list_models", "model_from_config"]
