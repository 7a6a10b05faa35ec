"""Exports a trained model to where this project is not needed, or to where timm looks for it.

    python tools/export.py runs/digits digits.onnx --format onnx       ONNX, checked with onnxruntime
    python tools/export.py runs/digits digits.pt2 --format torch       torch.export, for torch.export.load
    python tools/export.py runs/digits folder --format hf              timm.create_model("local-dir:folder")
    python tools/export.py runs/digits digits.safetensors --format safetensors      as tools/convert.py

A published checkpoint comes with --released-config config.yaml. Images have the size of the model, their
number is free. What is exported to `onnx` and `torch` is compared with the model before the file is kept. For
`hf`, `import vil` comes before `timm.create_model("local-dir:folder", pretrained=True)`; the folder can be
uploaded to the Hugging Face hub as it is.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vil.command_line import ToolParser, main
from vil.config import ConfigError
from vil.models.released import open_model
from vil.runtime.files import move_output, refuse_input_as_output
from vil.weight_files import WeightsFile, write_safetensors

TOLERANCE = 1e-4
"""Largest difference between a logit of the model and of its export."""
HUB_FILES = ("config.json", "model.safetensors")
BATCHES = (1, 8)
"""Numbers of images on which the two are compared."""


def export(words: Sequence[str]) -> None:
    """Reads the model, and writes it in the format that is asked for."""
    parser = ToolParser(prog="export.py", description=__doc__.splitlines()[0])
    parser.add_checkpoint()
    parser.add_argument("output", help="file to write; for hf a folder")
    parser.add_argument("--format", choices=FORMATS, required=True)
    arguments = vars(parser.parse_args(words))
    output, form = Path(arguments.pop("output")), arguments.pop("format")
    inputs = [path for path in (arguments["checkpoint"], arguments["released_config"]) if path]
    refuse_input_as_output(output, inputs, "output")
    if form == "hf":
        for name in HUB_FILES:
            refuse_input_as_output(output / name, inputs, "output")
    model, file = open_model(**arguments)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
            temporary = Path(folder) / output.name
            FORMATS[form](model, file, temporary)
            if temporary.is_dir():
                output.mkdir(exist_ok=True)
                for file_of_hub in temporary.iterdir():  # a link of such a name is replaced, not followed
                    os.replace(file_of_hub, output / file_of_hub.name)
            else:
                move_output(temporary, output)
    except OSError as error:
        raise ConfigError(str(output), f"cannot be written: {error.strerror or error}") from None
    print(f"{output}: {form}, {file.kind} weights")


def to_torch(model: nn.Module, file: WeightsFile, path: Path) -> None:
    """An `ExportedProgram` for any number of images."""
    images = example(file, 2)  # one would be taken for a constant
    with exporting(file):
        batch = torch.export.Dim("batch", min=1)
        program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
        torch.export.save(program, path)
    loaded = torch.export.load(path).module()
    compare(model, loaded, file)


def to_onnx(model: nn.Module, file: WeightsFile, path: Path) -> None:
    """ONNX for any number of images: input `images` (B, C, height, width), output `logits` (B, classes)."""
    try:
        import onnxruntime
    except ImportError:
        raise ConfigError("--format", "onnx needs the packages onnx, onnxscript and onnxruntime") from None
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with exporting(file), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = torch.export.Dim("batch", min=1)
        torch.onnx.export(
            model, (example(file, 2),), path, dynamo=True, dynamic_shapes=({0: batch},), external_data=False,
            input_names=["images"], output_names=["logits"], verbose=False,
        )  # fmt: skip
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    compare(model, lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0]), file)


def to_safetensors(model: nn.Module, file: WeightsFile, path: Path) -> None:
    """Weights with everything about them in the metadata: see tools/convert.py."""
    write_safetensors(path, file)


def to_hub(model: nn.Module, file: WeightsFile, path: Path) -> None:
    """A folder as timm's on the Hugging Face hub: config.json and model.safetensors."""
    transform = {"input_size": tuple(example(file, 1).shape[1:]), **file.data}
    model.pretrained_cfg = {**model.pretrained_cfg, **transform}  # type: ignore[dict-item, assignment]
    timm.models.save_for_hf(
        model,
        str(path),
        model_config={"label_names": list(file.class_names)} if file.class_names else None,
        model_args=dict(model._model_args),  # type: ignore[arg-type]
        safe_serialization=True,
    )


FORMATS: dict[str, Callable[[nn.Module, WeightsFile, Path], None]] = {
    "torch": to_torch,
    "onnx": to_onnx,
    "safetensors": to_safetensors,
    "hf": to_hub,
}


@contextmanager
def exporting(file: WeightsFile) -> Iterator[None]:
    """Makes whatever goes wrong in an exporter, and there it can be anything, a ConfigError of one line."""
    try:
        yield
    except Exception as error:
        lines = str(error.__cause__ or error).splitlines() or [type(error).__name__]
        raise ConfigError(file.path, f"the model cannot be exported: {lines[0]}") from error


def example(file: WeightsFile, count: int) -> Tensor:
    """Images (count, in_chans, size, size) of noise for the model of a file."""
    assert file.model is not None
    generator = torch.Generator().manual_seed(count)
    return torch.randn(
        count, file.model.in_chans, file.model.image_size, file.model.image_size, generator=generator
    )


@torch.no_grad()
def compare(model: nn.Module, exported: Callable[[Tensor], Tensor], file: WeightsFile) -> None:
    """Raises ConfigError where the export does not compute what the model does."""
    for count in BATCHES:
        images = example(file, count)
        difference = (model(images) - exported(images)).abs().max().item()
        if not difference <= TOLERANCE:
            reason = f"the export differs from the model by {difference:.1e} at batch {count}"
            raise ConfigError(file.path, reason)


if __name__ == "__main__":
    main(export)
