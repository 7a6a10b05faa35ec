"""Attentions built from options of a stage and of a model, by name."""

import dataclasses

import torch

from vil.attention import ATTENTIONS
from vil.config import ModelConfig, StageConfig

STAGE_OPTIONS = {field.name for field in dataclasses.fields(StageConfig)}


def build_attention(name, size, seed=0, **options):
    """Seed the generator and build an attention; keywords are options of `StageConfig` or `ModelConfig`."""
    stage = {key: value for key, value in options.items() if key in STAGE_OPTIONS}
    model = {key: value for key, value in options.items() if key not in STAGE_OPTIONS}
    torch.manual_seed(seed)
    return ATTENTIONS[name](StageConfig(attention=name, **stage), ModelConfig(**model), size)


def build_small_attention(name, size=(6, 5), **options):
    """Return an attention with 3 heads of width 8, for maps of `size`."""
    defaults = {"dim": 24, "heads": 3, "global_tokens": 2, "window": 2}
    defaults |= {"projected_tokens": 8, "random_features": 16, "reduction": 2}
    return build_attention(name, size, **{**defaults, **options})


def random_tokens(attention, size=(6, 5), batch=2):
    """Return random tokens (B, G+N, C) for an attention."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, attention.global_tokens + size[0] * size[1], attention.dim, generator=generator)
