"""The file that every emission is made from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration.errors import CalibrationError
from calibration.scales import Scales, TensorRange, load, loads

finite = st.floats(allow_nan=False, allow_infinity=False)
ranges = st.builds(
    lambda a, b, n: TensorRange(min(a, b), max(a, b), min(a, b), max(a, b), n),
    finite,
    finite,
    st.integers(1, 10**12),
)
scales = st.builds(
    Scales,
    observer=st.sampled_from(["minmax", "percentile"]),
    settings=st.dictionaries(st.text(max_size=5), finite, max_size=2),
    samples=st.integers(1, 10**6),
    tensors=st.dictionaries(st.text(), ranges, max_size=4),
    macs=st.dictionaries(st.text(), st.integers(0, 10**15), max_size=3),
)


@given(scales)
def test_round_trip_is_exact(original: Scales) -> None:
    """Reading what was written gives the same scales, and writing them again the same bytes."""
    text = original.dumps()
    assert loads(text) == original
    assert loads(text).dumps() == text


def test_save_and_load(tmp_path: Path) -> None:
    """A saved file loads."""
    original = Scales("minmax", {}, 1, {"x": TensorRange(-1.0, 2.0, -1.0, 2.0, 8)}, {"conv": 9})
    original.save(tmp_path / "scales.json")
    assert load(tmp_path / "scales.json") == original


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"version": 2}, "version"),
        ({"tensors": {"x": {"lo": 1.0}}}, "missing or wrong"),
        ({"tensors": {"x": {"lo": 1e999, "hi": 1e999, "min": 0, "max": 0, "elements": 1}}}, "not finite"),
        ({"tensors": {"x": {"lo": 2.0, "hi": 1.0, "min": 0, "max": 0, "elements": 1}}}, "upside down"),
        ({"tensors": {"x": {"lo": "a", "hi": 1.0, "min": 0, "max": 0, "elements": 1}}}, "missing or wrong"),
        ({"macs": []}, "missing or wrong"),
    ],
)
def test_malformed_scales_are_refused(change: dict[str, object], why: str) -> None:
    """A file of another version, with missing keys or impossible numbers is refused with the reason."""
    document = json.loads(Scales("minmax", {}, 1, {}, {}).dumps()) | change
    with pytest.raises(CalibrationError, match=why):
        loads(json.dumps(document))


def test_unreadable_file_is_refused(tmp_path: Path) -> None:
    """A missing file and one that is not JSON are refused by name and reason."""
    with pytest.raises(CalibrationError, match="cannot be read"):
        load(tmp_path / "absent.json")
    with pytest.raises(CalibrationError, match="not JSON"):
        loads("{")
