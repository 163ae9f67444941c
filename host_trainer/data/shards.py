"""WebDataset shards, decoded: an image, a text or both, and a label from ``cls`` or the JSON record."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from host_trainer.config import Config
from host_trainer.data import Sample
from host_trainer.data.images import SUFFIXES, pixels, read
from host_trainer.data.records import Encode, label_of, text_encoder, text_of
from host_trainer.errors import ConfigError
from host_trainer.shards.reader import ShardDataset


class Shards:
    """Samples of ``path-{000..009}.tar``, read one by one from where they lie."""

    def __init__(self, spec: str, config: Config, training: bool) -> None:
        """Find the shards.

        Raises:
            TrainingError: one is missing, empty or damaged.
        """
        self._raw = ShardDataset(spec)
        self._config = config
        self._training = training
        first = self._raw[0].parts
        has_text = "txt" in first or "text" in _record(first, spec)
        self._encode: Encode | None = text_encoder(config) if has_text else None

    def __len__(self) -> int:
        return len(self._raw)

    def order(self, seed: int, epoch: int) -> np.ndarray[Any, Any]:
        """Neighbours in a shard stay near each other, so that the disk reads ahead."""
        return self._raw.order(seed, epoch)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        where, parts = self._raw[index]
        record = _record(parts, where)
        sample: dict[str, Any] = {}
        image = next((name for name in parts if f".{name.lower()}" in SUFFIXES), None)
        if image is not None:
            generator = np.random.default_rng((self._config.seed, epoch, index)) if self._training else None
            sample["pixel_values"] = pixels(
                read(io.BytesIO(parts[image]), where), self._config.data, generator
            )
        if self._encode is not None:
            if "txt" in parts:
                record = {**record, "text": parts["txt"].decode("utf-8", "replace")}
            sample.update(self._encode(text_of(record, where)))
        if not sample:
            raise ConfigError(
                f"{where} holds nothing to compute from",
                f"its members are {', '.join(sorted(parts))}",
                "a sample has an image, a txt, or a json with 'text'",
            )
        if "cls" in parts:
            record = {**record, "label": _class(parts["cls"], where)}
        if "label" in record:
            sample["labels"] = label_of(record, where)
        return sample


def _record(parts: Mapping[str, bytes], where: str) -> dict[str, Any]:
    try:
        record = json.loads(parts.get("json", b"{}"))
    except ValueError as error:
        raise ConfigError(f"{where}: its json is damaged", str(error), "write the shard again") from error
    return record if isinstance(record, dict) else {}


def _class(content: bytes, where: str) -> int:
    try:
        return int(content)
    except ValueError as error:
        raise ConfigError(
            f"{where}: its cls is no number", repr(content[:40]), "number the classes from 0"
        ) from error
