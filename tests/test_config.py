"""The options: their ranges, their names in earlier versions, and that validation is complete."""

import dataclasses
import typing

import pytest
import yaml
from annotated_types import Ge, Gt, Le, Lt, Predicate

from vil.command_line import parse
from vil.config import (
    RENAMED_OPTIONS,
    AugmentConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    ScheduleConfig,
    StageConfig,
    TrainConfig,
)
from vil.errors import UserError
from vil.validation import as_tree, field_types, type_name, union_members, validate

SECTIONS = {
    "": TrainConfig,
    "model.": ModelConfig,
    "schedule.": ScheduleConfig,
    "schedule.augment.": AugmentConfig,
    "data.": DataConfig,
}


def nested(key, value):
    *sections, name = key.split(".")
    tree = {name: value}
    for section in reversed(sections):
        tree = {section: tree}
    return tree


def reason(key, value, config_class=TrainConfig):
    with pytest.raises(UserError) as caught:
        validate(config_class, nested(key, value))
    assert caught.value.location == key
    return caught.value.reason


def bounded_options():
    """(key, value outside the range) for both ends of every range of an option that is a number."""
    for prefix, config_class in SECTIONS.items():
        for name, hint in field_types(config_class).items():
            for member in union_members(hint):
                if typing.get_origin(member) is not typing.Annotated:
                    continue
                base, *bounds = typing.get_args(member)
                if base not in (int, float):
                    continue
                for bound in bounds:
                    outside = {
                        Ge: lambda b: b.ge - 1,
                        Gt: lambda b: b.gt,
                        Le: lambda b: b.le + 1,
                        Lt: lambda b: b.lt,
                    }.get(type(bound))
                    if outside is not None:
                        yield f"{prefix}{name}", base(outside(bound))


BOUNDED = list(bounded_options())


def test_the_defaults_are_within_their_ranges():
    for config_class in (TrainConfig, EvalConfig):
        assert validate(config_class, as_tree(config_class())) == config_class()


def test_every_number_has_a_range():
    """A range that is removed from an option is noticed, whatever the option."""
    without_range = {
        f"{prefix}{name}"
        for prefix, config_class in {**SECTIONS, "eval.": EvalConfig, "stages.": StageConfig}.items()
        for name, hint in field_types(config_class).items()
        for member in union_members(hint)
        if member in (int, float) or {int, float} & set(typing.get_args(member)[:1])
        if typing.get_origin(member) is not typing.Annotated
    }
    assert without_range == {"data.mean"}  # any finite numbers
    assert len(BOUNDED) > 60


@pytest.mark.parametrize(("key", "value"), BOUNDED)
def test_a_number_outside_its_range_is_refused(key, value):
    assert reason(key, value).endswith(f", got {value}")


CLASS_WEIGHTS = "expected one of none, balanced or a list of numbers from 1e-06 to 1,000,000"
IMAGE_SIZE = "an integer from 1 to 8,192 or a list of 2 integers from 1 to 8,192"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("schedule.epochs", 0, "expected an integer of at least 1, got 0"),
        ("schedule.lr", 0.0, "expected a number above 0, got 0.0"),
        ("schedule.lr", float("nan"), "expected a number above 0, got nan"),
        ("schedule.lr", float("inf"), "expected a number above 0, got inf"),
        ("schedule.betas", [0.9, 1.0], "expected a list of 2 numbers from 0 to below 1, got [0.9, 1.0]"),
        ("schedule.layer_decay", 1.5, "expected a number above 0, up to 1 or null, got 1.5"),
        ("schedule.augment.hflip", 1.5, "expected a number from 0 to 1, got 1.5"),
        (
            "schedule.augment.scale",
            [0.9, 0.1],
            "expected a list of 2 numbers above 0, up to 1, in rising order, got [0.9, 0.1]",
        ),
        ("schedule.augment.mixup", 1e-9, "expected a number, from 1e-6 to 1e6, or 0 for off, got 1e-09"),
        ("schedule.class_weights", [1.0, 1e-7], f"{CLASS_WEIGHTS}, got [1.0, 1e-07]"),
        ("schedule.class_weights", [1.0, 2e6], f"{CLASS_WEIGHTS}, got [1.0, 2000000.0]"),
        ("hang_timeout", 2e6, "expected a number above 0, up to 1,000,000, got 2000000.0"),
        ("data.std", [0.1, 0.0, 0.1], "expected a list of 3 numbers above 0, got [0.1, 0.0, 0.1]"),
        ("data.mean", [float("inf"), 0.0, 0.1], "expected a list of 3 numbers, got [inf, 0.0, 0.1]"),
        ("model.image_size", 9000, f"expected {IMAGE_SIZE}, got 9000"),
    ],
)
def test_the_message_names_the_range(key, value, message):
    assert reason(key, value) == message


@pytest.mark.parametrize("plan", [[], [[0.1, 16]], [[0, 16], [0, 24]], [[0, 16], [1.0, 24]], [[0, 0]]])
def test_impossible_progressive_resizing(plan):
    assert reason("schedule.progressive_resizing", plan).startswith(
        "expected a list of pairs, e.g. [[0, 160], [0.6, 224]]"
    )


def test_stages_have_the_ranges_too():
    tree = {"name": "vil", "stages": [{"dim": 8, "heads": 1}, {"dim": 8, "heads": 0}]}
    with pytest.raises(UserError) as caught:
        validate(ModelConfig, tree)
    assert str(caught.value) == "stages[1].heads: expected an integer from 1 to 1,000,000, got 0"
    assert validate(ModelConfig, {**tree, "stages": tree["stages"][:1]}).stages == [StageConfig(8, 1)]


def test_every_predicate_describes_its_expectation():
    for config_class in (*SECTIONS.values(), EvalConfig, StageConfig):
        for hint in field_types(config_class).values():
            for member in union_members(hint):
                for bound in typing.get_args(member)[1:]:
                    assert not isinstance(bound, Predicate) or bound.func.__doc__
            assert type_name(hint)


@pytest.mark.parametrize("old", RENAMED_OPTIONS)
def test_old_names_are_read_with_one_line_of_notice(old, tmp_path, caplog):
    new = RENAMED_OPTIONS[old]
    config_class = EvalConfig if old in ("sets", "which") else TrainConfig
    value = {
        "schedule.sizes": [[0, 160], [0.5, 224]],
        "schedule.augment.repeats": 3,
        "data.on_error": "skip",
        "data.max_bad": 0.5,
        "sets": ["a"],
        "which": "last",
        "tensorboard": False,
    }[old]
    file = tmp_path / "old.yaml"
    file.write_text(yaml.safe_dump(nested(old, value)))
    caplog.set_level("INFO")
    config = parse(config_class, ["--config", str(file)]).config
    new_value = [] if old == "tensorboard" else value
    expected = validate(config_class, nested(new, new_value))
    assert config == expected != config_class()
    assert caplog.messages == [f"{file}: {old} is now called {new}"]
    stored = parse(config_class, [], base_values=nested(old, value)).config
    assert stored == expected


def test_an_option_given_under_both_names_is_refused(tmp_path):
    file = tmp_path / "both.yaml"
    file.write_text("data: {on_error: skip, unreadable_images: fail}")
    with pytest.raises(UserError, match=r"both\.yaml: data\.on_error: unknown key"):
        parse(TrainConfig, ["--config", str(file)])


def test_new_names_exist():
    for old, new in RENAMED_OPTIONS.items():
        names = {f"{prefix}{f.name}" for prefix, c in SECTIONS.items() for f in dataclasses.fields(c)}
        names |= {f.name for f in dataclasses.fields(EvalConfig)}
        assert new in names
        assert old not in names


def test_random_sizes_are_not_empty():
    assert reason("schedule.random_sizes", []).startswith(
        "expected a list of an integer from 1 to 8,192 or a"
    )
    assert reason("schedule.random_sizes", []).endswith(", at least one or null, got []")
