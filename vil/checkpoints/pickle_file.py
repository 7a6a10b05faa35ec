"""Read files of `torch.save` that may come from untrusted sources.

`torch.load(weights_only=True)` runs no code, but allocates whatever a pickle requests: a
`bytearray(6_000_000_000)`, or a `FloatTensor` of four billion numbers in a hundred bytes. Therefore the
pickle is interpreted first with placeholders for tensors. Everything but plain values and tensors over bytes
of the file is refused, so `torch.load` allocates at most a constant multiple of the file's size.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch

from vil.checkpoints.checkpoint_files import UnreadableFileError
from vil.errors import UserError, error_reason
from vil.runtime.files import open_regular

MAX_PICKLE_BYTES = 1 << 24
"""Size of the pickle without the tensors' data; 0.3 MB for 600 tensors and their optimizer state."""
MAX_DIMENSIONS = 64
"""Limit of PyTorch."""

_DIRECTORY_OFFSET = zipfile._ECD_OFFSET  # type: ignore[attr-defined]

_OPCODES = (  # noqa: SIM905 (a list would have 34 lines)
    "PROTO STOP GLOBAL NEWOBJ REDUCE BUILD APPEND APPENDS SETITEM SETITEMS MARK TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "NONE NEWTRUE NEWFALSE EMPTY_TUPLE EMPTY_LIST EMPTY_DICT EMPTY_SET BINPERSID BININT BININT1 BININT2 "
    "BINFLOAT BINGET LONG_BINGET BINPUT LONG_BINPUT BINUNICODE SHORT_BINSTRING LONG1"
).split()
"""Opcodes that `torch.load(weights_only=True)` supports."""

_ELEMENT_BYTES = {
    1: "Byte Char Bool QInt8 QUInt8",
    2: "Half BFloat16 Short",
    4: "Float Int QInt32",
    8: "Double Long ComplexFloat",
    16: "ComplexDouble",
}
_STORAGES = {f"torch.{name}Storage": size for size, names in _ELEMENT_BYTES.items() for name in names.split()}
_STORAGES["torch.storage.UntypedStorage"] = 1
"""Size of an element in bytes, by the name of the storage class."""


class _Discarded:
    """Placeholder for an object that is not read: accepts every operation of a pickle and keeps nothing."""

    def __init__(self, *arguments: object) -> None: ...

    __setstate__ = __setitem__ = append = extend = __init__


def _empty_mapping(*arguments: object) -> OrderedDict[object, object]:
    """Replace collections.defaultdict, whose argument is a class."""
    return OrderedDict()


_MULTIARRAY = [f"numpy.{core}.multiarray" for core in ("core", "_core")]
_BUILTIN_TYPES = ("int", "float", "list", "dict", "str")
_PLACEHOLDERS: dict[str, Callable[..., object]] = {
    "argparse.Namespace": _Discarded,
    **{f"pathlib.{name}": _Discarded for name in ("Path", "PosixPath", "PurePosixPath", "_local.PosixPath")},
    **{f"datetime.{name}": _Discarded for name in ("datetime", "timedelta")},
    **{f"numpy.{name}": _Discarded for name in ("dtype", "ndarray")},
    **{f"{module}.{name}": _Discarded for module in _MULTIARRAY for name in ("scalar", "_reconstruct")},
    **{f"{module}.{name}": _Discarded for module in ("builtins", "__builtin__") for name in _BUILTIN_TYPES},
    "collections.defaultdict": _empty_mapping,
    "yacs.config.CfgNode": OrderedDict,
}
"""Replacement of each class and function that checkpoints of other programs store with their weights, for
arguments, configurations and accuracies. None of these is imported or called."""

_UNSAFE = "holds something other than tensors and plain values, which is refused, or is damaged"


class _RefusedPickleError(Exception):
    """A refused pickle, with the reason; without one, something other than tensors and plain values."""


@dataclass(frozen=True)
class _Constant:
    """A class or value that a pickle may pass as an argument, but not call."""

    name: str


@dataclass(frozen=True)
class _Storage:
    """Size in bytes of a part of the file, and of one element in it."""

    nbytes: int
    itemsize: int


class _Tensor:
    """Placeholder for a tensor."""


def read_pickle(path: str | Path) -> object:
    """Return the content of a file of `torch.save`, with tensors on the CPU.

    Raises:
        UserError: the file is missing, empty, damaged, no checkpoint, or holds anything but tensors and plain
            values; no code in it is executed.
        UnreadableFileError: an I/O error.
    """
    try:
        with open_regular(path) as file:
            magic = file.read(2)
            if not magic:
                raise UserError(str(path), "the file is empty")
            if magic == b"PK" and not zipfile.is_zipfile(file):  # the directory of a zip is at its end
                raise UserError(str(path), "damaged: not a checkpoint, or one that was cut off")
            if magic != b"PK" and magic[0] != pickle.PROTO[0]:
                raise UserError(str(path), "not a checkpoint: neither a zip, a pickle nor safetensors")
            file.seek(0)
            if magic == b"PK":
                _check_zip(file)
            else:
                _check_legacy(file)
            file.seek(0)
            replaced = [(placeholder, name) for name, placeholder in _PLACEHOLDERS.items()]
            with warnings.catch_warnings(), torch.serialization.safe_globals([*replaced]):
                warnings.simplefilter("ignore")  # of deprecated tensor types
                return torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except _RefusedPickleError as error:
        raise UserError(str(path), str(error) or _UNSAFE) from None
    except FileNotFoundError:
        raise UserError(str(path), "no such file") from None
    except pickle.UnpicklingError:
        raise UserError(str(path), _UNSAFE) from None
    except OSError as error:
        raise UnreadableFileError(str(path), error) from None
    except Exception as error:  # torch.load raises any type for a damaged file
        reason = error_reason(error)
        raise UserError(str(path), f"damaged or not a checkpoint: {reason}") from None


def _check_zip(file: BinaryIO) -> None:
    """Check a file of torch.save's zip format; other exceptions than _RefusedPickleError mean damage."""
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
        if archive.comment:
            raise _RefusedPickleError("not a checkpoint: a zip with a comment")
        # Python finds the directory from the end of the file, PyTorch from its beginning.
        ending = zipfile._EndRecData(file)  # type: ignore[attr-defined]
        if ending is None or archive.start_dir != ending[_DIRECTORY_OFFSET]:
            raise _RefusedPickleError("not a checkpoint: the directory of its zip is misplaced")
        stored = all(part.compress_type == zipfile.ZIP_STORED for part in parts)
        if not stored or sum(part.file_size for part in parts) > os.fstat(file.fileno()).st_size:
            raise _RefusedPickleError("not a checkpoint: its parts are compressed, or larger than the file")
        sizes = {part.filename: part.file_size for part in parts}
        # PyTorch ignores case and everything after a null byte: it may read another part than Python.
        has_null = any(part.orig_filename != part.filename for part in parts)
        if has_null or len({name.lower() for name in sizes}) < len(parts):
            raise _RefusedPickleError("not a checkpoint: two of its parts have the same name")
        root = parts[0].filename.split("/")[0] if parts else ""
        if sizes.get(f"{root}/data.pkl", 0) > MAX_PICKLE_BYTES:
            raise _RefusedPickleError(f"not a checkpoint: a pickle of more than {MAX_PICKLE_BYTES:,} bytes")

        def check_storage(key: str, nbytes: int) -> None:
            if nbytes > sizes.get(f"{root}/data/{key}", -1):
                raise _RefusedPickleError(f"damaged: storage {key[:40]!r} is not in the file, or shorter")

        _Inspector(io.BytesIO(archive.read(f"{root}/data.pkl")), check_storage).load()


def _check_legacy(file: BinaryIO) -> None:
    """Check a file of torch.save's older format: five pickles, then the data of the tensors."""
    remaining = os.fstat(file.fileno()).st_size
    sizes: dict[str, int] = {}

    def check_storage(key: str, nbytes: int) -> None:
        nonlocal remaining
        if key not in sizes:
            sizes[key], remaining = nbytes, remaining - nbytes
        if remaining < 0 or nbytes != sizes[key]:
            raise _RefusedPickleError(f"damaged: storage {key[:40]!r} is larger than the file")

    content = io.BytesIO(file.read(MAX_PICKLE_BYTES))
    for _ in range(5):  # magic number, version, byte order, the content, the keys of the storages
        _Inspector(content, check_storage).load()


class _Inspector(pickle._Unpickler):
    """Interpreter of a pickle with placeholders for tensors and unknown objects.

    Based on the unpickler in Python: the one in C allocates as many memo entries as the largest index in the
    file. `check_storage` raises _RefusedPickleError unless the file holds that many bytes for a storage.
    """

    stack: list[object]
    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _OPCODES
    }

    def __init__(self, file: BinaryIO, check_storage: Callable[[str, int], None]) -> None:
        super().__init__(file, encoding="bytes")
        self._check_storage = check_storage

    def load(self) -> object:
        try:
            return super().load()
        except KeyError as error:
            raise pickle.UnpicklingError(f"opcode {error}") from None

    def find_class(self, module: str, name: str) -> object:
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        full = f"{module}.{name}"
        if full in _CALLABLE:
            return _CALLABLE[full]
        if full in _PLACEHOLDERS:
            placeholder = _PLACEHOLDERS[full]
            return _ordered_dict if placeholder is OrderedDict else placeholder
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or full in _STORAGES or full in _TYPES:
            return _Constant(full)
        raise _RefusedPickleError

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage, key, _, numel, *view = pid
        itemsize = _STORAGES.get(storage.name) if isinstance(storage, _Constant) else None
        kind, key = (text.decode() if isinstance(text, bytes) else text for text in (kind, key))
        if kind != "storage" or itemsize is None or not isinstance(key, str):
            raise _RefusedPickleError
        length = _count(numel)
        self._check_storage(key, length * itemsize)
        if view and view[0] is not None:
            _, offset, length = view[0]
            if _count(offset) + _count(length) > numel:
                raise _RefusedPickleError("damaged: a part of a storage is larger than it")
        return _Storage(length * itemsize, itemsize)

    def load_setitem(self) -> None:
        _check_keys(self.stack[-2:-1])
        super().load_setitem()  # type: ignore[misc]

    def load_setitems(self) -> None:
        _check_keys(self.stack[::2])
        super().load_setitems()  # type: ignore[misc]

    def load_build(self) -> None:
        if not isinstance(self.stack[-2], OrderedDict | _Discarded):  # BUILD of a tensor sets its storage
            raise _RefusedPickleError
        super().load_build()  # type: ignore[misc]

    def load_newobj(self) -> None:
        if self.stack[-2] not in (_ordered_dict, _counter, _Discarded):
            raise _RefusedPickleError
        self.load_reduce()

    def load_reduce(self) -> None:
        is_allowed = self.stack[-2] in (*_CALLABLE.values(), _Discarded, _empty_mapping)
        if not is_allowed or not isinstance(self.stack[-1], tuple):
            raise _RefusedPickleError
        super().load_reduce()  # type: ignore[misc]

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.REDUCE[0]] = load_reduce


def _count(value: object) -> int:
    """Return an integer from 0 to 2^62 − 1; refuse any other value."""
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise _RefusedPickleError
    return value


def _size(*sizes: object) -> tuple[int, ...]:
    """Return a size or a stride; refuse any other value. Also replaces torch.Size."""
    size = sizes[0] if len(sizes) == 1 else sizes
    if not isinstance(size, tuple | list) or len(size) > MAX_DIMENSIONS:
        raise _RefusedPickleError
    return tuple(map(_count, size))


def _check_keys(keys: Iterable[object]) -> None:
    """Refuse nested keys: hashing deeply nested tuples overflows the stack of Python."""
    for key in keys:
        parts = key if isinstance(key, tuple) else (key,)
        if not all(isinstance(part, str | bytes | int | float | None) for part in parts):
            raise _RefusedPickleError


def _rebuild_tensor(storage: object, offset: object, size: object, stride: object, *rest: object) -> _Tensor:
    """Replace torch._utils._rebuild_tensor and _v2, which enlarge a storage that is too small."""
    itemsize = storage.itemsize if isinstance(storage, _Storage) else None
    return _check_tensor(storage, offset, size, stride, itemsize)


def _rebuild_tensor_v3(*arguments: object) -> _Tensor:
    storage, offset, size, stride, _, _, dtype, *_ = arguments
    name = dtype.name.removeprefix("torch.") if isinstance(dtype, _Constant) else ""
    itemsize = getattr(getattr(torch, name, None), "itemsize", None)
    return _check_tensor(storage, offset, size, stride, itemsize)


def _check_tensor(
    storage: object, offset: object, size: object, stride: object, itemsize: int | None
) -> _Tensor:
    if not isinstance(storage, _Storage) or type(itemsize) is not int:
        raise _RefusedPickleError
    shape, strides = _size(size), _size(stride)
    if len(shape) != len(strides):
        raise _RefusedPickleError
    last = _count(offset) + sum((side - 1) * step for side, step in zip(shape, strides))
    if math.prod(shape) and (last + 1) * itemsize > storage.nbytes:
        raise _RefusedPickleError(f"damaged: a tensor of shape {shape} is larger than its storage")
    return _Tensor()


def _rebuild_meta(dtype: object, size: object, stride: object, grad: object) -> _Tensor:
    _size(size)
    _size(stride)
    return _Tensor()


def _rebuild_sparse(layout: object, data: object) -> _Tensor:
    for part in data if isinstance(data, tuple) else ():
        if isinstance(part, tuple | list):
            _size(part)
        elif not isinstance(part, _Tensor | bool):
            raise _RefusedPickleError
    return _Tensor()


def _rebuild_parameter(data: object, *rest: object) -> _Tensor:
    if not isinstance(data, _Tensor):
        raise _RefusedPickleError
    return data


def _rebuild_from_type(function: object, kind: object, arguments: object, state: object) -> _Tensor:
    for rebuild in (_rebuild_tensor, _rebuild_tensor_v3, _rebuild_parameter):
        if function is rebuild and isinstance(arguments, tuple):
            return rebuild(*arguments)
    raise _RefusedPickleError


def _mapping(kind: type) -> Callable[..., object]:
    def make(*arguments: object) -> object:
        content = arguments[0] if arguments else {}
        if len(arguments) > 1 or not isinstance(content, list | dict):
            raise _RefusedPickleError
        _check_keys(content if isinstance(content, dict) else (pair[0] for pair in content))
        return kind(content)

    return make


def _encode(text: object, encoding: object) -> bytes:
    """Replace _codecs.encode, which builds bytes in protocol 2."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", b"latin1", b"latin-1"):
        raise _RefusedPickleError
    return text.encode("latin-1")


def _bytearray(content: object = b"") -> bytes:
    """Replace bytearray; an integer argument would be a length to allocate."""
    if not isinstance(content, bytes):
        raise _RefusedPickleError
    return content


def _set(values: Iterable[object] = ()) -> set[object]:
    _check_keys(values)
    return set(values)


def _complex(real: object, imaginary: object = 0) -> complex:
    if not isinstance(real, float | int) or not isinstance(imaginary, float | int):
        raise _RefusedPickleError
    return complex(real, imaginary)


def _constant(*arguments: object) -> _Constant:
    """Replace constructors of devices and layouts."""
    if not all(isinstance(argument, str | bytes | int) for argument in arguments):
        raise _RefusedPickleError
    return _Constant("value")


_TYPES = ("torch.Tensor", "torch.nn.parameter.Parameter")
_ordered_dict, _counter = _mapping(OrderedDict), _mapping(Counter)

_CALLABLE: dict[str, Callable[..., object]] = {
    "collections.OrderedDict": _ordered_dict,
    "collections.Counter": _counter,
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
"""Replacement of each function that a pickle may call."""
