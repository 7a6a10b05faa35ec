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
