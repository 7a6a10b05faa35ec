"""The index of a tar archive: the offsets of its files, without unpacking."""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from data.image_files import SkippedFiles
from data.index import Index
from data.sources.archive import Member, safe_name
from data.workers import init_worker, limit_workers
from vil.errors import UserError, error_reason
from vil.runtime.files import open_regular

_BLOCK_BYTES = 512
_MAX_LINKS = 40
T = TypeVar("T")


def read_index(path: Path, index: int, skipped: SkippedFiles) -> list[Member]:
    """List the files of an uncompressed tar in archive order; a name that was appended again occurs again.

    Hard links and symbolic links to files in the archive count as files, as after unpacking. Links to other
    targets, and files whose names lead out of the archive, are skipped. `index` is that of the archive.

    Raises:
        UserError: the archive cannot be read, is damaged, truncated, or followed by further content.
    """
    members: list[Member] = []
    files: dict[str, Member] = {}
    links: dict[str, str] = {}
    try:
        # Mode "r:" rejects compressed archives, whose members have no offset in the file.
        with open_regular(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            while (info := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # tarfile would keep all of them
                name = safe_name(info.name)
                if info.isdir():
                    continue
                if info.sparse is not None:
                    raise ValueError(f"{info.name} is a sparse file, which is not supported")
                if name is None:
                    skipped.add(info.name)
                    continue
                if info.isreg():
                    files[name] = Member(index, info.offset_data, info.size, name)
                    members.append(files[name])
                elif info.islnk() and (original := files.get(safe_name(info.linkname) or "")) is not None:
                    files[name] = original._replace(name=name)
                    members.append(files[name])
                elif info.issym():
                    folder = posixpath.dirname(name)
                    links[name] = posixpath.normpath(posixpath.join(folder, info.linkname))
                else:
                    skipped.add(name)
            _check_end(path, archive.offset)
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        reason = f"cannot be read as an uncompressed tar: {error_reason(error)}"
        raise UserError("data.root", f"{path}: {reason}") from None
    for name, target in links.items():
        for _ in range(_MAX_LINKS):
            target = links.get(target, target) if target not in files else target
        if target in files:
            members.append(files[target]._replace(name=name))
        else:
            skipped.add(name)
    return members


def _check_end(path: Path, offset: int) -> None:
    """Raise ValueError unless the archive ends at `offset` with a block of zeros, followed by zeros alone.

    tarfile stops without an error at a damaged header, and at the end of the first of several archives.
    """
    with open_regular(path) as file:
        file.seek(offset)
        position = offset
        while content := file.read(1 << 20):
            if content.strip(b"\0"):
                position += len(content) - len(content.lstrip(b"\0"))
                if position < offset + _BLOCK_BYTES:
                    raise ValueError(f"damaged: no file header at byte {offset:,}")
                reason = "is followed by further content, as of archives joined by cat"
                raise ValueError(f"its end mark at byte {offset:,} {reason}")
            position += len(content)
    if position < offset + _BLOCK_BYTES:
        raise ValueError(f"truncated: it ends at byte {position:,} without an end mark")


def skipped_files(archives: Sequence[Path]) -> SkippedFiles:
    """Return a counter of skipped files named after the archive, or after the folder of several."""
    return SkippedFiles(archives[0] if len(archives) == 1 else archives[0].parent)


def log_skipped_files(archives: Sequence[Path], index: Index) -> None:
    """Log one line with the number of files in the archives that were skipped, if there are any."""
    count, example = index.skipped
    replace(skipped_files(archives), first=example, count=count).log()


def archives_if_present(find: Callable[[Path, str], list[Path]], root: Path, split: str) -> list[Path]:
    """Return the archives of a split, or none if `find` raises UserError."""
    try:
        return find(root, split)
    except UserError:
        return []


def map_archives(function: Callable[[Path, int], T], archives: Sequence[Path], workers: int) -> Iterator[T]:
    """Yield `function(path, index)` of each archive, in order, computed by several processes at once.

    Raises:
        UserError: as `function`; or a process was killed.
    """
    workers = min(limit_workers(workers), len(archives))
    if workers < 2:
        yield from map(function, archives, range(len(archives)))
        return
    pool = ProcessPoolExecutor(workers, initializer=init_worker, initargs=(0,))
    try:
        yield from pool.map(function, archives, range(len(archives)))
    except BrokenProcessPool:
        reason = "a process that indexes archives was killed; fewer need less memory"
        raise UserError("data.workers", reason) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


_cache: dict[tuple[object, ...], Any] = {}


def cached_by_archives(kind: str, archives: Sequence[Path], compute: Callable[[], T], *options: str) -> T:
    """Return `compute()`, once per version of the archives.

    Indexing a million images takes a minute, and both splits need the classes of training.
    """
    stats = [(str(path), path.stat()) for path in archives]
    key = (kind, *options, *((path, stat.st_size, stat.st_mtime_ns) for path, stat in stats))
    if key not in _cache:
        _cache[key] = compute()
    return _cache[key]
