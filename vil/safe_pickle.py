"""What a file of `torch.save` asks for, found out before anything of it is made.

`torch.load(weights_only=True)` runs no code, but makes what a pickle asks for: `bytearray(6_000_000_000)` or
a `FloatTensor` of four billion numbers in a hundred bytes. Here the pickle is first read with inert values in
the place of tensors. What is no tensor over bytes of the file, and no plain value, is refused: then nothing
that `torch.load` makes is larger than the file by more than a constant factor.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar

import torch

MAX_PICKLE_BYTES = 1 << 24
"""Size of the pickle without the numbers; of 600 tensors and their optimizer's state it is 0.3 MB."""
MAX_DIMENSIONS = 64
"""PyTorch's own limit."""

_DIRECTORY_OFFSET = zipfile._ECD_OFFSET  # type: ignore[attr-defined]

_OPCODES = (
    "PROTO", "STOP", "GLOBAL", "NEWOBJ", "REDUCE", "BUILD", "APPEND", "APPENDS", "SETITEM", "SETITEMS",
    "MARK", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "NONE", "NEWTRUE", "NEWFALSE", "EMPTY_TUPLE",
    "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "BINPERSID", "BININT", "BININT1", "BININT2", "BINFLOAT",
    "BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT", "BINUNICODE", "SHORT_BINSTRING", "LONG1",
)  # fmt: skip
"""Those that torch.load knows."""

_STORAGES = {
    f"torch.{name}Storage": size
    for size, names in {
        1: ("Byte", "Char", "Bool", "QInt8", "QUInt8"), 2: ("Half", "BFloat16", "Short"),
        4: ("Float", "Int", "QInt32"), 8: ("Double", "Long", "ComplexFloat"), 16: ("ComplexDouble",),
    }.items()
    for name in names
}  # fmt: skip
_STORAGES["torch.storage.UntypedStorage"] = 1


class Inert:
    """Stand-in for a value that is not read: accepts whatever a pickle does to it, and keeps nothing."""

    def __init__(self, *arguments: Any) -> None:
        del arguments

    def __setstate__(self, state: Any) -> None:
        """Ignore the state."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Ignore the item."""

    def append(self, value: Any) -> None:
        """Ignore the value."""

    def extend(self, values: Any) -> None:
        """Ignore the values."""


def _empty_mapping(*arguments: Any) -> OrderedDict[Any, Any]:
    """Replace collections.defaultdict, whose argument is a class."""
    del arguments
    return OrderedDict()


INERT: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(
        (
            "argparse.Namespace", "pathlib.Path", "pathlib.PosixPath", "pathlib.PurePosixPath",
            "pathlib._local.PosixPath", "datetime.datetime", "datetime.timedelta",
            "numpy.dtype", "numpy.ndarray", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
            "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
            "builtins.int", "builtins.float", "builtins.list", "builtins.dict", "builtins.str",
            "__builtin__.int", "__builtin__.float", "__builtin__.list", "__builtin__.dict", "__builtin__.str",
        ),
        Inert,
    ),
    "collections.defaultdict": _empty_mapping,
    "yacs.config.CfgNode": OrderedDict,
}  # fmt: skip
"""Classes and functions that checkpoints of other programs name beside their weights (arguments,
configurations, best accuracies), and what takes the place of each; none of them is imported or called."""


class RefusedPickleError(Exception):
    """A pickle that is refused; the text says why, None where it holds something other than plain values."""


@dataclass(frozen=True)
class _Constant:
    """A class or value that a pickle may pass on, and not call."""

    name: str


@dataclass(frozen=True)
class _Storage:
    """Bytes of the file, and the size of one number in it."""

    nbytes: int
    itemsize: int


class _Tensor:
    """Stand-in for a tensor."""


def check_zip(file: BinaryIO) -> None:
    """Check a file of torch.save's zip format.

    Raises:
        RefusedPickleError: it is refused.
        Exception: of any type, where it is damaged.
    """
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
        if archive.comment:
            raise RefusedPickleError("not a checkpoint: a zip with a comment")
        # Python finds the directory from the end of the file, PyTorch from its beginning.
        ending = zipfile._EndRecData(file)  # type: ignore[attr-defined]
        if ending is None or archive.start_dir != ending[_DIRECTORY_OFFSET]:
            raise RefusedPickleError("not a checkpoint: the directory of its zip is not where it says")
        stored = all(part.compress_type == zipfile.ZIP_STORED for part in parts)
        if not stored or sum(part.file_size for part in parts) > os.fstat(file.fileno()).st_size:
            raise RefusedPickleError("not a checkpoint: its parts are compressed, or larger than the file")
        sizes = {part.filename: part.file_size for part in parts}
        # Of two parts that differ in case alone, or by what follows a null byte, PyTorch may take another one
        # than Python.
        if len({name.lower() for name in sizes}) < len(parts) or any(
            p.orig_filename != p.filename for p in parts
        ):
            raise RefusedPickleError("not a checkpoint: two of its parts have the same name")
        root = parts[0].filename.split("/")[0] if parts else ""
        if sizes.get(f"{root}/data.pkl", 0) > MAX_PICKLE_BYTES:
            raise RefusedPickleError(f"not a checkpoint: a pickle of more than {MAX_PICKLE_BYTES:,} bytes")

        def nbytes_of(key: str, nbytes: int) -> int:
            if nbytes > sizes.get(f"{root}/data/{key}", -1):
                raise RefusedPickleError(f"damaged: storage {key[:40]!r} is not in the file, or shorter")
            return nbytes

        _Inspector(io.BytesIO(archive.read(f"{root}/data.pkl")), nbytes_of).load()


def check_legacy(file: BinaryIO) -> None:
    """Check a file of torch.save's older format: five pickles, then the numbers.

    Raises:
        RefusedPickleError: it is refused.
        Exception: of any type, where it is damaged.
    """
    left = os.fstat(file.fileno()).st_size
    known: dict[str, int] = {}

    def nbytes_of(key: str, nbytes: int) -> int:
        nonlocal left
        if key not in known:
            known[key], left = nbytes, left - nbytes
        if left < 0 or nbytes != known[key]:
            raise RefusedPickleError(f"damaged: storage {key[:40]!r} is larger than the file")
        return nbytes

    content = io.BytesIO(file.read(MAX_PICKLE_BYTES))
    for _ in range(5):  # magic number, version, byte order, the content, the keys of the storages
        _Inspector(content, nbytes_of).load()


class _Inspector(pickle._Unpickler):
    """Reads a pickle with inert values in the place of tensors.

    Python's own, not the one in C, whose memory for memoised values is as large as the greatest index that a
    file names.
    """

    stack: list[Any]
    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _OPCODES
    }

    def __init__(self, file: BinaryIO, nbytes_of: Callable[[str, int], int]) -> None:
        super().__init__(file, encoding="bytes")
        self._nbytes_of = nbytes_of

    def load(self) -> Any:
        try:
            return super().load()
        except KeyError as error:
            raise pickle.UnpicklingError(f"opcode {error}") from None

    def find_class(self, module: str, name: str) -> Any:
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        full = f"{module}.{name}"
        if full in _CALLABLE:
            return _CALLABLE[full]
        if full in INERT:
            return _CALLABLE["collections.OrderedDict"] if INERT[full] is OrderedDict else INERT[full]
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or full in _STORAGES or full in _TYPES:
            return _Constant(full)
        raise RefusedPickleError

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage, key, _, numel, *view = pid
        itemsize = _STORAGES.get(storage.name) if isinstance(storage, _Constant) else None
        kind, key = (text.decode() if isinstance(text, bytes) else text for text in (kind, key))
        if kind != "storage" or itemsize is None or not isinstance(key, str):
            raise RefusedPickleError
        _check_counts([numel])
        nbytes = self._nbytes_of(key, numel * itemsize)
        if view and view[0] is not None:
            _, offset, length = view[0]
            _check_counts([offset, length])
            if offset + length > numel:
                raise RefusedPickleError("damaged: a part of a storage is larger than it")
            nbytes = length * itemsize
        return _Storage(nbytes, itemsize)

    def load_setitem(self) -> None:
        _check_keys(self.stack[-2:-1])
        super().load_setitem()  # type: ignore[misc]

    def load_setitems(self) -> None:
        _check_keys(self.stack[::2])
        super().load_setitems()  # type: ignore[misc]

    def load_build(self) -> None:
        if not isinstance(self.stack[-2], OrderedDict | Inert):  # of a tensor it would set the storage
            raise RefusedPickleError
        super().load_build()  # type: ignore[misc]

    def load_newobj(self) -> None:
        kinds = (_CALLABLE["collections.OrderedDict"], _CALLABLE["collections.Counter"], Inert)
        if self.stack[-2] not in kinds:
            raise RefusedPickleError
        self.load_reduce()

    def load_reduce(self) -> None:
        if not isinstance(self.stack[-1], tuple) or self.stack[-2] not in (
            *_CALLABLE.values(),
            Inert,
            _empty_mapping,
        ):
            raise RefusedPickleError
        super().load_reduce()  # type: ignore[misc]

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.REDUCE[0]] = load_reduce


def _check_counts(values: Iterable[Any]) -> None:
    """Refuse what is no whole number of at least 0 and less than 2^62."""
    if not all(type(value) is int and 0 <= value < 1 << 62 for value in values):
        raise RefusedPickleError


def _check_keys(keys: Iterable[Any]) -> None:
    """Refuse keys that hold others: of deeply nested tuples Python's hash overflows the stack."""
    for key in keys:
        parts = key if isinstance(key, tuple) else (key,)
        if not all(isinstance(part, str | bytes | int | float | None) for part in parts):
            raise RefusedPickleError


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> _Tensor:
    """Replace torch._utils._rebuild_tensor and _v2, which would enlarge a storage that is too small."""
    return _check_tensor(storage, offset, size, stride, getattr(storage, "itemsize", None))


def _rebuild_tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> _Tensor:
    name = dtype.name.removeprefix("torch.") if isinstance(dtype, _Constant) else ""
    known = getattr(torch, name, None)
    return _check_tensor(storage, offset, size, stride, getattr(known, "itemsize", None))


def _check_tensor(storage: Any, offset: Any, size: Any, stride: Any, itemsize: int | None) -> _Tensor:
    if not isinstance(storage, _Storage) or type(itemsize) is not int:
        raise RefusedPickleError
    size, stride = _size(size), _size(stride)
    _check_counts([offset])
    if len(size) != len(stride):
        raise RefusedPickleError
    last = offset + sum((side - 1) * step for side, step in zip(size, stride))
    if math.prod(size) and (last + 1) * itemsize > storage.nbytes:
        raise RefusedPickleError(f"damaged: a tensor of shape {size} is larger than its storage")
    return _Tensor()


def _size(*sizes: Any) -> tuple[int, ...]:
    """Check a size or a stride; also replaces torch.Size."""
    size = sizes[0] if len(sizes) == 1 else sizes
    if not isinstance(size, tuple | list) or len(size) > MAX_DIMENSIONS:
        raise RefusedPickleError
    _check_counts(size)
    return tuple(size)


def _rebuild_meta(dtype: Any, size: Any, stride: Any, grad: Any) -> _Tensor:
    _size(size)
    _size(stride)
    return _Tensor()


def _rebuild_sparse(layout: Any, data: Any) -> _Tensor:
    parts = data if isinstance(data, tuple) else ()
    if not all(isinstance(part, _Tensor | bool | tuple | list) for part in parts):
        raise RefusedPickleError
    for part in parts:
        if isinstance(part, tuple | list):
            _size(part)
    return _Tensor()


def _rebuild_parameter(data: Any, *rest: Any) -> _Tensor:
    if not isinstance(data, _Tensor):
        raise RefusedPickleError
    return data


def _rebuild_from_type(function: Any, kind: Any, arguments: Any, state: Any) -> _Tensor:
    names = (
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch._utils._rebuild_parameter",
    )
    if function not in [_CALLABLE[name] for name in names] or not isinstance(arguments, tuple):
        raise RefusedPickleError
    result: _Tensor = function(*arguments)
    return result


def _mapping(kind: type) -> Callable[..., Any]:
    def make(*arguments: Any) -> Any:
        if len(arguments) > 1 or not all(isinstance(argument, list | dict) for argument in arguments):
            raise RefusedPickleError
        for argument in arguments:
            pairs = argument.items() if isinstance(argument, Mapping) else argument
            _check_keys(pair[0] for pair in pairs)
        return kind(*arguments)

    return make


def _encode(text: Any, encoding: Any) -> bytes:
    """Bytes in protocol 2."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", b"latin1", b"latin-1"):
        raise RefusedPickleError
    return text.encode("latin-1")


def _bytearray(content: Any = b"") -> bytes:
    """A number would be a length."""
    if not isinstance(content, bytes):
        raise RefusedPickleError
    return content


def _set(values: Any = ()) -> set[Any]:
    _check_keys(values)
    return set(values)


def _complex(*parts: Any) -> complex:
    if not all(isinstance(part, float | int) for part in parts):
        raise RefusedPickleError
    return complex(*parts)


def _constant(*arguments: Any) -> _Constant:
    """A device or a layout."""
    if not all(isinstance(argument, str | bytes | int) for argument in arguments):
        raise RefusedPickleError
    return _Constant("value")


_TYPES = ("torch.Tensor", "torch.nn.parameter.Parameter")

_CALLABLE: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _mapping(OrderedDict),
    "collections.Counter": _mapping(Counter),
    "torch.Size": _size,
    "torch.device": _constant,
    "torch.serialization._get_layout": _constant,
    "_codecs.encode": _encode,
    "builtins.bytearray": _bytearray,
    "builtins.set": _set,
    "builtins.complex": _complex,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch._utils._rebuild_meta_tensor_no_storage": _rebuild_meta,
    "torch._utils._rebuild_sparse_tensor": _rebuild_sparse,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
}
"""Functions that a pickle may call, and what stands in their place."""
