"""``.jsonl`` files: a ``text``, an ``image`` (a path beside the file) or both, and maybe a ``label``."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from host_trainer.config import Config
from host_trainer.data import Sample, shuffled
from host_trainer.data.images import pixels, read
from host_trainer.errors import ConfigError

Encode = Callable[[str], dict[str, np.ndarray[Any, Any]]]
MAX_TOKENIZER_BYTES = 64 << 20


@dataclass(frozen=True)
class Records:
    """The lines of a file; each is parsed when it is asked for."""

    path: Path
    offsets: np.ndarray[Any, Any]
    config: Config
    training: bool
    encode: Encode | None

    @classmethod
    def open(cls, path: Path, config: Config, training: bool) -> Records:
        """Find the lines.

        Raises:
            ConfigError: the file does not exist, or there is no tokenizer for its texts.
        """
        offsets, position = [], 0
        try:
            with path.open("rb") as stream:
                for line in stream:
                    if line.strip():
                        offsets.append(position)
                    position += len(line)
        except OSError as error:
            raise ConfigError(f"the data {path} cannot be read", str(error), "check the path") from error
        records = cls(path, np.array(offsets, np.int64), config, training, None)
        has_text = len(records) and "text" in records._record(0)
        return cls(path, records.offsets, config, training, text_encoder(config) if has_text else None)

    def __len__(self) -> int:
        return len(self.offsets)

    def order(self, seed: int, epoch: int) -> np.ndarray[Any, Any]:
        """Any sample may come next."""
        return shuffled(len(self), seed, epoch)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        record, where = self._record(index), f"{self.path}, record {index + 1}"
        sample: dict[str, Any] = {}
        if "image" in record:
            generator = np.random.default_rng((self.config.seed, epoch, index)) if self.training else None
            file = self.path.parent / str(record["image"])
            sample["pixel_values"] = pixels(read(file, where), self.config.data, generator)
        if self.encode is not None:
            sample.update(self.encode(text_of(record, where)))
        if not sample:
            raise ConfigError(
                f"{where} holds nothing to compute from", "it has no text and no image", "add one of them"
            )
        if "label" in record:
            sample["labels"] = label_of(record, where)
        return sample

    def _record(self, index: int) -> dict[str, Any]:
        with self.path.open("rb") as stream:
            stream.seek(int(self.offsets[index]))
            try:
                record = json.loads(stream.readline())
            except ValueError as error:
                raise ConfigError(
                    f"{self.path}, record {index + 1} is not JSON", str(error), "write one object a line"
                ) from error
        return record if isinstance(record, dict) else {}


def text_encoder(config: Config) -> Encode:
    """Turns a text into ``input_ids`` and ``attention_mask``, int64 [tokens], cut to ``data.max_length``.

    Raises:
        ConfigError: there is no ``tokenizer.json``.
    """
    from tokenizers import Tokenizer

    path = Path(config.data.tokenizer or Path(config.model.source) / "tokenizer.json")
    try:
        if path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise ConfigError(f"{path} is too large", f"over {MAX_TOKENIZER_BYTES} bytes", "give a tokenizer")
        tokenizer = Tokenizer.from_file(str(path))
    except ConfigError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ConfigError(
            f"the data holds texts, and {path} cannot be read", str(error), "set data.tokenizer"
        ) from error
    tokenizer.no_padding()
    tokenizer.enable_truncation(config.data.max_length)

    def encode(text: str) -> dict[str, np.ndarray[Any, Any]]:
        ids = np.array(tokenizer.encode(text).ids, np.int64)
        return {"input_ids": ids, "attention_mask": np.ones_like(ids)}

    return encode


def text_of(record: dict[str, Any], where: str) -> str:
    """The record's text; raises ConfigError where there is none."""
    if not isinstance(record.get("text"), str):
        raise ConfigError(f"{where} has no text", "the first record has one", "add the text")
    return str(record["text"])


def label_of(record: dict[str, Any], where: str) -> np.ndarray[Any, Any]:
    """The record's label, a class's number or a value to predict; raises ConfigError for anything else."""
    label = record["label"]
    if isinstance(label, bool) or not isinstance(label, int | float):
        raise ConfigError(
            f"{where} has a label that is no number", json.dumps(label)[:40], "number the classes from 0"
        )
    return np.asarray(label, np.int64 if isinstance(label, int) else np.float32)
