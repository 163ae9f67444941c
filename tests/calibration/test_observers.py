"""What observers promise: a range that depends on the values alone, and fixed memory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from calibration.errors import CalibrationError
from calibration.histogram import HALF, MOST_COUNTED, Histogram
from calibration.observers import OBSERVERS, observer_named

values = hnp.arrays(
    np.float32,
    st.integers(1, 200),
    elements=st.floats(-(2.0**100), 2.0**100, width=32) | st.floats(-8, 8, width=32) | st.just(0.0),
)


@pytest.mark.parametrize("name", OBSERVERS)
@given(data=st.data(), seen=values)
def test_range_does_not_depend_on_batches_or_order(name: str, data: st.DataObject, seen: np.ndarray) -> None:
    """Cut the same values into any batches in any order: the range is the same to the last bit."""
    observer = observer_named(name)
    whole, pieces = Histogram(), Histogram()
    whole.update(seen)
    order = np.array(data.draw(st.permutations(range(len(seen)))), int)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(seen)), max_size=5)))
    for piece in np.split(seen[order], cuts):
        pieces.update(piece)
    assert observer.range(pieces) == observer.range(whole)
    assert (pieces.lo, pieces.hi, pieces.elements) == (whole.lo, whole.hi, whole.elements)


@pytest.mark.parametrize("name", OBSERVERS)
@given(seen=values)
def test_range_stays_inside_what_was_seen(name: str, seen: np.ndarray) -> None:
    """No observer invents values: its range lies within the smallest and the largest, or touches zero."""
    histogram = Histogram()
    histogram.update(seen)
    lo, hi = observer_named(name).range(histogram)
    assert lo <= hi
    assert min(float(seen.min()), 0.0) <= lo
    assert hi <= max(float(seen.max()), 0.0)


@given(seen=values)
def test_histogram_counts_every_value_in_its_bin(seen: np.ndarray) -> None:
    """After any growth each bin holds exactly the values that lie between its edges."""
    histogram = Histogram()
    for value in seen:
        histogram.update(np.array([value], np.float32))
    expected = np.zeros(2 * HALF, np.int64)
    for value in seen.astype(np.float64):
        expected[int(value / histogram.width) + HALF - (value < 0)] += 1
    np.testing.assert_array_equal(histogram.counts, expected)


@given(seen=hnp.arrays(np.float32, st.integers(50, 400), elements=st.floats(-8, 8, width=32)))
def test_percentile_is_the_sorted_values_own(seen: np.ndarray) -> None:
    """The percentile range is that of the sorted values, up to one bin."""
    histogram = Histogram()
    histogram.update(seen)
    lo, hi = observer_named("percentile", percentile=90.0).range(histogram)
    dropped = int(len(seen) * 10 / 100)
    ordered = np.sort(seen)
    width = 8.0 / (HALF / 2)
    assert lo <= ordered[dropped] <= lo + width or lo == ordered[0]
    assert hi - width <= ordered[-1 - dropped] <= hi or hi == ordered[-1]


def test_memory_does_not_grow_with_the_samples() -> None:
    """A histogram after a thousand batches is as large as after one."""
    histogram = Histogram()
    rng = np.random.default_rng(0)
    for i in range(1000):
        histogram.update(rng.normal(0, 1 + i, 50).astype(np.float32))
    assert histogram.counts.nbytes == 2 * HALF * 8
    assert histogram.elements == 50_000


def large_row(seed: int, size: int) -> np.ndarray:
    """Values of a large tensor, spread over a range of their own, with zeros and an outlier."""
    rng = np.random.default_rng(seed)
    seen = np.maximum(rng.normal(0, 1 + seed, size), -0.5).astype(np.float32)
    seen[seen < -0.4] = 0.0
    seen[size // 3] = -9.0 * (1 + seed)
    return seen


def test_large_rows_are_counted_in_any_order() -> None:
    """Rows of which a share is counted give the same histogram in any order, on several threads too."""
    rows = [large_row(seed, 5 * MOST_COUNTED + 7 * seed) for seed in range(6)]
    forwards, threaded = Histogram(), Histogram()
    for row in rows:
        forwards.update(row)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(threaded.update, reversed(rows)))
    np.testing.assert_array_equal(threaded.counts, forwards.counts)
    assert (threaded.exponent, threaded.zeros) == (forwards.exponent, forwards.zeros)


def test_a_share_of_a_large_row_stands_for_all() -> None:
    """The ends of a large row are exact, and each part of its distribution is counted in proportion."""
    row = large_row(0, 9 * MOST_COUNTED)
    shared, whole = Histogram(), Histogram()
    shared.update(row)
    for piece in np.split(row, 9):
        whole.update(piece)
    assert (shared.lo, shared.hi, shared.elements) == (whole.lo, whole.hi, whole.elements)
    assert (shared.looked_at, whole.looked_at) == (-(-row.size // 11), row.size)
    assert int(shared.counts.sum()) == pytest.approx(row.size, rel=1e-3)
    for one, other in zip(np.cumsum(shared.counts)[::64], np.cumsum(whole.counts)[::64], strict=True):
        assert one == pytest.approx(other, abs=row.size / 100)


def test_chance_in_a_share_does_not_clip() -> None:
    """Entropy clips a share of the values as it clips all: the noise of counting is no information."""
    rows = [np.random.default_rng(i).normal(0, 1, 40 * MOST_COUNTED).astype(np.float32) for i in range(6)]
    shared, whole = Histogram(), Histogram()
    for row in rows:
        shared.update(row)
        for piece in np.split(row, 40):
            whole.update(piece)
    entropy = observer_named("entropy")
    assert shared.looked_at < whole.looked_at / 39
    assert np.ptp(entropy.range(shared)) == pytest.approx(np.ptp(entropy.range(whole)), rel=0.12)


@pytest.mark.parametrize("channels", [3, 384, 768])
def test_a_share_meets_every_channel(channels: int) -> None:
    """A channel that is unlike the others is counted in its proportion, whatever its place in memory."""
    row = np.ones((4 * MOST_COUNTED // channels, channels), np.float32)
    row[:, channels // 2] = 1.5
    histogram = Histogram()
    row[0, 0] = 16.0
    histogram.update(row)
    counted = histogram.counts[HALF + int(1.5 / histogram.width)]
    assert counted == pytest.approx(len(row), rel=0.02)


def test_values_that_are_not_finite_are_refused() -> None:
    """NaN and infinity anywhere are an error, and leave the histogram as it was."""
    for bad in (np.nan, np.inf, -np.inf):
        histogram = Histogram()
        with pytest.raises(FloatingPointError):
            histogram.update(np.array([1.0, bad, 2.0], np.float32))
        assert histogram.elements == 0


def test_outliers_do_not_move_a_percentile() -> None:
    """One outlier in a hundred thousand values widens min-max a thousandfold, the percentile not."""
    seen = np.random.default_rng(0).uniform(-1, 1, 100_000).astype(np.float32)
    seen[7] = 1000.0
    histogram = Histogram()
    histogram.update(seen)
    ranges = {name: observer_named(name).range(histogram) for name in ("minmax", "percentile")}
    assert ranges["minmax"][1] == 1000.0
    assert ranges["percentile"][1] <= 1.5


@pytest.mark.parametrize("percentile", [50.0, 100.1, -1.0])
def test_impossible_percentile_is_refused(percentile: float) -> None:
    """A percentile that leaves no range is an error that says so."""
    with pytest.raises(CalibrationError, match="makes no range"):
        observer_named("percentile", percentile=percentile)


def test_unknown_observer_is_refused() -> None:
    """A misspelt observer is an error that lists the ones there are."""
    with pytest.raises(CalibrationError, match="minmax"):
        observer_named("minimax")
