"""Weights of a model as `open_weights` returns them, and loading them into a model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from vil.checkpoints.adaptation import (
    HEADS,
    adapt_head,
    adapt_input_channels,
    as_list,
    filter_by_timm,
    find_mismatches,
    layer_names,
    load_state_dict,
    translate_by_timm,
)
from vil.checkpoints.training_state import WeightsKind
from vil.config import TRANSFORM_OPTIONS, EvalConfig, ModelConfig, Size, format_size
from vil.errors import UserError, error_reason, errors_in_file, errors_in_option
from vil.models.limits import ModelTooLargeError, check_model_size
from vil.models.multiscale_vit import MultiScaleViT
from vil.models.state_dict import translate_state_dict
from vil.models.timm_models import pretrained_classes
from vil.models.zoo import model_from_config
from vil.runtime.class_names import find_rows, imagenet_classes
from vil.runtime.run_files import CHECKPOINTS, SPLIT
from vil.validation import STORED, check_plain, validate, without_start_options

NO_MODEL = "does not describe its model; add the configuration published with it, or name the model"
"""Reason why a file cannot be used if `Weights.model` is None and a model is needed."""

MAX_GROWTH, MAX_EXTRA_BYTES = 4, 256_000_000
"""Factor and bytes by which the model that a file describes may exceed the weights in the file."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weights:
    """Weights and everything that their file holds about them.

    Attributes:
        path: the file, for errors; `open_weights` sets it.
        format: `run` for a checkpoint of train.py; `safetensors`; `published` for one of the paper's, whose
            configuration is a separate file; `foreign` for one of another program.
        kind: weights as the optimizer left them (`raw`), or their moving average (`ema`).
        state_dict: names → tensors on the CPU, named as in the file.
        model: the model of the weights; None if the file does not describe it.
        data: stored options of the data of a run, without the transform's; not validated.
        transform: stored options of the evaluation transform, of `TRANSFORM_OPTIONS`; not validated.
        class_names: names of the classes in the order of the head's rows; None if unknown.
    """

    path: str
    format: Literal["run", "safetensors", "published", "foreign"]
    kind: WeightsKind
    state_dict: Mapping[str, Tensor]
    model: ModelConfig | None = None
    data: Mapping[str, object] = field(default_factory=dict)
    transform: Mapping[str, object] = field(default_factory=dict)
    class_names: tuple[str, ...] | None = None

    @classmethod
    def from_stored(
        cls,
        format: Literal["run", "safetensors"],
        kind: WeightsKind,
        state_dict: Mapping[str, Tensor],
        model: object,
        data: object,
        class_names: object,
    ) -> Weights:
        """Return weights with the plain values that their file stores about them; None is unknown.

        Raises UserError or TypeError for invalid values.
        """
        if class_names is not None and not (
            isinstance(class_names, list | tuple) and all(isinstance(name, str) for name in class_names)
        ):
            raise TypeError("class_names is not a list of strings")
        if data is not None and not isinstance(data, Mapping):
            raise TypeError("data is not a mapping")
        options = dict(data or {})
        transform = {key: options.pop(key) for key in TRANSFORM_OPTIONS if key in options}
        with errors_in_option(""):
            config = None if model is None else stored_model_config(model)
        names = tuple(class_names or ()) or None
        return cls("", format, kind, state_dict, config, options, transform, names)

    def data_with_split(self) -> dict[str, object]:
        """Return `data`; of a run that held out images for validation, with the list of these images.

        The list holds also if images were added to the data set since.
        """
        data, checkpoints = dict(self.data), Path(self.path).absolute().parent
        split = checkpoints.parent / SPLIT
        has_held_out = data.get("val_fraction") is not None or data.get("val_list") is not None
        if has_held_out and checkpoints.name == CHECKPOINTS and split.is_file():
            data |= {"val_fraction": None, "val_list": str(split)}
        return data

    def require_model(self, option: str = "") -> ModelConfig:
        """Return the model of the weights, or raise UserError with the option that can describe it."""
        if self.model is None:
            raise UserError(self.path, f"{NO_MODEL}: {option}" if option else NO_MODEL)
        return self.model

    def build_model(self, image_size: int | Size | None = None, num_classes: int | None = None) -> nn.Module:
        """Return the model of these weights, also of another size, with the weights loaded, in eval mode.

        Raises:
            UserError: the file does not describe its model, or the weights do not fit the model.
        """
        config = self.require_model()
        if image_size is not None:
            config = replace(config, image_size=image_size)
        if num_classes is not None:
            config = replace(config, num_classes=num_classes)
        model = self.empty_model(config)
        self.load_into(model, config.size)
        self.describe(model, config.size, config.in_chans)
        return model.eval()

    def describe(self, model: nn.Module, image_size: Size, in_chans: int) -> None:
        """Set `pretrained_cfg` of a model with these weights, which timm's `resolve_model_data_config` reads.

        It holds the size of the images, the evaluation transform and the names of the classes. Without a
        stored transform, that of the model's name is kept.

        Args:
            model: the model, with the weights loaded.
            image_size: (height, width) of the images in pixels.
            in_chans: channels of the images; mean and standard deviation of one channel are averages.

        Raises:
            UserError: an invalid transform.
        """
        cfg: dict[str, object] = {**getattr(model, "pretrained_cfg", {})}
        for key in ("test_input_size", "test_crop_pct", "license", "tag"):  # of other weights
            cfg.pop(key, None)
        if self.transform:
            with errors_in_option(self.path):
                data = validate(EvalConfig, {"data": dict(self.transform)}).data
            cfg |= {key: getattr(data, key) for key in TRANSFORM_OPTIONS}
        for key in ("mean", "std"):
            values: Any = cfg.get(key)
            if in_chans == 1 and values:
                cfg[key] = (sum(values) / len(values),)
        num_classes = int(getattr(model, "num_classes", 0) or 0)
        names = None if self.class_names is None else tuple(name_rows(self.class_names, num_classes))
        cfg |= {"input_size": (in_chans, *image_size), "num_classes": num_classes, "label_names": names}
        model.pretrained_cfg = model.default_cfg = cfg  # type: ignore[assignment]

    def empty_model(self, config: ModelConfig, num_classes: int | None = None) -> nn.Module:
        """Return a model for these weights, with random weights, not much larger than the file.

        Args:
            config: the model.
            num_classes: number of classes if neither `config` nor the head of the weights has one.

        Raises:
            UserError: options that do not go together, or a model that is much larger than the weights.
        """
        num_classes = self.head_rows(config.name) or num_classes
        with self._size_limit() as max_bytes:
            return model_from_config(config, num_classes, max_bytes)

    def load_into(self, model: nn.Module, image_size: Size | None = None) -> None:
        """Load these weights into a model, strictly up to its image size, number of classes and channels.

        Embeddings and bias tables are resized bilinearly, without aligned corners (a timm model resizes its
        own); a head with more rows keeps its first ones; the first convolution is adapted to grayscale as
        in timm. Each change is logged.

        Args:
            model: the model, of any class.
            image_size: (height, width) of the images that `model` is built for, in pixels; used for timm
                models only.

        Raises:
            UserError: weights are missing, unexpected, or of another shape; the message names them.
        """
        self._load(model, self._translate(model), image_size)

    def initialize(
        self,
        model: nn.Module,
        class_names: Sequence[str],
        image_size: Size | None = None,
        new_head: bool = False,
    ) -> str:
        """Load these weights into a model that is trained on other classes, and return a line on its head.

        Rows of the head, and of each head of a distilled model, are found by the names of the classes,
        as `vil.runtime.class_names.find_rows` compares them. The other rows stay as they are in `model`.
        Everything else is `load_into`.

        Args:
            model: the model; its rows are new ones.
            class_names: classes of the data, in the order of the rows; further rows have no class.
            image_size: as in `load_into`.
            new_head: use no row of the weights.

        Raises:
            UserError: as `load_into`, up to the head.
        """
        state_dict = self._translate(model)
        names = layer_names(model, "classifier", HEADS)
        layers = [name for name in names if f"{name}.weight" in model.state_dict()]
        if not isinstance(model, MultiScaleViT) and not any(
            f"{name}.weight" in state_dict for name in layers
        ):
            state_dict = filter_by_timm(model, state_dict)
        state_dict, line = self._match_head(model, layers, state_dict, class_names, new_head)
        self._load(model, state_dict, image_size)
        return line

    def _match_head(
        self,
        model: nn.Module,
        layers: Sequence[str],
        state_dict: Mapping[str, Tensor],
        class_names: Sequence[str],
        new_head: bool,
    ) -> tuple[dict[str, Tensor], str]:
        """Return the state dict with rows by class in the head's `layers`, and the line of `initialize`."""
        expected = model.state_dict()
        head = {name: value for name, value in expected.items() if name.rpartition(".")[0] in layers}
        given = {name: value for name, value in state_dict.items() if name.rpartition(".")[0] in layers}
        result = {name: value for name, value in state_dict.items() if name not in given}
        result |= {name: value.clone() for name, value in head.items()}
        is_same_layer = given.keys() == head.keys() and all(
            value.dim() == head[name].dim() and value.shape[1:] == head[name].shape[1:]
            for name, value in given.items()
        )
        num_rows = min((len(value) for value in given.values() if value.dim()), default=0)
        new = f"head: new, {len(class_names)} classes"
        if new_head:
            return result, f"{new} (model.new_head)"
        if not num_rows:
            return result, f"{new}; the weights have no head"
        if not is_same_layer:
            return result, f"{new}; the head of the weights has other layers"
        found, reason = find_rows(class_names, self.class_names or None, num_rows)
        if not found:
            return result, f"{new}; {reason}"
        for name, value in given.items():
            result[name][list(found)] = value[list(found.values())].to(result[name])
        line = f"head: {len(found)} of {len(class_names)} classes from the weights"
        rest = len(class_names) - len(found)
        return result, f"{line}, {rest} new" if rest else line

    def _translate(self, model: nn.Module) -> dict[str, Tensor]:
        with errors_in_file(self.path):
            return translate_state_dict(model, self.state_dict)

    def _load(self, model: nn.Module, state_dict: dict[str, Tensor], image_size: Size | None) -> None:
        state_dict = adapt_head(model, state_dict)
        state_dict = adapt_input_channels(model, state_dict)
        if not isinstance(model, MultiScaleViT) and find_mismatches(model, state_dict):
            if self._load_at_stored_size(model, state_dict, image_size):
                return
            state_dict = translate_by_timm(model, state_dict)
        load_state_dict(model, state_dict, self.path)

    def _load_at_stored_size(
        self, model: nn.Module, state_dict: dict[str, Tensor], image_size: Size | None
    ) -> bool:
        """Load weights of another image size into a timm model that can resize itself, if they fit then."""
        if self.model is None or image_size is None or not hasattr(model, "set_input_size"):
            return False
        stored_size = self.model.size
        if stored_size == image_size:
            return False
        set_input_size: Any = model.set_input_size

        def resize_on_meta() -> nn.Module:
            resized = deepcopy(model).to("meta")
            resized.set_input_size(stored_size)  # type: ignore[operator]
            return resized

        try:
            with self._size_limit() as max_bytes:
                check_model_size(resize_on_meta, "image_size", max_bytes)
            set_input_size(stored_size)
        except UserError:
            raise
        except (RuntimeError, ValueError, AssertionError) as error:
            reason = f"the model cannot be built for the stored image size, {format_size(stored_size)} pixels"
            raise UserError(self.path, f"{reason}: {error_reason(error)}") from None
        fits = not find_mismatches(model, state_dict)
        if fits:
            load_state_dict(model, state_dict, self.path)
            sizes = map(format_size, (stored_size, image_size))
            _logger.info("%s: resized from %s to %s pixels by timm", type(model).__name__, *sizes)
        set_input_size(image_size)
        return fits

    @contextmanager
    def _size_limit(self) -> Iterator[int]:
        """Yield `max_bytes` for building the model that the file describes; name the file if it needs more.

        A file of a kilobyte may describe a model of gigabytes. Half-precision weights, tables resized for
        other images and another head leave room up to `MAX_GROWTH` × the size of the weights +
        `MAX_EXTRA_BYTES`.
        """
        storages = [weight.untyped_storage() for weight in self.state_dict.values()]
        size = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
        max_bytes = MAX_GROWTH * size + MAX_EXTRA_BYTES
        try:
            yield max_bytes
        except ModelTooLargeError:
            reason = f"describes a model of more than {max_bytes / 1e6:,.0f} MB"
            raise UserError("", f"{reason}, and holds {size / 1e6:,.1f} MB of weights", self.path) from None

    def head_rows(self, name: str | None = None) -> int | None:
        """Return the rows of the head of these weights; None if they have no head or are of an unknown model.

        `name` is that of their model; None is the name that the file describes.
        """
        if name is None:
            if self.model is None:
                return None
            name = self.model.name
        cfg = get_pretrained_cfg(name.removeprefix("timm/"))
        weight = self.state_dict.get(f"{as_list((cfg and cfg.classifier) or 'head')[0]}.weight")
        return len(weight) if weight is not None and weight.dim() else None


def timm_options_start(config: ModelConfig) -> bool:
    """Return True if the `timm_options` of a timm/<name> model load weights."""
    options = config.timm_options or {}
    return config.name.startswith("timm/") and bool(
        options.get("pretrained") or options.get("checkpoint_path")
    )


def timm_weights(config: ModelConfig) -> Weights | None:
    """Return the weights that the `timm_options` of a timm/<name> model load; None if they load none.

    Raises:
        UserError: options that timm cannot use.
    """
    if not timm_options_start(config):
        return None
    options = config.timm_options or {}
    num_classes = config.num_classes
    if not options.get("checkpoint_path"):  # whose head timm takes as it is
        num_classes = pretrained_classes(config.name, options)
    model = model_from_config(replace(config, num_classes=num_classes))
    return Weights(config.name, "foreign", "raw", model.state_dict())


def stored_model_config(values: object) -> ModelConfig:
    """Return a stored model section as a validated configuration, without the options that start a run."""
    try:
        check_plain(values)
        section = without_start_options(values) if isinstance(values, Mapping) else values
        return validate(EvalConfig, {"model": section}).model
    except UserError as error:
        raise UserError(error.location or "model", error.reason, STORED) from None


def name_rows(class_names: Sequence[str] | None, count: int) -> list[str]:
    """Return the names of the rows of a head; rows without a name have their number.

    A head of 1,000 rows without names is ImageNet's, with WordNet ids.
    """
    imagenet = imagenet_classes()
    names = class_names or (imagenet if count == len(imagenet) else ())
    return [*names[:count], *map(str, range(len(names), count))]
