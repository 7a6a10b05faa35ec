"""The multi-scale vision transformer, its zoo and its published checkpoints."""

from vil.models.multiscale_vit import MultiScaleViT
from vil.models.released import load_released
from vil.models.zoo import create_model, list_models, model_from_config

__all__ = ["MultiScaleViT", "create_model", "list_models", "load_released", "model_from_config"]
