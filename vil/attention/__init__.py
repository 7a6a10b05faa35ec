"""The attentions: x (B, G+N, C) → the same shape. A new one also needs its name in `vil/config.py`."""

from vil.attention.base import Attention
from vil.attention.full import FullAttention
from vil.attention.global_only import GlobalOnlyAttention
from vil.attention.linformer import LinformerAttention
from vil.attention.performer import PerformerAttention
from vil.attention.spatial_reduction import SpatialReductionAttention
from vil.attention.vision_longformer import VisionLongformerAttention

ATTENTIONS: dict[str, type[Attention]] = {
    "full": FullAttention,
    "vision_longformer": VisionLongformerAttention,
    "linformer": LinformerAttention,
    "performer": PerformerAttention,
    "spatial_reduction": SpatialReductionAttention,
    "global_only": GlobalOnlyAttention,
}

__all__ = ["ATTENTIONS", "Attention"]
