"""YAML files: plain values are read back, and any other content is refused with one line."""

import contextlib

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from vil.errors import UserError
from vil.runtime.yaml_files import parse_yaml, read_yaml, yaml_text


def written(folder, text):
    path = folder / "file.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path):
    with pytest.raises(UserError) as caught:
        read_yaml(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert len(message.splitlines()) == 1
    return message.removeprefix(f"{path}: ")


def test_plain_values(tmp_path):
    tree = {"a": [1, 2.5, None, True, "text"], "b": {"c": {}, "d": []}, 3: "three"}
    assert read_yaml(written(tmp_path, yaml.safe_dump(tree))) == tree
    assert read_yaml(written(tmp_path, "")) is None


@pytest.mark.parametrize("kind", ["int", "float", "bool", "timestamp"])
@pytest.mark.parametrize("value", ['""', "foo", '"a\\nb"'])
def test_a_tag_with_an_invalid_value(tmp_path, kind, value):
    message = refusal(written(tmp_path, f"first: 1\nsecond:\n  - !!{kind} {value}\n"))
    assert message.startswith("line 3: not valid YAML: '")
    assert message.endswith(f"' is not a value of {kind}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: {c: 1, d: 2, c: 3}\n", "c: given twice in the mapping that begins on line 2"),
        ("a: 1\n\na: 1\n", "a: given twice in the mapping that begins on line 1"),
        ("- {1: x, 0x1: y}", "1: given twice"),
        ("{: [", "line 1: not valid YAML"),
        ("? [1]\n: 2\n", "line 1: not valid YAML: found unhashable key"),
        ("!!python/object/apply:os.system ['true']", "line 1: not valid YAML: could not determine"),
        ("a: 1\nb: 2020-99-99", "line 2: not valid YAML: '2020-99-99' is not a value of timestamp"),
        ("n: " + "9" * 5000, "line 1: not valid YAML: '999"),
        ("a: !!binary é", "line 1: not valid YAML: failed to convert base64"),
        ("a\0b", "not valid YAML: unacceptable character"),
        ("[" * 5000, "not valid YAML: maximum recursion depth"),
        ("!!map x", "line 1: not valid YAML: expected a mapping"),
    ],
)  # fmt: skip
def test_files_that_are_refused(tmp_path, text, message):
    assert refusal(written(tmp_path, text)).startswith(message)


def test_files_that_cannot_be_read(tmp_path):
    assert refusal(tmp_path / "none.yaml") == "no such file"
    assert refusal(tmp_path).startswith("cannot be read: ")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xfa")
    assert refusal(tmp_path / "bytes").startswith("not valid YAML: 'utf-8'")


TAGS = st.sampled_from(
    ["int", "float", "bool", "null", "timestamp", "binary", "set", "omap", "pairs", "map", "seq"]
)


@given(
    st.text() | st.builds("a: !!{} {}".format, TAGS, st.text() | st.sampled_from(["{}", "[[]]", "{a: 1}"]))
)
@example("!!int -")
@example("!!set {a, a}")
@example("&a {*a : 1}")
@example("<<: 3")
def test_any_text_is_a_tree_or_one_line(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("fuzz") / "file.yaml"
    with contextlib.suppress(UnicodeEncodeError):  # half a pair of surrogates is no text in a file
        path.write_text(text, encoding="utf-8")
        message = ""
        try:
            read_yaml(path)
        except UserError as error:
            message = str(error)
        assert len(message.splitlines()) <= 1


def test_a_leading_zero_is_no_octal_number(tmp_path):
    """YAML 1.1 reads 010 as 8 and 08 as text, YAML 1.2 both as decimal numbers."""
    text = "[010, 08, -017, +09, 00, 0, 007, 0x10, 0o17, 0.5, 08.5, 0_10, 0_]"
    assert read_yaml(written(tmp_path, text)) == [10, 8, -17, 9, 0, 0, 7, 16, "0o17", 0.5, 8.5, 10, 0]


@given(st.text("0123456789_.eE+-:x", max_size=6) | st.text(max_size=6).filter(str.isprintable))
@example("08")
@example("1e3")
@example("010")
def test_texts_that_look_like_numbers_are_written_as_texts(text):
    """A run with the split 08 continues from its own config.yaml."""
    found = parse_yaml(yaml_text({text: text}))
    assert found == {text: text}
    assert isinstance(found[text], str)
