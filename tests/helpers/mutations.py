"""Mutations of files: bytes and YAML trees, drawn by hypothesis; and limits of time and memory.

CI tries a few; `FUZZ_EXAMPLES=700 pytest -n 4 tests/fuzz` tries so many of every kind: 2,100 YAML files, and
thirty in processes of their own.
"""

import contextlib
import copy
import datetime
import os
import resource
import signal

import yaml
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 0))
"""Of every test here; 0 for the few that each test takes by itself."""
SECONDS = 60
"""No single file may take longer."""
GIGABYTES = 3
"""No single file may take more memory, beside what the process has."""


def examples(few):
    """Settings of a test of `few` examples, or of FUZZ_EXAMPLES."""
    return settings(
        max_examples=EXAMPLES or few,
        deadline=None,
        derandomize=not EXAMPLES,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


class TooSlow(BaseException):  # no Exception, which a program may take for a fault of the file
    """A file took too long."""


@contextlib.contextmanager
def bounded():
    """Raise an exception in the block if it exceeds a limit of time or memory."""

    def stop(*_):
        raise TooSlow(f"took more than {SECONDS} seconds")

    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + GIGABYTES * 10**9, before[1]))
    handler = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


VALUES = st.one_of(
    st.sampled_from([
        None, True, False, "", "x", "null", "auto", "1e3", "1e400", ".nan", "vil", "vil_tiny",
        "timm/resnet10t",
        "timm/vit_tiny_patch16_224", "../../x", "/dev/zero", "/etc/passwd", "~nobody", "a\nb",
        "\x1b[2J", "é" * 9,
        "\0", "x" * 5000, float("nan"), float("inf"), -float("inf"), 1e308, 1e-320, 0.5, -1, 0, 1, 2,
        3, 7, 10**5,
        10**9, -(10**9), 2**31, 2**63, 2**64, 16**5000, [], {}, [[]], [None], [1, 2], [0.1, 0.9], [{}],
        {"x": 1},
        {1: 2}, {None: None}, {(1, 2): 3}, {"class_path": "antigravity.geohash"}, ["antigravity.geohash"],
        b"\xff\xfe", datetime.date(2021, 10, 11), {1, 2}, [[[[[[[[[]]]]]]]]], list(range(3000)),
        {"dim": 8, "heads": 2}, [{"dim": 8, "heads": 2}], [{"dim": 8, "heads": 2, "blocks": 10**9}],
    ]),
    st.integers(-40, 400),
    st.floats(),
    st.text(max_size=20),
)  # fmt: skip
TEXTS = [
    "", "\0", "\xff", "\t", "\n", ": ", "- ", "{", "}", "[", "]", "'", '"', "#", "&a ", "*a", "<<: ",
    "!!", "? ", "|",
    "!!python/object/apply:os.system ['true']", "!!python/name:os.system ", "!!int ''", "!!float x",
    "!!binary x",
    "!!timestamp x", "!!set ", "!!omap ", "!x ", "%YAML 9.9\n", "---\n", "...\n", "\ufeff", "\u2028", "\x85",
    "0x" + "f" * 6000, "9" * 6000, "1:" * 3000 + "1", "[" * 3000, "{" * 400, "a: &a [*a]\n",
    "x: &x {y: *x}\n",
    "<<: [*a, *a]\n", "=", "-.inf", ".nan", "1_000", "0o17", "0b1", "~",
]  # fmt: skip
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["set", "set", "set", "add", "rename", "drop", "wrap", "alias", "repeat"]),
        st.integers(0, 10**6),
        VALUES,
    ),
    min_size=1,
    max_size=4,
)
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["insert", "insert", "replace", "drop", "flip", "cut", "copy"]),
        st.floats(0, 1),
        st.sampled_from(TEXTS),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=4,
)


def changed_tree(tree, changes):
    """Draw a tree of mappings and lists with other values, keys, depths and references in it."""
    tree = {"": copy.deepcopy(tree)}
    for kind, number, value in changes:
        places = list(_places(tree))
        parent, key = places[number % len(places)]
        if kind == "set":
            parent[key] = copy.deepcopy(value)
        elif kind == "add" and isinstance(parent[key], dict):
            with contextlib.suppress(TypeError):  # a list is no key
                parent[key][value] = copy.deepcopy(value)
        elif kind == "add" and isinstance(parent[key], list):
            parent[key].append(copy.deepcopy(value))
        elif kind == "rename" and isinstance(parent, dict) and key:
            parent[f"{key}{value}"[:9]] = parent.pop(key)
        elif kind == "drop" and key != "":
            del parent[key]
        elif kind == "wrap":
            parent[key] = [parent[key]] if number % 2 else {"x": parent[key]}
        elif kind == "alias":
            other, place = places[(number // 7) % len(places)]
            parent[key] = other[place]
        elif kind == "repeat":
            for _ in range(40):  # two to the fortieth values
                parent[key] = [parent[key], parent[key]]
    return tree[""]


def _places(tree, seen=()):
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    for key in keys:
        yield tree, key
        value = tree[key]
        if isinstance(value, dict | list) and len(seen) < 8 and not any(value is other for other in seen):
            yield from _places(value, (*seen, tree))


def as_yaml(tree):
    """Return the tree as YAML; a number of thousands of digits as Python would not print it."""
    return yaml.dump(tree, Dumper=_Dumper).encode("utf-8", "surrogatepass")


class _Dumper(yaml.SafeDumper):
    """PyYAML's, which writes what its loader reads, with tuples and long numbers."""


_Dumper.add_representer(
    int, lambda dumper, value: dumper.represent_scalar("tag:yaml.org,2002:int", hex(value))
)
_Dumper.add_representer(tuple, lambda dumper, value: dumper.represent_list(list(value)))


def changed_bytes(content, edits):
    """Draw bytes with some replaced, or truncated."""
    for kind, share, text, number in edits:
        place = int(share * len(content))
        other = text.encode("utf-8") if text != "\xff" else b"\xff"
        before, after = content[:place], content[place:]
        if kind == "insert":
            content = before + other + after
        elif kind == "replace":
            content = before + other + after[len(other) :]
        elif kind == "drop":
            content = before + after[number:]
        elif kind == "flip":
            content = before + bytes(b ^ (1 << number % 8) for b in after[:1]) + after[1:]
        elif kind == "cut":
            content = before
        else:
            content = before + after[:number] + after
    return content
