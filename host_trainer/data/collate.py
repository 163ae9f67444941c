"""Samples become a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from host_trainer.errors import ConfigError

#: What fills the end of a shorter sequence; torch's losses leave -100 out.
_FILL = {"labels": -100}
#: Lengths are multiples of it, which tensor cores want.
_MULTIPLE = 8


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Stack the arrays of each name; sequences of several lengths are filled up to the longest.

    ``attention_mask`` is 0 where ``input_ids`` was filled.

    Raises:
        ConfigError: a sample lacks what another has.
    """
    lacking = {name for sample in samples for name in sample.keys() ^ samples[0].keys()}
    if lacking:
        raise ConfigError(
            f"a sample has no '{min(lacking)}'",
            "another of its batch has it",
            "give each sample the same",
        )
    return {name: _stack(name, [np.asarray(sample[name]) for sample in samples]) for name in samples[0]}


def _stack(name: str, arrays: list[np.ndarray[Any, Any]]) -> Tensor:
    if arrays[0].ndim == 1 and arrays[0].dtype.kind in "iu":
        longest = -(-max(len(array) for array in arrays) // _MULTIPLE) * _MULTIPLE
        fill = _FILL.get(name, 0)
        arrays = [np.pad(array, (0, longest - len(array)), constant_values=fill) for array in arrays]
    return torch.from_numpy(np.stack(arrays))
