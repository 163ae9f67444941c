"""JSON from outside is read as Python reads it, and cannot end the process by its depth."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_agent import json_text

_SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text('[]{}"\\a\u20ac')
)
_VALUES = st.recursive(
    _SCALARS, lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text('[{"\\}]'), inner))
)

# The collector runs at every allocation and each time calls something that needs a few frames.
_COLLECTOR_NEAR_THE_LIMIT = """
import gc
from device_agent import json_text

def recurse(frames):
    return frames and recurse(frames - 1)

gc.callbacks.append(lambda phase, info: recurse(4))
gc.set_threshold(3)
for opening in (b"[", b'{"a":'):
    try:
        json_text.loads(opening * 100000)
    except ValueError as error:
        print(error)
"""


@given(_VALUES)
def test_what_is_not_deep_is_read_as_json(value: object) -> None:
    """Every value comes back, with brackets and quotes in its strings too."""
    assert json_text.loads(json.dumps(value).encode()) == value


@pytest.mark.parametrize("rows", [1, 1000])
def test_the_bound_is_on_depth_not_on_length(rows: int) -> None:
    """A thousand rows pass at a depth at which one row passes, and are refused where one is."""

    def document(depth: int) -> bytes:
        row = b"[" * (depth - 2) + b"]" * (depth - 2)
        return b'{"a]}":[' + b",".join([row] * rows) + b"]}"

    assert len(json_text.loads(document(json_text.MAX_DEPTH))["a]}"]) == rows
    with pytest.raises(ValueError, match="64 deep"):
        json_text.loads(document(json_text.MAX_DEPTH + 1))


@given(st.integers(0, 300), st.sampled_from([b"[", b'{"a":', b"]", b"}", b'"', b"\\", b"[]"]), st.binary())
def test_what_is_no_json_is_a_value_error(count: int, piece: bytes, rest: bytes) -> None:
    """No broken document raises anything else."""
    try:
        json_text.loads(piece * count + rest)
    except ValueError:
        return
    json.loads((piece * count + rest).decode())


def test_depth_does_not_end_the_process() -> None:
    """A document that is nested without end is an error, whatever the collector does at that moment.

    Python 3.8 ended with "Cannot recover from stack overflow" here.
    """
    done = subprocess.run([sys.executable, "-c", _COLLECTOR_NEAR_THE_LIMIT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == ["it is nested more than 64 deep"] * 2


@pytest.mark.parametrize("python_has_a_bound", [True, False])
def test_long_numbers_are_refused(python_has_a_bound: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no client keeps the agent busy with one; a Python without the bound has it all the same."""
    if not hasattr(sys, "set_int_max_str_digits") and python_has_a_bound:
        pytest.skip("this Python has none")
    monkeypatch.setattr(json_text, "_PYTHON_BOUNDS_DIGITS", python_has_a_bound)
    longest = b"1" * json_text.MAX_DIGITS
    assert json_text.loads(b"[" + longest + b', 0.25, "' + 3 * longest + b'"]')[1] == 0.25
    with pytest.raises(ValueError, match="4300"):
        json_text.loads(b'{"a": [-' + longest + b"1]}")
