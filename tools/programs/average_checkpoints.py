"""Average the weights of checkpoints: uniformly, or greedily by validation accuracy (model soups).

    python tools/average_checkpoints.py runs/a runs/b runs/c --output soup.pt
    python tools/average_checkpoints.py runs/a --last 3 --output averaged.safetensors
    python tools/average_checkpoints.py runs/a runs/b runs/c --output soup.pt --greedy
    python tools/average_checkpoints.py runs/a runs/b --output soup.pt --greedy --data imagenet.yaml

The checkpoints have the same model, classes and evaluation transform; rates of drop path and dropout may
differ. Weights are summed in float64. Integer buffers are those of the first checkpoint; running statistics
of batch norms are averaged like weights.

--greedy begins with the checkpoint of the highest Top-1 and adds the others, in the order of theirs, if the
Top-1 of the average does not fall: on the validation images of the runs, or on those of the options of
eval.py that follow (--data, --data.root, --batch_size, --device, ...). These images choose the result: report
its accuracy on others.

The output is read like any other checkpoint. A .pt file names the data of the first run and has a digest, a
.safetensors file has the metadata of tools/export.py. Both list the averaged checkpoints under `averaged`.

Source: Wortsman et al., Model soups: averaging weights of multiple fine-tuned models improves accuracy
without increasing inference time, https://arxiv.org/abs/2203.05482, recipe 1.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from data import build_validation
from tools.programs.evaluation_options import check_order, parse_evaluation_options, start_single_process
from vil.checkpoints.checkpoint_files import digest_file, step_files
from vil.checkpoints.open import find_checkpoint, open_weights, run_checkpoint_of
from vil.checkpoints.safetensors_file import write_safetensors
from vil.checkpoints.training_state import library_versions, write_training_state
from vil.checkpoints.weights import Weights
from vil.command_line import ParsedArguments, ToolParser, bounded_int
from vil.command_line.stored_model import StoredModel, resolve_over_stored
from vil.config import TRANSFORM_OPTIONS, EvalConfig, Tree
from vil.errors import COMMAND_LINE, UserError, error_reason, errors_in_option, errors_in_section
from vil.evaluation.accuracy import EvaluationDataset, EvaluationOptions, evaluate
from vil.models.timm_models import check_logits
from vil.runtime.class_names import match_classes
from vil.runtime.console import print_line
from vil.runtime.distributed import Process
from vil.runtime.files import check_writable, refuse_input_as_output
from vil.validation import INITIALIZATION, as_tree, validate, without_start_options

_TRAINING_ONLY_OPTIONS = (
    *("drop_path", "dropout", "position_dropout", "attention_dropout", "head_dropout", "attention_backend"),
    *INITIALIZATION,
)
"""Options of a model that change no logit in evaluation."""
_SPLIT_OPTIONS = ("source", "root", "val_split", "val_fraction", "val_seed", "val_list")
"""Options of the data that determine the validation images."""


def main(argv: Sequence[str]) -> None:
    """Average checkpoints and write the result."""
    arguments, others = _parser().parse_known_args(argv)
    check_order(argv, arguments.checkpoint, others)
    if others and not arguments.greedy:
        raise UserError(others[0], "unknown option; options of eval.py require --greedy", COMMAND_LINE)
    output: Path = arguments.output
    if output.suffix not in (".pt", ".safetensors"):
        raise UserError("--output", f"expected a name that ends with .pt or .safetensors, got {output}")
    paths = arguments.checkpoint
    if arguments.last is not None:
        if arguments.run_checkpoint != "best":
            raise UserError("--run-checkpoint", "cannot be combined with --last", COMMAND_LINE)
        paths = last_checkpoints(paths, arguments.last)
    if len(paths) < 2:
        raise UserError("checkpoint", "expected at least two; --last N takes the newest N of one run")
    choices = [run_checkpoint_of(path, arguments.run_checkpoint, paths) for path in paths]
    files = [str(find_checkpoint(path, choice)) for path, choice in zip(paths, choices)]
    real_paths = list(map(os.path.realpath, files))
    if duplicate := next((file for file, path in zip(files, real_paths) if real_paths.count(path) > 1), None):
        raise UserError("checkpoint", f"{duplicate} occurs twice")
    args = parse_evaluation_options(others, "average_checkpoints.py", frozenset({"match_classes"}))
    inputs = [*files, *filter(None, [arguments.released_config]), *args.resolve().inputs()]
    for path in (output, digest_file(output)):
        refuse_input_as_output(path, inputs, "--output")
    check_writable(output, "--output")
    read = partial(open_weights, published_config=arguments.released_config, weights=arguments.weights)
    if arguments.greedy:
        with start_single_process(args.resolve().config) as process:
            weights, averaged = greedy_average(files, read, args, process)
    else:
        weights, averaged = uniform_average(files, read)
    statistics = sum(name.endswith(("running_mean", "running_var")) for name in weights.state_dict)
    if statistics:
        print_line(f"{statistics} running statistics of batch norms are averaged, not recomputed")
    write_average(output, weights, averaged)
    print_line(f"{output}: average of {len(averaged)} of {len(files)} checkpoints")


def _parser() -> ToolParser:
    parser = ToolParser(
        prog="average_checkpoints.py",
        usage="%(prog)s CHECKPOINT [CHECKPOINT ...] --output FILE [OPTION ...] [OPTION OF eval.py ...]",
        description=__doc__,
        allow_abbrev=False,
    )
    parser.add_checkpoint("+")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help=".pt or .safetensors")
    parser.add_argument(
        "--last", type=bounded_int(2), metavar="N", help="the newest N checkpoints of one run"
    )
    parser.add_argument("--greedy", action="store_true", help="keep what does not lower the validation Top-1")
    return parser


def last_checkpoints(paths: Sequence[str], count: int) -> list[str]:
    """Return the newest checkpoints of a run, except best.pt, the newest first."""
    if len(paths) != 1 or not os.path.isdir(paths[0]):
        raise UserError("--last", "requires the folder of one run")
    found = step_files(Path(paths[0]))
    if len(found) < count:
        reason = f"{paths[0]} has {len(found)} of {count} checkpoints; train.py --keep_checkpoints keeps more"
        raise UserError("--last", reason)
    return [str(path) for _, path in found[:count]]


class WeightAverage:
    """The mean of state dicts with the same names, shapes and types, summed in float64.

    Attributes:
        count: number of state dicts.
    """

    def __init__(self, first: Mapping[str, Tensor]) -> None:
        self._first = first
        self._sums = {
            name: value.to(torch.float64, copy=True)
            for name, value in first.items()
            if value.is_floating_point()
        }
        self.count = 1

    def add(self, state_dict: Mapping[str, Tensor]) -> None:
        """Add a state dict."""
        for name, value in self._sums.items():
            value += state_dict[name]
        self.count += 1

    def state_dict(self, extra: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return the mean, in the types of the first; `extra` is one more state dict, which is not added.

        Tensors of integers are those of the first.
        """
        count = self.count + (extra is not None)
        means = {
            name: ((value if extra is None else value + extra[name]) / count).to(self._first[name].dtype)
            for name, value in self._sums.items()
        }
        return {name: means.get(name, value) for name, value in self._first.items()}


ReadWeights = Callable[[str], Weights]
Averaged = list[dict[str, str | float]]
"""The averaged checkpoints: file, kind of weights, and with --greedy Top-1 in percent."""


def uniform_average(files: Sequence[str], read: ReadWeights) -> tuple[Weights, Averaged]:
    """Return the mean of all checkpoints."""
    first = read(files[0])
    first.require_model("--released-config")
    mean = WeightAverage(first.state_dict)
    averaged: Averaged = [{"file": first.path, "weights": first.kind}]
    for file in files[1:]:
        other = read(file)
        check_compatible(first, other)
        mean.add(other.state_dict)
        averaged.append({"file": other.path, "weights": other.kind})
    return dataclasses.replace(first, kind="raw", state_dict=mean.state_dict()), averaged


def greedy_average(
    files: Sequence[str], read: ReadWeights, args: ParsedArguments[EvalConfig], process: Process
) -> tuple[Weights, Averaged]:
    """Return the mean of the checkpoints that do not lower its Top-1; print a line for each of them."""
    first = read(files[0])
    evaluate_top1 = build_evaluation(first, args, process)
    has_image_options = args.assigns("data", *(f"data.{key}" for key in _SPLIT_OPTIONS))
    accuracies = []
    for file in files:
        weights = read(file)
        check_compatible(first, weights)
        for key in () if has_image_options else _SPLIT_OPTIONS:
            if first.data.get(key) != weights.data.get(key):
                reason = (
                    f"has other validation images than {first.path}: data.{key}; name the images by --data"
                )
                raise UserError(weights.path, reason)
        accuracies.append(evaluate_top1(weights))
    order = sorted(range(len(files)), key=lambda index: -accuracies[index])
    best = read(files[order[0]])
    mean, top1 = WeightAverage(best.state_dict), accuracies[order[0]]
    averaged: Averaged = []
    for index in order:
        weights = read(files[index])
        is_kept, changed = True, top1
        if index != order[0]:
            changed = evaluate_top1(dataclasses.replace(best, state_dict=mean.state_dict(weights.state_dict)))
            is_kept = changed >= top1
        decision = "kept" if is_kept else "left out"
        print_line(f"{weights.path}: Top-1 {accuracies[index]:.2f} %, with it {changed:.2f} %: {decision}")
        if is_kept:
            top1 = changed
            averaged.append({"file": weights.path, "weights": weights.kind, "top1": accuracies[index]})
        if is_kept and index != order[0]:
            mean.add(weights.state_dict)
    return dataclasses.replace(best, kind="raw", state_dict=mean.state_dict()), averaged


def build_evaluation(
    first: Weights, args: ParsedArguments[EvalConfig], process: Process
) -> Callable[[Weights], float]:
    """Return a function that evaluates weights on the validation images of the run of `first`, or of `args`.

    Its value is Top-1 in percent.
    """
    first.require_model("--released-config")
    stored = StoredModel(first.path, first, first.kind, first.model, first.transform)
    command = resolve_over_stored(args, stored)
    if "data.source" not in command.origins:
        raise UserError("--greedy", f"{first.path} names no data; name the images by --data")
    config = command.config
    try:
        validation = build_validation(config, process)
        num_classes = len(validation.class_names)
        model = stored.build_model(config.model, num_classes, process.device).to(process.device)
        with errors_in_section("model"):
            check_logits(model, config.model)
        by_position = config.match_classes == "position"
        indices = match_classes(
            validation.class_names, first.class_names, config.model.num_classes, by_position
        )
    except UserError as error:
        raise command.locate(error) from error
    dataset = EvaluationDataset(validation.name, validation.loader, validation.class_names, indices)
    options = EvaluationOptions(process.device, config.precision, config.progress)

    def top1(weights: Weights) -> float:
        weights.load_into(model, config.model.size)
        return evaluate(model, dataset, options).values["top1"]

    return top1


def check_compatible(first: Weights, other: Weights) -> None:
    """Raise UserError if the weights are not those of the same model, classes and transform as the first."""
    reason = _difference(first, other)
    if reason is not None:
        raise UserError(other.path, f"cannot be averaged with {first.path}: {reason}")


def _difference(first: Weights, other: Weights) -> str | None:
    if first.class_names != other.class_names:
        return "it has other classes, or in another order"
    old, new = map(_evaluated_options, (first, other))
    for key, value in new.items():
        if value != old[key]:
            return f"{key} is {value}, not {old[key]}"
    if names := sorted(first.state_dict.keys() ^ other.state_dict.keys()):
        return f"{names[0]} is in one of them only"
    for name, value in first.state_dict.items():
        found = other.state_dict[name]
        if (value.shape, value.dtype) != (found.shape, found.dtype):
            return f"{name} is {tuple(found.shape)} {found.dtype}, not {tuple(value.shape)} {value.dtype}"
    return None


def _evaluated_options(weights: Weights) -> Tree:
    """Return the options of the model and the transform that evaluation depends on."""
    model = as_tree(weights.require_model("--released-config"))
    if model["neighbors"] != "self":  # random is for training alone
        model["neighbors"] = None
    options = {f"model.{key}": value for key, value in model.items() if key not in _TRAINING_ONLY_OPTIONS}
    with errors_in_option(weights.path):
        data = as_tree(validate(EvalConfig, {"data": dict(weights.transform)}).data)
    return options | {f"data.{key}": data[key] for key in TRANSFORM_OPTIONS}


def write_average(path: Path, weights: Weights, averaged: Averaged) -> None:
    """Write averaged weights as a checkpoint, or as safetensors, by the ending of the name."""
    if path.suffix == ".safetensors":
        write_safetensors(path, weights, {"averaged": averaged})
        return
    if weights.class_names is None:
        reason = "a checkpoint has class names, which these weights lack; write .safetensors"
        raise UserError("--output", reason)
    state = {
        "model": {name: value.contiguous() for name, value in weights.state_dict.items()},
        "ema": None,
        "best": None,
        "config": {
            "model": without_start_options(as_tree(weights.require_model())),
            "schedule": {},
            "data": {**weights.data_with_split(), **weights.transform},
        },
        "class_names": list(weights.class_names),
        "versions": library_versions(),
        "averaged": averaged,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_training_state(path, state)
    except OSError as error:
        raise UserError("--output", f"{path} cannot be written: {error_reason(error)}") from None
