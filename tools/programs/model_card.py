"""The README.md of an exported folder: a model card of the Hugging Face hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from vil.checkpoints.weights import Weights
from vil.config import ScheduleConfig, TrainConfig
from vil.errors import UserError, errors_in_option, printable
from vil.evaluation.complexity import count_parameters, multiply_adds
from vil.runtime.files import MAX_JSON_BYTES, parse_json, read_text
from vil.runtime.run_files import CONFIG, SUMMARY
from vil.runtime.yaml_files import read_yaml
from vil.validation import validate

MAX_LISTED_CLASSES = 20
_RECIPE_OPTIONS = ("epochs", "batch_size", "optimizer", "lr", "weight_decay")
_FRONT_MATTER = (
    "---\ntags: [image-classification, timm]\npipeline_tag: image-classification\nlibrary_name: timm\n---\n"
)


def model_card(model: nn.Module, weights: Weights, checkpoint: str | Path, name: str) -> str:
    """Return a model card in Markdown: data, recipe, accuracy, cost, classes, and how to load the folder.

    It holds no path: the data set is named by its folder alone.

    Args:
        model: the model, in eval mode.
        weights: its weights.
        checkpoint: the run's folder, for recipe and accuracy; any other path has neither.
        name: title of the card and name of the exported folder.
    """
    config = weights.require_model()
    rows = [("architecture", config.name), *_dataset(weights), *_training(Path(checkpoint))]
    rows += [
        ("weights", "moving average" if weights.kind == "ema" else "raw"),
        ("parameters", f"{count_parameters(model) / 1e6:.2f} M"),
        (
            "FLOPs",
            f"{multiply_adds(model, config.size, config.in_chans) / 1e9:.3f} G multiply-adds per image",
        ),
    ]
    rows += _classes(weights)
    table = "".join(f"| {key} | {_cell(value)} |\n" for key, value in rows)
    is_registered = not config.name.startswith("timm/")
    mode = "L" if config.in_chans == 1 else "RGB"
    index = "probabilities.argmax().item()"
    found = f'model.pretrained_cfg["label_names"][{index}]' if weights.class_names else index
    return (
        f"{_FRONT_MATTER}\n# {_cell(name)}\n\n| | |\n|---|---|\n{table}\n"
        "The image size, mean, standard deviation, crop and interpolation are those of `pretrained_cfg` in "
        "`config.json`.\n\n## Usage\n\n```python\nimport timm\n"
        f"{'import vil  # registers the model with timm' + chr(10) if is_registered else ''}"
        "from PIL import Image\n\n"
        'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # or hf-hub:OWNER/NAME\n'
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n"
        f'image = transform(Image.open("photo.jpg").convert("{mode}"))[None]\n'
        "probabilities = model(image).softmax(dim=1)[0]\n"
        f"print({found})\n```\n"
    )


def _dataset(weights: Weights) -> Iterator[tuple[str, str]]:
    source, root = weights.data.get("source"), weights.data.get("root")
    if isinstance(source, str):
        is_library = "/" in source or not isinstance(root, str)
        yield "data", source if is_library else f"{os.path.basename(os.path.abspath(str(root)))} ({source})"


def _training(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield recipe and accuracy of a run's folder."""
    if (folder / CONFIG).is_file():
        content = read_yaml(folder / CONFIG)
        section = content.get("schedule") if isinstance(content, dict) else None
        section = section if isinstance(section, dict) else {}
        known = {key: value for key, value in section.items() if key in _RECIPE_OPTIONS}
        with errors_in_option(str(folder / CONFIG)):
            schedule = validate(TrainConfig, {"schedule": known}).schedule
        yield "recipe", _recipe(schedule)
    if (folder / SUMMARY).is_file():
        try:
            result = parse_json(read_text(folder / SUMMARY, MAX_JSON_BYTES))[0]
            top1, images = float(result["top1"]), int(result["images"])
        except (OSError, ValueError, TypeError, KeyError, IndexError, OverflowError):
            raise UserError(str(folder / SUMMARY), "not a result of train.py") from None
        yield "Top-1", f"{top1:.2f} % of {images:,} validation images"


def _recipe(schedule: ScheduleConfig) -> str:
    return (
        f"{schedule.total_epochs} epochs, batch size {schedule.batch_size}, {schedule.optimizer}, "
        f"learning rate {schedule.lr:g}, weight decay {schedule.weight_decay:g}"
    )


def _classes(weights: Weights) -> Iterator[tuple[str, str]]:
    if names := weights.class_names:
        more = ", ..." if len(names) > MAX_LISTED_CLASSES else ""
        yield "classes", f"{len(names):,}: {', '.join(names[:MAX_LISTED_CLASSES])}{more}"


def _cell(text: str) -> str:
    """Return a text on one line, without the characters that Markdown or HTML would interpret."""
    return "".join(f"\\{c}" if c in "\\`*_|[]<>#" else c for c in printable(text))
