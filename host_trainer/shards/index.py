"""Where each sample of a shard begins.

The writer leaves the places beside a shard (``NAME.tar`` and ``NAME.idx``); other shards are looked through
once, header by header, without reading what they hold.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from host_trainer.errors import TrainingError

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
MAX_SHARDS = 100_000
MAX_SAMPLE_BYTES = 1 << 30


@dataclass(frozen=True)
class Shard:
    """A tar file and the places of its samples.

    Attributes:
        path: the tar file.
        starts: int64 of shape (samples + 1,): sample i is the bytes ``starts[i]`` to ``starts[i + 1]``.
    """

    path: Path
    starts: np.ndarray[Any, Any]

    @property
    def count(self) -> int:
        """Number of samples."""
        return len(self.starts) - 1


def find(spec: str) -> list[Shard]:
    """The shards that ``path-{000..009}.tar`` names, in that order.

    Raises:
        TrainingError: one is missing, empty, damaged or compressed, or its index belongs to another file.
    """
    paths = expand(spec)
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise TrainingError(
            f"the shard {missing[0]} does not exist",
            f"{spec} names {len(paths)} file{'s' if len(paths) > 1 else ''}; {len(missing)} missing",
            "check the path and the range in braces",
        )
    return [_shard(path) for path in paths]


def expand(spec: str) -> list[Path]:
    """Expand ``{000..009}``, leading zeros kept; several ranges give every combination.

    Raises:
        TrainingError: a range is empty or absurdly long.
    """
    match = _RANGE.search(spec)
    if match is None:
        return [Path(spec)]
    first, last = match.groups()
    if not 0 <= int(last) - int(first) < MAX_SHARDS:
        raise TrainingError(
            f"the range {match[0]} cannot be expanded",
            f"its end is below its start, or it names more than {MAX_SHARDS} shards",
            "such as {000..009}",
        )
    texts = (f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1))
    return [path for text in texts for path in expand(spec[: match.start()] + text + spec[match.end() :])]


def split_name(name: str) -> tuple[str, str] | None:
    """Key and extension of a member: the key ends at the name's first dot; None for hidden files."""
    path = PurePosixPath(name)
    if path.name.startswith("."):
        return None
    stem, _, extension = path.name.partition(".")
    return str(path.parent / stem), extension


def index_path(shard: Path) -> Path:
    """Where the index of a shard lies."""
    return shard.with_suffix(".idx")


def save(shard: Shard) -> None:
    """Write the index beside the shard."""
    with index_path(shard.path).open("wb") as stream:
        np.save(stream, shard.starts, allow_pickle=False)


def archive_bytes(content_bytes: int) -> int:
    """Size of a tar file: what it holds and two blocks of zeros, filled up to a record (POSIX ustar)."""
    return -(-(content_bytes + 2 * tarfile.BLOCKSIZE) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def _shard(path: Path) -> Shard:
    starts = _load(path) if index_path(path).is_file() else _scan(path)
    sizes = np.diff(starts)
    if not len(sizes):
        raise TrainingError(f"the shard {path} is empty", "no member of it is a sample's", "leave it out")
    if sizes.max() > MAX_SAMPLE_BYTES:
        raise TrainingError(
            f"{path}: a sample is too large",
            f"{sizes.max()} bytes; the limit is {MAX_SAMPLE_BYTES}",
            "split it into several samples",
        )
    return Shard(path, starts)


def _load(path: Path) -> np.ndarray[Any, Any]:
    where = index_path(path)
    try:
        # Mapped, so that a header cannot ask for more memory than the file has bytes.
        starts = np.array(np.lib.format.open_memmap(where, mode="r"))
    except (OSError, ValueError, EOFError) as error:
        raise TrainingError(f"the index {where} is damaged", str(error), f"delete {where}") from error
    fits = (
        starts.dtype == np.int64
        and starts.ndim == 1
        and len(starts) > 0
        and bool((np.diff(starts) > 0).all())
        and starts[0] >= 0
        and archive_bytes(int(starts[-1])) == path.stat().st_size
    )
    if not fits:
        raise TrainingError(
            f"the index {where} does not belong to {path}",
            "the shard is not the one that it was written with",
            f"delete {where}: the shard is looked through then",
        )
    return np.asarray(starts)


def _scan(path: Path) -> np.ndarray[Any, Any]:
    try:
        with tarfile.open(path, "r:") as archive:
            starts = list(_starts(archive))
        with path.open("rb") as stream:
            stream.seek(archive.offset)
            block = stream.read(tarfile.BLOCKSIZE)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise TrainingError(
            f"the shard {path} cannot be read", str(error), "copy it again; if it is compressed, unpack it"
        ) from error
    if block != bytes(tarfile.BLOCKSIZE):  # tarfile takes a damaged header for the end
        raise TrainingError(
            f"the shard {path} is damaged at byte {archive.offset}",
            "there is neither a file nor the zeros that end a tar file",
            "copy it again",
        )
    return np.asarray([*starts, archive.offset] if starts else [0], np.int64)


def _starts(archive: tarfile.TarFile) -> Iterator[int]:
    previous = None
    for member in archive:
        archive.members = []  # type: ignore[attr-defined]  # else it keeps every header
        named = split_name(member.name)
        if not member.isfile() or named is None:
            continue
        if named[0] != previous:
            previous = named[0]
            yield member.offset
