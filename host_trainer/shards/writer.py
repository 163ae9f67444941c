"""Writing shards: a folder of images or a ``.jsonl`` file into tar files of about one size.

The samples are mixed once, so that each shard holds some of everything; members carry no times or owners, so
that the same data and seed give the same bytes.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from host_trainer.errors import TrainingError
from host_trainer.shards import index

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
)
SUMMARY_FILE = "shards.json"
Parts = dict[str, bytes]


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        spec: names the shards, as ``data.train`` takes it.
        shards: number of tar files.
        samples: in all of them.
        size_bytes: of all of them.
        classes: names of the classes by label, where the data was a folder of images.
        seed: of the order.
    """

    spec: str
    shards: int
    samples: int
    size_bytes: int
    classes: tuple[str, ...]
    seed: int


def write(data: Path, out: Path, shard_bytes: int, seed: int = 0) -> Written:
    """Write shards of at least one sample and about ``shard_bytes``, their indices and ``shards.json``.

    Args:
        data: a directory with one folder of images a class, or a ``.jsonl`` file, one object a line; an
            ``image`` in it is a path relative to the file, and the image goes into the sample.
        out: a directory that does not exist yet; it appears when everything is written.
        shard_bytes: a shard ends with the sample that reaches it.
        seed: decides the order of the samples.

    Raises:
        TrainingError: the data is not of these kinds, empty or damaged, ``out`` exists, or the disk is full.
    """
    if out.exists():
        raise TrainingError(f"{out} exists", "shards are never mixed with what is there", "name a new one")
    source = _Folder(data) if data.is_dir() else _Lines(data)
    if not len(source):
        raise TrainingError(f"{data} holds no sample", "there is nothing to write", "check the path")
    order = np.random.default_rng(seed).permutation(len(source))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
            staged = Path(temporary) / "shards"
            staged.mkdir()
            shards = _write_all(source, [int(n) for n in order], staged, shard_bytes)
            last = len(shards) - 1
            spec = out / (f"shard-{{{0:06d}..{last:06d}}}.tar" if last else "shard-000000.tar")
            written = Written(
                str(spec), len(shards), len(source),
                sum(shard.path.stat().st_size for shard in shards), source.classes, seed,
            )  # fmt: skip
            (staged / SUMMARY_FILE).write_text(json.dumps(asdict(written), indent=1) + "\n", encoding="utf-8")
            shutil.move(staged, out)
    except OSError as error:
        raise TrainingError(
            f"shards cannot be written to {out}", str(error), "free space or name another place"
        ) from error
    return written


def _write_all(
    source: _Folder | _Lines, order: Sequence[int], directory: Path, shard_bytes: int
) -> list[index.Shard]:
    shards: list[index.Shard] = []
    samples = iter(enumerate(order))
    item = next(samples, None)
    while item is not None:
        path = directory / f"shard-{len(shards):06d}.tar"
        starts = [0]
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
            while item is not None and starts[-1] < shard_bytes:
                for extension, content in source.parts(item[1]).items():
                    member = tarfile.TarInfo(f"{item[0]:09d}.{extension}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
                starts.append(archive.offset)
                item = next(samples, None)
        shards.append(index.Shard(path, np.asarray(starts, np.int64)))
        index.save(shards[-1])
    return shards


class _Folder:
    """Images in class folders: the bytes as they are, the label from the folder's place in sorted order."""

    def __init__(self, root: Path) -> None:
        folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        self.classes = tuple(folder.name for folder in folders)
        self._entries = [
            (path, label)
            for label, folder in enumerate(folders)
            for path in sorted(folder.rglob("*"))
            if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
        ]

    def __len__(self) -> int:
        return len(self._entries)

    def parts(self, position: int) -> Parts:
        path, label = self._entries[position]
        return {path.suffix[1:].lower(): path.read_bytes(), "cls": str(label).encode()}


class _Lines:
    """A ``.jsonl`` file: each object as it is; ``image`` is a file beside it, and goes along."""

    classes: tuple[str, ...] = ()

    def __init__(self, path: Path) -> None:
        if path.suffix != ".jsonl" or not path.is_file():
            raise TrainingError(
                f"{path} is no data to write shards from",
                "it is neither a directory of images nor a .jsonl file",
                "give one of these",
            )
        self._path = path
        self._offsets = list(_line_offsets(path))

    def __len__(self) -> int:
        return len(self._offsets)

    def parts(self, position: int) -> Parts:
        number, offset = self._offsets[position]
        with self._path.open("rb") as stream:
            stream.seek(offset)
            line = stream.readline()
        record = self._record(line, number)
        parts = {"json": json.dumps(record, ensure_ascii=False).encode()}
        if "image" in record:
            image = self._image(record["image"], number)
            parts[image.suffix[1:].lower()] = image.read_bytes()
        return parts

    def _record(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise self._wrong(number, str(error)) from error
        if not isinstance(record, dict):
            raise self._wrong(number, "it is no object")
        return record

    def _image(self, name: Any, number: int) -> Path:
        path = self._path.parent / str(name)
        if path.suffix.lower() not in IMAGE_SUFFIXES or not path.is_file():
            raise self._wrong(number, f"its image '{name}' is no image file beside {self._path.name}")
        return path

    def _wrong(self, number: int, why: str) -> TrainingError:
        return TrainingError(f"{self._path}, line {number} is no sample", why, "write one JSON object a line")


def _line_offsets(path: Path) -> Iterator[tuple[int, int]]:
    position = 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield number, position
            position += len(line)
