"""``.jsonl`` files: one JSON object a line, with ``text`` and maybe ``label``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from edgekit import preprocess as preprocessing
from edgekit.artifact import file_digest
from edgekit.data import Label, Source
from edgekit.data.digests import order, source_digest
from edgekit.errors import BadInput
from edgekit.preprocess import Preprocess, TextPreprocess
from edgekit.tensors import Arrays


def open_source(path: Path, preprocess: Preprocess | None, names: Sequence[str] | None, seed: int) -> Source:
    """Find where the lines begin; they are parsed as they are read.

    Raises:
        BadInput: the model takes no text.
    """
    description = text_preprocess(str(path), preprocess)
    offsets = _line_offsets(path)
    return Source(
        read=partial(_read, path, offsets, order(len(offsets), seed), description, names),
        count=len(offsets),
        digest=source_digest(file_digest(path), preprocess, seed),
    )


def text_preprocess(what: str, preprocess: Preprocess | None) -> TextPreprocess:
    """The preprocessing, if it is for texts; raises BadInput otherwise."""
    if not isinstance(preprocess, TextPreprocess):
        raise BadInput(
            f"the data {what} holds texts, but nothing says how they become inputs",
            "the model's directory has no tokenizer.json, and the recipe describes no text preprocessing",
            "add preprocessing with kind = 'text' to the recipe, or give tokenized data as .npz",
        )
    return preprocess


def text_and_label(record: Any, where: str) -> tuple[str, Label | None]:
    """The text and the label of a record.

    Raises:
        BadInput: it has no text, or its label is no number.
    """
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise BadInput(f"{where} has no text", "a record is an object with a string 'text'", "add the text")
    label = record.get("label")
    if label is not None and (isinstance(label, bool) or not isinstance(label, int | float)):
        raise BadInput(
            f"{where} has a label that is no number",
            f"'label' is {json.dumps(label)[:40]}",
            "number the classes as the model does, from 0",
        )
    return record["text"], label


def text_inputs(preprocess: TextPreprocess, text: str, names: Sequence[str] | None) -> Arrays:
    """Inputs for a text; all that the tokenizer gives where the model's names are not known."""
    if names is None:
        return preprocessing.encode_text(preprocess, text)
    return preprocessing.apply(preprocess, text, names)


def _line_offsets(path: Path) -> list[tuple[int, int]]:
    """(line number from 1, offset in bytes) of every line that is not blank."""
    offsets, position = [], 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                offsets.append((number, position))
            position += len(line)
    return offsets


def _read(
    path: Path,
    offsets: list[tuple[int, int]],
    indices: list[int],
    preprocess: TextPreprocess,
    names: Sequence[str] | None,
) -> Iterator[tuple[str, Arrays, Label | None]]:
    with path.open("rb") as stream:
        for index in indices:
            number, offset = offsets[index]
            where = f"{path}, line {number}"
            stream.seek(offset)
            try:
                record = json.loads(stream.readline())
            except ValueError as error:
                raise BadInput(f"{where} is not JSON", str(error), "write one JSON object a line") from error
            text, label = text_and_label(record, where)
            yield where, text_inputs(preprocess, text, names), label
