"""tools/benchmark.py: methods compute local attention, and all requested figures are printed and written."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import forked
from torch import nn
from torch.nn import functional as F

from tools.benchmarks import accuracy, attention, methods, models, program, timing
from tools.benchmarks.methods import METHODS
from tools.benchmarks.shapes import AttentionShape
from tools.benchmarks.timing import Missing, Rates, TimingOptions
from vil.attention import vision_longformer
from vil.attention.local import BACKENDS
from vil.attention.local.dense import dense_bias
from vil.config import ModelConfig
from vil.errors import UserError
from vil.models.zoo import SIZES, resolve_stages

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
LINE = "--device cpu --shapes grid --sides 4 6 --batch-size 1 --heads 2 --window 2 --head-width 8 --repeats 1"
TINY = LINE.split()
MODEL = ["model", "--device", "cpu", "--image-size", "32", "--batch-size", "2", "--repeats", "1"]

pytestmark = pytest.mark.xdist_group("benchmark_tool")


@pytest.fixture(autouse=True)
def _small_rates(monkeypatch):
    """Measure the peak rates with little work."""
    monkeypatch.setattr(timing, "RATE_SIZES", {"cpu": (4096, 8)})


def make_shape(height=6, width=6, mask="chunk", neighbors="all", **options):
    defaults = {"window": 2, "precision": "float64", "batch": 2}
    return AttentionShape(
        "x",
        heads=2,
        head_width=4,
        height=height,
        width=width,
        mask=mask,
        neighbors=neighbors,
        **defaults | options,
    )


# --- Methods ------------------------------------------------------------------------------------------------

CASES = [
    make_shape(),
    make_shape(5, 7, global_tokens=3),
    make_shape(1, 5, window=3, global_tokens=0),
    make_shape(4, 9, position="absolute", global_tokens=2),
    make_shape(7, 5, "exact"),
    make_shape(8, 6, "exact", position="absolute", global_tokens=0),
    make_shape(6, 8, "cyclic"),
    make_shape(5, 7, "cyclic", global_tokens=2),
    make_shape(3, 2, "cyclic"),
    make_shape(5, 7, neighbors="self"),
    make_shape(5, 7, neighbors=0),
    make_shape(6, 6, neighbors=6, global_tokens=0),
    make_shape(7, 5, "cyclic", neighbors=3, position="absolute"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sliding_chunk_equals_the_definition(case):
    inputs = case.inputs(3)
    ours, dense = (METHODS[name](case, inputs) for name in ("sliding_chunk", "dense"))
    outputs = [ours.forward(), dense.forward()]
    torch.testing.assert_close(*outputs)
    assert len(ours.leaves) == len(dense.leaves) == (7 if case.is_relative else 5)
    gradient = case.output_gradient(outputs[1])
    found, expected = (
        torch.autograd.grad(x, inputs_of.leaves, gradient, materialize_grads=True, allow_unused=True)
        for x, inputs_of in zip(outputs, (ours, dense))
    )
    assert any(x.abs().max() > 0.01 for x in expected)
    torch.testing.assert_close(found, expected)


def test_sliding_chunk_supports_dropout_and_a_neighbor_on_the_device():
    case = make_shape(6, 6, neighbors=2)
    inputs = case.inputs()
    options = {"size": case.size, "window": 2, "bias_table": inputs.bias_table}
    sliding = partial(methods.sliding_chunk_attention, *inputs[:5], **options)
    with_number, with_tensor = sliding(neighbors=2), sliding(neighbors=torch.tensor([2]))
    assert torch.equal(with_number, with_tensor)
    assert torch.equal(sliding(dropout=1.0), torch.zeros_like(inputs.query))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    "case",
    [
        make_shape(5, 7, precision="float32"),
        make_shape(7, 4, position="absolute", global_tokens=0, precision="float32"),
        make_shape(7, 5, "exact", global_tokens=2, precision="float32"),
    ],
    ids=str,
)
def test_flex_equals_the_definition(case, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function) or function)
    inputs = case.inputs(3)
    flex, dense = (METHODS[name](case, inputs) for name in ("flex", "dense"))
    with torch.no_grad():
        torch.testing.assert_close(flex.to_map_order(flex.forward()), dense.forward())
    assert compiled  # in earnest; here the same is computed without, in a hundredth of the time
    with pytest.raises(methods.UnavailableError, match="no backward pass on a CPU"):
        flex.forward()


@pytest.mark.parametrize("case", [make_shape(6, 8, "cyclic"), make_shape(5, 7, neighbors=6)], ids=str)
def test_flex_is_limited_to_all_neighbors(case):
    with pytest.raises(methods.UnavailableError, match="only all neighbors"):
        METHODS["flex"](case, case.inputs())


def test_full_equals_the_definition_if_one_chunk_is_the_map():
    case = make_shape(3, 4, window=4, global_tokens=2, position="absolute")
    inputs = case.inputs(3)
    full, dense = (METHODS[name](case, inputs) for name in ("full", "dense"))
    torch.testing.assert_close(full.forward()[:, :, 2:], dense.forward())
    assert full.to_map_order is None
    assert full.costs == case.costs(14, 14**2)


def test_natten_receives_heads_last_and_the_global_keys(monkeypatch):
    def na2d(query, key, value, kernel_size, additional_keys, additional_values):
        assert kernel_size == (3, 4)  # the whole map, which is smaller than 2w + 1
        assert query.shape == (2, 3, 4, 2, 4)
        keys = torch.cat([additional_keys, key.flatten(1, 2)], 1).transpose(1, 2)
        values = torch.cat([additional_values, value.flatten(1, 2)], 1).transpose(1, 2)
        queries = query.flatten(1, 2).transpose(1, 2)
        return F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).unflatten(1, (3, 4))

    monkeypatch.setitem(sys.modules, "natten", SimpleNamespace(na2d=na2d))
    case = make_shape(3, 4, window=4, global_tokens=2, position="absolute")
    inputs = case.inputs(3)
    natten, dense = (METHODS[name](case, inputs) for name in ("natten", "dense"))
    torch.testing.assert_close(natten.forward(), dense.forward())
    assert len(natten.leaves) == 5


def test_natten_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "natten", None)
    with pytest.raises(methods.UnavailableError, match="not installed"):
        METHODS["natten"](make_shape(), make_shape().inputs())


# --- Shapes -------------------------------------------------------------------------------------------------


def test_inputs_have_the_layout_of_models():
    inputs = make_shape(precision="bfloat16").inputs()
    assert inputs.query.shape == (2, 2, 36, 4)
    assert all(x.transpose(1, 2).is_contiguous() and x.dtype == torch.bfloat16 for x in inputs[:5])
    assert inputs.bias_table.dtype == inputs.global_bias.dtype == torch.float32
    assert inputs.neighbor is None
    assert make_shape(neighbors=5).inputs().neighbor.tolist() == [5]
    assert not torch.equal(inputs.query, make_shape(precision="bfloat16").inputs(1).query)


@pytest.mark.parametrize("case", [case for case in CASES if case.size != (3, 2)], ids=str)
def test_pairs_are_those_of_the_definition(case):
    seen = dense_bias(case.inputs(), case.spec)[0].isfinite()  # (N, P·Q)
    rows, columns = (-(-length // case.window) * case.window for length in case.size)
    real = F.pad(torch.ones(case.size, dtype=torch.bool), (0, columns - case.size[1], 0, rows - case.size[0]))
    assert case.pairs() == (seen & real.flatten()).sum()


def test_costs_of_a_small_problem():
    case = make_shape(
        2, 2, batch=3
    )  # one chunk: 4 queries, 4 local keys and a global one; 6 images and heads
    forward, backward = case.costs()
    tokens, memory, biases, sums = 6 * 4 * 4 * 8, 2 * 6 * 1 * 4 * 8, 2 * (49 + 1) * 4, 6 * 4 * 4
    assert forward.multiply_adds == 2 * 6 * 4 * 5 * 4
    assert backward.multiply_adds == 5 * 6 * 4 * 5 * 4
    assert forward.bytes == 4 * tokens + memory + biases + sums
    assert backward.bytes == 8 * tokens + 2 * memory + 2 * biases + sums
    assert Rates(1e3, 1e6).min_seconds(forward) == forward.bytes / 1e3
    assert Rates(1e9, 1e3).min_seconds(forward) == forward.multiply_adds / 1e3


def parsed(*argv):
    return program.parser().parse_args(argv)


def test_default_shapes_are_the_grid_and_the_stages_of_the_zoo():
    found = attention.select_shapes(parsed("attention"), CPU, "float32")
    grid = [x for x in found if x.label == "grid"]
    assert [x.size for x in grid] == [(side, side) for side in (14, 28, 56, 112, 224)]
    assert all((x.heads, x.head_width, x.window, x.global_tokens) == (3, 32, 7, 1) for x in grid)
    assert [x.batch for x in grid] == [8, 8, 2, 1, 1]
    stages = [x for x in found if x.label != "grid"]
    assert len({(x.heads, x.head_width, x.size) for x in stages}) == len(stages)
    for name in ("vil_tiny", "vil_small", "vil_base_deep", "vil_base_wide"):
        for number in (1, 2):
            stage = resolve_stages(ModelConfig(name))[number - 1]
            side = 56 // number
            (case,) = [x for x in stages if f"{name} stage {number}" in x.label.split(", ")]
            assert (case.size, case.heads) == ((side, side), stage.heads)
            assert case.heads * case.head_width == SIZES[name].stages[number - 1][3]
            assert (case.window, case.global_tokens) == (stage.window, stage.global_tokens)


def test_options_set_the_shape():
    shape = "--shapes grid --sides 9 --heads 5 --head-width 6 --window 3 --global-tokens 4 --batch-size 2"
    others = "--mask cyclic --neighbors 3 --position absolute"
    arguments = parsed("attention", *shape.split(), *others.split())
    (case,) = attention.select_shapes(arguments, CPU, "float16")
    assert case == AttentionShape("grid", 2, 5, 6, 9, 9, 3, 4, "cyclic", 3, "absolute", "float16")
    assert attention.select_shapes(parsed("attention", "--check"), CPU, "float16")[0].batch == 2


# --- Measuring ----------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """Make each call of a function take as many seconds as it returns."""

    def seconds_per_call(function, calls, device):
        return sum(function() for _ in range(calls)) / calls

    monkeypatch.setattr(timing, "seconds_per_call", seconds_per_call)


def test_functions_are_interleaved(clock):
    turns = []

    def function(name, seconds):
        turns.append(name)
        return seconds

    functions = {"a": partial(function, "a", 1.0), "b": partial(function, "b", 0.004)}
    found = timing.time_interleaved(functions, CPU, TimingOptions(rounds=3, seconds=2.0))
    assert found == {"a": 1.0, "b": pytest.approx(0.004)}
    warm_up, rounds = "aaa" + "bbb", ["a" + "bbb", "a" + "bbb", "bbb"]  # a leaves after two seconds
    assert "".join(turns) == warm_up + "".join(rounds)


def test_the_median_is_returned(clock):
    durations = iter([9.0] * 3 + [5.0, 1.0, 2.0, 8.0, 3.0])
    found = timing.time_interleaved({"a": partial(next, durations)}, CPU, TimingOptions(5, 100.0))
    assert found == {"a": 3.0}


def raising(error):
    def function(*_, **__):
        raise error

    return function


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), Missing("out of memory")),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), Missing("out of memory")),
        (ValueError("needs a GPU\nmore"), Missing("needs a GPU")),
        (NotImplementedError("no float16"), Missing("no float16")),
        (RuntimeError("\n illegal\nx"), Missing("RuntimeError: illegal", is_failure=True)),
        (
            RuntimeError("backend raised:\nE: TypeError: bad"),
            Missing("RuntimeError: E: TypeError: bad", True),
        ),
        (KeyError(), Missing("KeyError: KeyError", is_failure=True)),
    ],
)
def test_errors_are_described(error, expected, clock):
    functions = {"bad": raising(error), "good": lambda: 1.0}
    found = timing.time_interleaved(functions, CPU, TimingOptions(1, 1.0))
    assert found == {"bad": expected, "good": 1.0}


def test_peak_rates_are_positive():
    found = timing.measure_rates(CPU, torch.bfloat16)
    assert all(0 < rate < math.inf for rate in found)


# --- attention ----------------------------------------------------------------------------------------------


def test_attention_prints_and_writes_every_row(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(METHODS, "fused", raising(ValueError("needs a GPU")))  # slow in the interpreter
    monkeypatch.setitem(sys.modules, "natten", None)
    files = [tmp_path / name for name in ("a.csv", "a.md")]
    argv = ["attention", *TINY, "--csv", str(files[0]), "--markdown", str(files[1])]
    program.benchmark([*argv, "--methods", *(name for name in METHODS if name != "flex")])
    shown, progress = capsys.readouterr()
    assert progress.count("grid: 4×4") == progress.count("grid: 6×6") == 1
    assert files[1].read_text() == shown
    head, *tables = shown.split("\n### ")
    assert torch.__version__ in head
    assert "float32" in head
    assert "tools/benchmark.py attention --device cpu --shapes grid" in head
    assert [table.split(",")[0] for table in tables] == ["grid: 4×4", "grid: 6×6"]

    rows = list(csv.DictReader(files[0].open(encoding="utf-8")))
    names = [name for name in METHODS if name != "flex"]
    assert [(row["height"], row["method"]) for row in rows] == [(s, n) for s in "46" for n in names]
    for row in rows:
        figures = [key for key in row if key.endswith(("_ms", "_mb", "_ratio", "_roofline"))]
        assert len(figures) == 8
        absent = row["method"] in ("fused", "natten")
        assert all((row[key] == "") == absent for key in figures), row
        assert bool(row["note"]) == absent
        assert absent or all(float(row[key]) > 0 for key in figures)
        if row["method"] == "sliding_chunk":
            assert [float(row[f"{key}_ratio"]) for key in ("forward", "training", "memory")] == [1, 1, 1]
    dense, sliding = (next(r for r in rows if r["method"] == m) for m in ("dense", "sliding_chunk"))
    for key in ("forward_ms", "training_ms", "memory_mb"):
        ratio = float(sliding[key]) / float(dense[key])
        assert float(dense[key.rpartition("_")[0] + "_ratio"]) == pytest.approx(ratio)
    assert all("- fused: needs a GPU\n- natten: natten is not installed" in table for table in tables)


def test_default_methods_are_all(monkeypatch):
    measured = []
    monkeypatch.setattr(attention, "measure_shape", lambda _, names, *__: measured.append(names) or [])
    attention.run(parsed("attention", *TINY), CPU, "float32")
    assert measured == [list(METHODS)] * 2
    assert list(METHODS) == [*BACKENDS, "auto", "sliding_chunk", "full", "flex", "natten"]


def test_methods_that_exceed_the_memory_are_skipped_or_noted(monkeypatch, capsys):
    monkeypatch.setitem(METHODS, "full", raising(torch.OutOfMemoryError("CUDA out of memory")))
    argv = ["attention", *TINY, "--methods", "dense", "full", "chunked", "--skip-memory-above", "20000"]
    program.benchmark(argv)
    shown = capsys.readouterr().out
    assert shown.count("- dense: would need about 0.0 GB") == 2
    assert shown.count("- full: out of memory") == 2
    assert methods.estimate_memory("dense", make_shape(224, 224)) > 100e9
    assert methods.estimate_memory("full", make_shape(224, 224)) == 0


def test_a_backend_that_breaks_down_fails_the_run(monkeypatch, capsys):
    monkeypatch.setitem(METHODS, "chunked", raising(RuntimeError("illegal memory access")))
    with pytest.raises(SystemExit) as stop:
        program.benchmark(["attention", *TINY, "--methods", "chunked", "sliding_chunk"])
    assert stop.value.code == 1
    assert "- chunked: RuntimeError: illegal memory access" in capsys.readouterr().out


def test_timed_steps_compute_gradients_of_biases():
    case = make_shape()
    method = METHODS["chunked"](case, case.inputs())
    assert not method.infer().requires_grad
    gradients = attention.training_step(method, case)()
    assert len(gradients) == 7
    assert all(x is not None and x.abs().max() > 0 for x in gradients)


# --- attention --check --------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_check_accepts_right_results(precision, capsys):
    line = "--check --mask exact --precision"
    program.benchmark(["attention", *TINY, *line.split(), precision, "--methods", "chunked", "full"])
    shown = capsys.readouterr().out
    verdicts = [row.split()[:2] for row in shown.splitlines() if row.startswith("  ")]
    assert verdicts == [["chunked", "ok"], ["full", "n/a"]] * 2
    for name in (
        "output",
        "query",
        "key",
        "value",
        "global_key",
        "global_value",
        "bias_table",
        "global_bias",
    ):
        assert shown.count(f"{name} ") >= 2
    assert "0 wrong" in shown


def wrong(change):
    def method(case, inputs):
        prepared = METHODS["dense"](case, inputs)
        forward = prepared.forward
        prepared.forward = lambda: change(forward(), inputs)
        return prepared

    return method


@pytest.mark.parametrize(
    "change",
    [
        lambda output, _: 1.02 * output,
        lambda output, _: output * float("nan"),
        lambda output, inputs: (
            output + (inputs.global_bias - inputs.global_bias.detach()).sum()
        ),  # a gradient
        lambda output, _: raising(RuntimeError("broken"))(),
    ],
)
def test_check_finds_wrong_results(change, monkeypatch, capsys):
    monkeypatch.setitem(METHODS, "chunked", wrong(change))
    with pytest.raises(SystemExit) as stop:
        program.benchmark(["attention", *TINY, "--check", "--methods", "dense", "chunked"])
    assert stop.value.code == 1
    shown = capsys.readouterr().out
    assert shown.count("WRONG") == shown.count("  chunked        WRONG") == 2
    assert "2 wrong" in shown


def test_check_reports_where_the_definition_does_not_fit(capsys):
    program.benchmark(["attention", *TINY, "--check", "--skip-memory-above=1000"])
    assert capsys.readouterr().out.count("n/a: the definition would need") == 2


def test_check_uses_the_given_seed(monkeypatch):
    seeds = []
    monkeypatch.setattr(accuracy, "compare_with_float64", lambda s, m, seed: seeds.append(seed) or [])
    program.benchmark(["attention", *TINY, "--check"])
    program.benchmark(["attention", *TINY, "--check", "--seed", "7"])
    assert seeds == [0, 0, 7, 7]


# --- model --------------------------------------------------------------------------------------------------


def test_model_prints_and_writes_every_row(tmp_path, capsys):
    files = [tmp_path / name for name in ("m.csv", "m.md")]
    names = ["vil_tiny", "vil_tiny+sliding_chunk", "timm/vit_tiny_patch16_224"]
    argv = [*MODEL, "--csv", str(files[0]), "--markdown", str(files[1])]
    program.benchmark([*argv, "--models", *names])
    shown = capsys.readouterr().out
    assert files[1].read_text() == shown
    assert "tools/benchmark.py model" in shown
    rows = list(csv.DictReader(files[0].open(encoding="utf-8")))
    assert [row["model"] for row in rows] == names
    for row in rows:
        assert all(float(row[key]) > 0 for key in row if key.endswith(("_ratio", "_per_second", "_image")))
        assert row["batch"] == "2"
        assert row["note"] == ""
    assert [row["paper_memory_mb"] for row in rows] == ["52.7", "52.7", ""]
    assert float(rows[1]["training_ratio"]) == float(rows[1]["memory_ratio"]) == 1
    assert float(rows[0]["memory_ratio"]) > 1


def test_a_model_with_the_baseline_computes_the_same(monkeypatch):
    calls = []

    def counted(*arguments, **options):
        calls.append(options["window"])
        return methods.sliding_chunk_attention(*arguments, **options)

    monkeypatch.setattr(models, "sliding_chunk_attention", counted)
    original = vision_longformer.local_attention
    found = {}
    for name in ("vil_tiny", "vil_tiny+sliding_chunk", "vil_tiny+dense"):
        candidate = models.Candidate(name, 32, CPU, "float32")
        images, targets = candidate.images(2)
        before = candidate.infer(images)
        candidate.train(images, targets)
        found[name] = before, candidate.infer(images), len(calls)
        assert vision_longformer.local_attention is original
    assert [count for *_, count in found.values()] == [0, 6, 6]  # 2 layers in 3 passes, of one model alone
    first, others = found["vil_tiny"], (found["vil_tiny+sliding_chunk"], found["vil_tiny+dense"])
    for other in others:
        torch.testing.assert_close(other[0], first[0], atol=1e-4, rtol=1e-3)
    assert not torch.equal(first[0], first[1])  # trained


def test_none_replaces_the_local_attention_alone(monkeypatch):
    candidate = models.Candidate("vil_tiny+none", 32, CPU, "float32")
    calls = []
    monkeypatch.setattr(vision_longformer, "local_attention", lambda *_, **__: calls.append(1))
    candidate.train(*candidate.images(2))
    assert not calls
    candidate.optimizer.zero_grad()
    candidate.loss(*candidate.images(2)).backward()
    without = [name for name, p in candidate.model.named_parameters() if p.grad is None]
    biases = [name for name in without if name.endswith(("bias_table", "global_bias.from_local"))]
    assert without == biases != []


@pytest.mark.parametrize(("limit", "batch", "note"), [(2, 2, ""), (0, 4, "out of memory")])
def test_the_batch_is_halved_until_it_fits(limit, batch, note, monkeypatch):
    train = models.Candidate.train

    def limited(self, images, targets):
        if len(images) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        train(self, images, targets)

    monkeypatch.setattr(models.Candidate, "train", limited)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    arguments = parsed(*MODEL, "--batch-size", "4", "--models", "timm/vit_tiny_patch16_224")
    ((record,),) = models.run(arguments, CPU, "float32").tables.values()
    assert (record["batch"], record["note"]) == (batch, note)
    assert (record["memory_mb_per_image"] is None) == bool(note)


def test_default_models_and_the_papers_memory():
    names = parsed("model").models
    assert list(names) == ["vil_small", "vil_small+sliding_chunk", "timm/swin_tiny_patch4_window7_224",
                           "timm/deit_small_patch16_224"]  # fmt: skip
    printed = models.paper_memory()
    assert printed == {
        "vil_tiny": 52.7, "vil_small": 116.8, "vil_tiny_3stage": 45.5, "vil_small_3stage": 81.4,
        "timm/deit_tiny_patch16_224": 33.4, "timm/deit_small_patch16_224": 67.1,
    }  # fmt: skip


def test_compile_is_used(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or (lambda x: model(x) + 1))
    candidate = models.Candidate("timm/vit_tiny_patch16_224", 32, CPU, "float32", torch.compile)
    assert compiled == [candidate.model]
    assert isinstance(candidate.model, nn.Module)
    images, _ = candidate.images(2)
    torch.testing.assert_close(candidate.infer(images), candidate.model(images).detach() + 1)


# --- Bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", "command"),
        ("speed", "invalid choice: 'speed'"),
        ("attention --methods fast", "invalid choice: 'fast'"),
        ("attention --window 0", "argument --window: expected an integer of at least 1, got '0'"),
        ("attention --batch-size -1", "argument --batch-size: expected an integer of at least 1, got '-1'"),
        ("attention --sides 7 x", "argument --sides: expected an integer of at least 1, got 'x'"),
        ("attention --sides 7 0", "argument --sides: expected an integer of at least 1, got '0'"),
        (
            "attention --global-tokens -1",
            "argument --global-tokens: expected an integer of at least 0, got '-1'",
        ),
        ("attention --mask exact --neighbors self", "--mask exact is defined for --neighbors all only"),
        ("attention --mask round", "invalid choice: 'round'"),
        ("attention --neighbors 8", "invalid choice: '8'"),
        ("attention --repeats 0", "argument --repeats: expected an integer of at least 1, got '0'"),
        ("attention --seconds 0", "argument --seconds: must be positive, got 0"),
        ("attention --device tpu", "expected auto, cpu or cuda, got 'tpu'"),
        ("attention --device cpu --precision int8", "invalid choice: 'int8'"),
        ("attention --device cpu --check --csv a.csv", "--csv cannot be combined with --check"),
        ("attention --csv .", "--csv: . cannot be written: Is a directory"),
        (
            "model --batch-size 0 --device cpu",
            "argument --batch-size: expected an integer of at least 1, got '0'",
        ),
        (
            "model --image-size 0 --device cpu",
            "argument --image-size: expected an integer of at least 1, got '0'",
        ),
        ("model --models vil_smal --device cpu", "did you mean vil_small?"),
        ("model --models vil_tiny+fast --device cpu", "and one of sliding_chunk, none, auto, dense"),
        (
            "model --models timm/swin_tiny_patch4_window7_224+dense --device cpu",
            "expected a model of the zoo before +",
        ),
        ("model --models vil_tiny --image-size 8 --device cpu", "image_size"),
    ],
)
def test_bad_input(line, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        program.benchmark(line.split())
    assert reason in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_one_line_and_status_2_as_a_program(tmp_path):
    command = [forked.python(), ROOT / "tools" / "benchmark.py", "attention", "--window", "0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr == "error: command line: argument --window: expected an integer of at least 1, got '0'\n"
    )
