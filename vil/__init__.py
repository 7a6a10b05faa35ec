"""Multi-scale Vision Longformer (Zhang et al., ICCV 2021): models, training and evaluation.

Importing this package imports neither PyTorch nor timm: the public names below are imported when they are
first used. The models are registered with timm as soon as both packages have been imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from vil.checkpoints.loading import create_model, load, load_released
    from vil.models import MultiScaleViT, list_models

__version__ = "0.2.0"
__all__ = ["MultiScaleViT", "create_model", "list_models", "load", "load_released"]

_MODULES = {
    "MultiScaleViT": "vil.models",
    "list_models": "vil.models",
    "create_model": "vil.checkpoints.loading",
    "load": "vil.checkpoints.loading",
    "load_released": "vil.checkpoints.loading",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_MODULES]


class _RegisterWithTimm:
    """Import `vil.models`, which registers the models with timm, right after timm itself is imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "timm":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _load_checkpoints_in_timm()
            if "vil.models" not in sys.modules:  # else it is being imported: it is what imports timm
                importlib.import_module("vil.models")

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _load_checkpoints_in_timm() -> None:
    """Have `checkpoint_path` of `timm.create_model` read runs and every format, for models of this project.

    timm passes the path to its own `load_checkpoint` alone, which reads neither folders nor the moving
    average of a run, and does not fit weights to the names of features_only.
    """
    factory: Any = importlib.import_module("timm.models._factory")
    load_checkpoint = factory.load_checkpoint

    def load(model: nn.Module, checkpoint_path: str | Path, *args: Any, **options: Any) -> Any:
        from vil.models import MultiScaleViT

        if args or options or not isinstance(getattr(model, "model", model), MultiScaleViT):
            return load_checkpoint(model, checkpoint_path, *args, **options)
        from vil.checkpoints.loading import load_into_timm_model

        return load_into_timm_model(model, checkpoint_path)

    factory.load_checkpoint = load


if "timm" in sys.modules:
    _load_checkpoints_in_timm()
    importlib.import_module("vil.models")
else:
    sys.meta_path.insert(0, _RegisterWithTimm())
