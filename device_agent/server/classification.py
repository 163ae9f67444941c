"""The classification extension: the best classes of an output in place of its values. Pure functions.

Follows "Classification Extension" of Triton's protocol: an output whose parameter ``classification`` is N
is answered as ``BYTES``, for every row the N best as ``score:index`` or, where the model has names for its
classes, ``score:index:label``. Scores that are floats are written with six decimals, as Triton does.
"""

from __future__ import annotations

from typing import Any, List, Sequence

import numpy as np

from device_agent.server.fields import ProtocolError, is_size
from device_agent.tensors import object_array

_WITHOUT_ORDER = ("BOOL", "BYTES", "BF16")


def checked_count(name: str, dtype: str, value: Any) -> int:
    """How many classes the parameter of output ``name`` asks for; 0: it does not.

    Raises:
        ProtocolError: 400: no number of classes, or values of a type that has no best.
    """
    if value is None:
        return 0
    if not is_size(value):
        raise ProtocolError(400, f"output '{name}': classification is not a number of classes")
    if value and dtype in _WITHOUT_ORDER:
        raise ProtocolError(400, f"output '{name}' is {dtype}, which classification cannot order")
    return int(value)


def classify(
    array: np.ndarray[Any, Any], count: int, labels: Sequence[str], batched: bool
) -> np.ndarray[Any, Any]:
    """The best classes, best first; of equal ones that with the lower index.

    Args:
        array: scores; all axes but the batch are one list of classes.
        count: how many are wanted; there are never more than the list has.
        labels: names by index; a class beyond them has none.
        batched: whether the first axis is the batch.

    Returns:
        ``BYTES`` elements of shape (rows, classes), or (classes,) without a batch.
    """
    rows = array.shape[0] if batched else 1
    scores = array.reshape(rows, -1) if array.size else array.reshape(rows, 0)
    best = _descending(scores)[:, :count]
    texts: List[bytes] = []
    for row, indices in zip(scores, best):
        texts.extend(_text(row[index].item(), int(index), labels) for index in indices)
    shape = best.shape if batched else best.shape[1:]
    return object_array(texts, shape)


def _descending(scores: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    # Both reverse the order without overflow: a bitwise complement for integers, the sign for floats.
    keys = ~scores if scores.dtype.kind in "iu" else -scores
    return np.argsort(keys, axis=1, kind="stable")


def _text(score: Any, index: int, labels: Sequence[str]) -> bytes:
    value = f"{score:f}" if isinstance(score, float) else str(score)
    label = f":{labels[index]}" if index < len(labels) else ""
    return f"{value}:{index}{label}".encode()
