from __future__ import annotations

from typing import List

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_agent.server.classification import checked_count, classify
from device_agent.server.fields import ProtocolError


def test_the_best_classes_are_written_as_triton_writes_them() -> None:
    """``score:index:label`` for every row, best first, scores of floats with six decimals."""
    scores = np.array([[0.1, 0.7, 0.2], [3.0, -1.0, 2.5]], np.float32)
    answer = classify(scores, 2, ["cat", "dog"], batched=True)
    assert answer.tolist() == [[b"0.700000:1:dog", b"0.200000:2"], [b"3.000000:0:cat", b"2.500000:2"]]


def test_without_a_batch_all_axes_are_one_list() -> None:
    """A model with max_batch_size 0 answers with one list, never longer than its classes."""
    answer = classify(np.array([[1], [5], [3]], np.int64), 10, [], batched=False)
    assert answer.tolist() == [b"5:1", b"3:2", b"1:0"]


@given(st.lists(st.integers(0, 255), min_size=1, max_size=20), st.integers(1, 25))
def test_the_order_is_by_score_then_by_index(values: List[int], count: int) -> None:
    """Also where a sign would overflow: unsigned scores, and equal ones."""
    expected = sorted(range(len(values)), key=lambda index: (-values[index], index))[:count]
    for dtype in (np.uint8, np.float64, np.float16):
        answer = classify(np.array([values], dtype), count, [], batched=True)
        assert [int(text.split(b":")[1]) for text in answer[0]] == expected


@pytest.mark.parametrize(("dtype", "value"), [("FP32", "3"), ("FP32", -1), ("FP32", True), ("BYTES", 2)])
def test_what_has_no_best_is_refused(dtype: str, value: object) -> None:
    """A count that is none, and values without an order, are a 400."""
    with pytest.raises(ProtocolError, match="classification") as refusal:
        checked_count("y", dtype, value)
    assert refusal.value.status == 400
