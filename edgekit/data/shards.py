"""WebDataset shards: tar files whose members ``KEY.png``, ``KEY.cls``... make a sample together.

Read with the standard library: the webdataset package would run a shell for an address that begins with
``pipe:``, and unpickle members. Layout: https://github.com/webdataset/webdataset, "The WebDataset Format".
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.artifact import file_digest
from edgekit.data import Label, Source
from edgekit.data.digests import source_digest
from edgekit.data.images import SUFFIXES, image_inputs, image_preprocess, open_image
from edgekit.data.texts import text_and_label, text_inputs, text_preprocess
from edgekit.errors import BadInput
from edgekit.preprocess import Preprocess
from edgekit.tensors import Arrays
from host_trainer.errors import TrainingError
from host_trainer.shards import index as shards

MAX_MEMBER_BYTES = 256 << 20


def open_source(spec: str, preprocess: Preprocess | None, names: Sequence[str] | None) -> Source:
    """Find the shards; they are read one after the other, as they stand.

    Raises:
        BadInput: a shard is missing.
    """
    paths = expand(spec)
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise BadInput(
            f"the shard {missing[0]} does not exist",
            f"{spec} names {len(paths)} file{'s' if len(paths) > 1 else ''}; {len(missing)} missing",
            "check the path and the range in braces",
        )
    return Source(
        read=partial(_read, paths, preprocess, names),
        count=None,
        digest=source_digest([file_digest(path) for path in paths], preprocess, None),
    )


def expand(spec: str) -> list[Path]:
    """Expand ``{000..009}`` as the trainer does.

    Raises:
        BadInput: a range is empty or absurdly long.
    """
    try:
        return shards.expand(spec)
    except TrainingError as error:
        raise BadInput(error.what, error.why, error.fix) from error


def _read(
    paths: list[Path], preprocess: Preprocess | None, names: Sequence[str] | None
) -> Iterator[tuple[str, Arrays, Label | None]]:
    for path in paths:
        for key, members in groupby(_members(path), key=lambda member: member[0]):
            where = f"{path}, sample {key}"
            parts = {extension: content for _, extension, content in members}
            inputs, label = _sample(parts, where, preprocess, names)
            yield where, inputs, label


def _members(path: Path) -> Iterator[tuple[str, str, bytes]]:
    """(key, extension, content) of the files in a shard; the key ends at the first dot of the name."""
    try:
        with tarfile.open(path, "r|") as archive:
            for member in archive:
                name = shards.split_name(member.name)
                if not member.isfile() or name is None:
                    continue
                if member.size > MAX_MEMBER_BYTES:
                    raise BadInput(
                        f"{path}: '{member.name}' is too large",
                        f"{member.size} bytes; the limit is {MAX_MEMBER_BYTES}",
                        "split it into several samples",
                    )
                stream = archive.extractfile(member)
                content = stream.read() if stream is not None else b""
                yield *name, content
    except (tarfile.TarError, OSError, EOFError) as error:
        raise BadInput(f"the shard {path} is damaged", str(error), "copy or download it again") from error


def _sample(
    parts: dict[str, bytes], where: str, preprocess: Preprocess | None, names: Sequence[str] | None
) -> tuple[Arrays, Label | None]:
    """Inputs from ``NAME.npy`` members, an image or a text; the label from ``cls`` or the JSON record."""
    record = _record(parts, where)
    label = _class(parts["cls"], where) if "cls" in parts else record.get("label")
    arrays = {name[: -len(".npy")]: _array(parts[name], where) for name in parts if name.endswith(".npy")}
    image = next((name for name in parts if f".{name.lower()}" in SUFFIXES), None)
    if arrays:
        return arrays, label
    if image is not None:
        description = image_preprocess(where, preprocess)
        return image_inputs(description, open_image(io.BytesIO(parts[image]), where), names), label
    if "txt" in parts:
        record = {**record, "text": parts["txt"].decode("utf-8", "replace")}
    if "text" not in record:
        raise BadInput(
            f"{where} holds nothing to compute from",
            f"its members are {', '.join(sorted(parts)) or 'none'}",
            "a sample has an image, a txt, a json with 'text', or one NAME.npy for each input",
        )
    text, record_label = text_and_label(record, where)
    return text_inputs(
        text_preprocess(where, preprocess), text, names
    ), record_label if label is None else label


def _record(parts: dict[str, bytes], where: str) -> dict[str, Any]:
    if "json" not in parts:
        return {}
    try:
        record = json.loads(parts["json"])
    except ValueError as error:
        raise BadInput(f"{where}: its json is damaged", str(error), "write the shard again") from error
    return record if isinstance(record, dict) else {}


def _class(content: bytes, where: str) -> int:
    try:
        return int(content)
    except ValueError as error:
        raise BadInput(
            f"{where}: its cls is no number",
            repr(content[:40]),
            "number the classes as the model does, from 0",
        ) from error


def _array(content: bytes, where: str) -> np.ndarray[Any, Any]:
    try:
        array = np.load(io.BytesIO(content), allow_pickle=False)
    except Exception as error:  # NumPy's header parser raises a dozen types
        reason = f"{type(error).__name__}: {error}"
        raise BadInput(f"{where}: an npy is damaged", reason, "write the shard again") from error
    return np.asarray(array)
