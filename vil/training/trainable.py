"""Train a part of a model: freeze the other parameters, and keep what is frozen in evaluation mode."""

from __future__ import annotations

from typing import Literal

from torch import nn

from vil.errors import UserError

Trainable = Literal["all", "head", "attention"]


def classifiers(model: nn.Module) -> list[nn.Module]:
    """Return the classifier of a model (timm's `get_classifier`), two for distilled ones, or none."""
    get_classifier = getattr(model, "get_classifier", None)
    found = get_classifier() if get_classifier else None
    heads = found if isinstance(found, tuple | list) else (found,)
    return [head for head in heads if isinstance(head, nn.Module)]


class PartialTraining:
    """Freeze the parameters of `model` that `trainable` does not select.

    `head` selects the classifier, `attention` the modules named `attn` and the classifier (Touvron et al.,
    Three things everyone should know about Vision Transformers, 2022, section 4). Frozen parameters require
    no gradient until `restore` is called.

    Args:
        model: a model of this project or of timm.
        trainable: the part to train.

    Raises:
        UserError: the model has no such part.
    """

    def __init__(self, model: nn.Module, trainable: Trainable) -> None:
        self._model = model
        self._frozen_parameters: list[nn.Parameter] = []
        self._frozen_modules: list[nn.Module] = []
        if trainable == "all":
            return
        heads = classifiers(model)
        head_parameters = _parameters(heads)
        selected = set(head_parameters)
        if trainable == "attention":
            attention = [m for name, m in model.named_modules() if name.rpartition(".")[2] == "attn"]
            selected |= _parameters(attention)
        if selected == head_parameters and (trainable == "attention" or not selected):
            part = "attention modules (named attn)" if trainable == "attention" else "classifier"
            raise UserError("schedule.trainable", f"{trainable}: {type(model).__name__} has no {part}")
        self._frozen_parameters = [p for p in model.parameters() if p.requires_grad and p not in selected]
        for parameter in self._frozen_parameters:
            parameter.requires_grad_(False)
        head_prefixes = _head_prefixes(model, heads)
        for name, module in model.named_modules():
            parameters = list(module.parameters())
            if parameters:
                is_frozen = selected.isdisjoint(parameters)
            else:
                in_head = name.startswith(head_prefixes)
                is_frozen = any(True for _ in module.buffers()) or (trainable == "head" and not in_head)
            if is_frozen:
                self._frozen_modules += module.modules()

    def set_training_mode(self) -> None:
        """Set train mode, but evaluation mode for frozen modules: dropout, drop path, batch norm."""
        self._model.train()
        for module in self._frozen_modules:
            module.training = False

    def restore(self) -> None:
        """Let frozen parameters require gradients again."""
        for parameter in self._frozen_parameters:
            parameter.requires_grad_(True)
        self._frozen_parameters, self._frozen_modules = [], []


def _parameters(modules: list[nn.Module]) -> set[nn.Parameter]:
    return {parameter for module in modules for parameter in module.parameters()}


def _head_prefixes(model: nn.Module, heads: list[nn.Module]) -> tuple[str, ...]:
    """Return the prefixes of the names of a classifier's dropout: `head_drop`, or that of its container."""
    names = [name for name, module in model.named_modules() if any(module is head for head in heads)]
    containers = {name.rpartition(".")[0] for name in names} - {""}
    return ("head", *(f"{container}." for container in containers))
