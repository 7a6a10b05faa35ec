"""Multi-scale Vision Longformer (Zhang et al., ICCV 2021): models, training and evaluation.

Importing this package registers its models with timm.
"""

from vil.models import MultiScaleViT, create_model, list_models, load_released

__all__ = ["MultiScaleViT", "create_model", "list_models", "load_released"]
__version__ = "0.1.1"
