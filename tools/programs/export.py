"""Export a trained model for use without this project, or through timm.

    python tools/export.py runs/digits digits.onnx --format onnx       ONNX, verified with onnxruntime
    python tools/export.py runs/digits digits.pt2 --format torch       torch.export, for torch.export.load
    python tools/export.py runs/digits folder --format hf              timm.create_model("local-dir:folder")
    python tools/export.py runs/digits digits.safetensors --format safetensors

A published checkpoint needs --released-config config.yaml. The batch size of an export is dynamic, the image
size that of the model. Exports to `onnx` and `torch` are compared with the model before they are written.

`onnx` has class_names, mean, std, image_size, crop_pct, crop_mode and interpolation as metadata, in JSON.
`safetensors` holds the weights under this project's names, and the model's configuration, the class names and
the evaluation transform as metadata; `eval.py --checkpoint`, `train.py --model.init_from` and
`vil.create_model(None, checkpoint=…)` read it. For `hf`, `import vil` has to precede
`timm.create_model("local-dir:folder", pretrained=True)`; the folder has a model card and can be uploaded to
the Hugging Face hub.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from tools.programs.model_card import model_card
from vil.checkpoints.open import open_weights
from vil.checkpoints.safetensors_file import write_safetensors
from vil.checkpoints.weights import Weights
from vil.command_line import ToolParser
from vil.errors import UserError, error_reason
from vil.runtime.console import print_line
from vil.runtime.files import is_standard_output, move_output, refuse_input_as_output

TOLERANCE = 1e-4
"""Largest difference between a logit of the model and of its export."""
TESTED_BATCH_SIZES = (1, 8)
HUB_FILES = ("config.json", "model.safetensors", "README.md")


def main(argv: Sequence[str]) -> None:
    """Export the model of a checkpoint."""
    parser = ToolParser(prog="export.py", description=__doc__)
    parser.add_checkpoint()
    parser.add_argument("output", type=Path, help="file to write; for hf a folder")
    parser.add_argument("--format", choices=FORMATS, required=True)
    arguments = parser.parse_args(argv)
    output = arguments.output
    inputs = [path for path in (arguments.checkpoint, arguments.released_config) if path]
    for path in (output, *((output / name for name in HUB_FILES) if arguments.format == "hf" else ())):
        refuse_input_as_output(path, inputs, "output")
    weights = open_weights(
        arguments.checkpoint, arguments.released_config, arguments.run_checkpoint, arguments.weights
    )
    model = weights.build_model()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name[:50]}.", dir=output.parent) as folder:
            temporary = Path(folder) / "export" / output.name
            temporary.parent.mkdir()
            with (Path(folder) / "mode").open("x") as file:  # libraries write files that others cannot read
                file_mode = os.fstat(file.fileno()).st_mode & 0o777
            FORMATS[arguments.format](model, weights, temporary)
            if arguments.format == "hf":
                card = model_card(model, weights, arguments.checkpoint, output.resolve().name)
                (temporary / "README.md").write_text(card, encoding="utf-8")
            if temporary.is_dir():
                output.mkdir(exist_ok=True)
                for file in temporary.iterdir():
                    file.chmod(file_mode)
                    os.replace(file, output / file.name)  # replaces a link instead of following it
            else:
                temporary.chmod(file_mode)
                move_output(temporary, output)
    except OSError as error:
        raise UserError(str(output), f"cannot be written: {error_reason(error)}") from None
    line = f"{output}: {arguments.format}, {weights.kind} weights"
    print_line(line, sys.stderr if is_standard_output(output) else None)


def export_torch(model: nn.Module, weights: Weights, path: Path) -> None:
    """Write an `ExportedProgram` with a dynamic batch size."""
    with _export_errors(weights):
        # A batch of 1 would be specialized to a constant.
        batch = torch.export.Dim("batch", min=1)
        program = torch.export.export(model, (random_images(weights, 2),), dynamic_shapes=({0: batch},))
        torch.export.save(program, path)
    compare(model, torch.export.load(path).module(), weights)


def export_onnx(model: nn.Module, weights: Weights, path: Path) -> None:
    """Write ONNX with a dynamic batch size: `images` (B, C, H, W) → `logits` (B, classes)."""
    try:
        import onnxruntime
    except ImportError:
        raise UserError("--format", "onnx needs the packages onnx, onnxscript and onnxruntime") from None
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with _export_errors(weights), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (random_images(weights, 2),),
            path,
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            external_data=False,
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
    _write_onnx_metadata(model, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    compare(model, lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0]), weights)


def _write_onnx_metadata(model: nn.Module, path: Path) -> None:
    """Add what is needed to use the model, and remove the stack traces, which name files of this machine."""
    import onnx

    exported = onnx.load(path)
    for nodes in (exported.graph.node, *(function.node for function in exported.functions)):
        for node in nodes:
            del node.metadata_props[:]
    cfg: Any = model.pretrained_cfg
    metadata = {key: cfg[key] for key in ("mean", "std", "crop_pct", "crop_mode", "interpolation")}
    metadata |= {"class_names": cfg["label_names"], "image_size": cfg["input_size"][1:]}
    onnx.helper.set_model_props(exported, {key: json.dumps(value) for key, value in metadata.items()})
    onnx.save(exported, path)


def export_hub(model: nn.Module, weights: Weights, path: Path) -> None:
    """Write a folder in timm's format for the Hugging Face hub: config.json and model.safetensors."""
    cfg: Any = model.pretrained_cfg
    names = cfg["label_names"]
    without: Any = {**cfg, "label_names": None}  # they are at the root of config.json
    model.pretrained_cfg = without
    timm.models.save_for_hf(
        model,
        str(path),
        model_config={"label_names": list(names)} if names else None,
        model_args=dict(model._model_args),  # type: ignore[arg-type]
        safe_serialization=True,
    )


FORMATS: dict[str, Callable[[nn.Module, Weights, Path], None]] = {
    "torch": export_torch,
    "onnx": export_onnx,
    "safetensors": lambda _, weights, path: write_safetensors(path, weights),
    "hf": export_hub,
}


@contextmanager
def _export_errors(weights: Weights) -> Iterator[None]:
    """Convert any error of an exporter to a UserError of one line."""
    try:
        yield
    except Exception as error:
        reason = error_reason(error.__cause__ or error)
        raise UserError(weights.path, f"the model cannot be exported: {reason}") from error


def random_images(weights: Weights, batch_size: int) -> Tensor:
    """Return noise in the input shape of the model: (batch_size, in_chans, height, width)."""
    config, generator = weights.require_model(), torch.Generator().manual_seed(batch_size)
    size = (batch_size, config.in_chans, *config.size)
    return torch.randn(size, generator=generator)


@torch.no_grad()
def compare(model: nn.Module, exported: Callable[[Tensor], Tensor], weights: Weights) -> None:
    """Raise UserError if a logit of the export differs from the model's by more than `TOLERANCE`."""
    for batch_size in TESTED_BATCH_SIZES:
        images = random_images(weights, batch_size)
        difference = (model(images) - exported(images)).abs().max().item()
        if not difference <= TOLERANCE:
            reason = f"the export differs from the model by {difference:.1e} at batch size {batch_size}"
            raise UserError(weights.path, reason)
