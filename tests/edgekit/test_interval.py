"""Intervals: what a number of samples can show, and that the built-in metrics are what they are called."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from edgekit.errors import BadInput
from edgekit.measure import accuracy, interval


def test_half_a_percent_of_two_hundred_samples_is_no_fact() -> None:
    """One answer lost of 200 leaves open whether anything was lost; 100 of 20,000 do not."""
    few, many = interval.rate_drop(1, 0, 200), interval.rate_drop(100, 0, 20_000)
    assert few.low < 0 < 0.005 < few.high
    assert 0 < many.low < 0.005 < many.high


@given(samples=st.integers(2, 2000), data=st.data())
def test_intervals_hold_the_value_and_narrow_with_samples(samples: int, data: st.DataObject) -> None:
    """A rate's interval holds it, stays within 0 and 1, and ten times the samples make it narrower."""
    successes = data.draw(st.integers(0, samples))
    found = interval.rate(successes, samples)
    assert 0 <= found.low <= successes / samples + 1e-12
    assert successes / samples - 1e-12 <= found.high <= 1
    more = interval.rate(10 * successes, 10 * samples)
    assert more.high - more.low < found.high - found.low


@given(samples=st.integers(2, 500), data=st.data())
def test_the_drop_of_a_rate_is_paired(samples: int, data: st.DataObject) -> None:
    """The interval turns round with the models, and is never empty, even where they agree on everything."""
    lost = data.draw(st.integers(0, samples))
    gained = data.draw(st.integers(0, samples - lost))
    found, turned = interval.rate_drop(lost, gained, samples), interval.rate_drop(gained, lost, samples)
    assert found.low < found.high
    assert (found.low, found.high) == pytest.approx((-turned.high, -turned.low))


@pytest.mark.parametrize("truth", [0.02, 0.5])
def test_nine_in_ten_intervals_hold_the_truth(truth: float) -> None:
    """Over many draws of 300 samples, intervals at 0.95 hold the true value at least nine times in ten."""
    random = np.random.default_rng(0)
    draws = random.random((200, 300)) < truth
    rates = [interval.rate(int(draw.sum()), 300) for draw in draws]
    means = [
        interval.resampled(
            np.stack([draw, np.ones(300)], axis=1).astype(float), lambda s: s[..., 0] / s[..., 1]
        )
        for draw in draws
    ]
    for found in (rates, means):
        assert np.mean([one.low <= truth <= one.high for one in found]) >= 0.9


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=40))
def test_f1_is_the_macro_f1_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    """The mean over classes that occur, in answers or labels."""
    logits = np.eye(4)[[said for said, _ in pairs]]
    labels = np.array([label for _, label in pairs])
    score = accuracy.score("f1", {"y": logits}, {"y": logits}, labels)
    assert score.value == pytest.approx(f1_score(labels, logits.argmax(axis=1), average="macro"))
    assert score.interval is not None
    assert score.interval.low <= score.interval.high


def test_sqnr_is_in_decibels_over_all_outputs() -> None:
    """A tenth of the amplitude as noise is 20 dB; equal outputs have 100, so that a drop is a number."""
    rng = np.random.default_rng(0)
    original = {"a": rng.normal(size=(50, 8)), "b": rng.normal(size=(50, 3))}
    noisy = {name: value * 1.1 for name, value in original.items()}
    score = accuracy.score("sqnr", noisy, original, None)
    assert score.value == pytest.approx(20)
    assert accuracy.score("sqnr", original, original, None).value == accuracy.MAX_SQNR_DB
    lost = accuracy.drop("sqnr", noisy, original, None)
    assert lost is not None
    assert lost.low <= 80 <= lost.high


@pytest.fixture
def own(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Metrics of a user: one number, one a sample, and an array of another length."""
    (tmp_path / "own_each.py").write_text(
        "def one(outputs, labels):\n    return outputs['y'].mean()\n"
        "def each(outputs, labels):\n    return outputs['y'][:, 0]\n"
        "def rows(outputs, labels):\n    return outputs['y'].ravel()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return "own_each"


def test_a_metric_of_one_s_own_has_an_interval_where_it_speaks_of_samples(own: str) -> None:
    """A number for each sample gives mean and interval; one number gives itself; another length is
    refused.
    """
    outputs = {"y": np.random.default_rng(0).normal(size=(40, 2))}
    each = accuracy.score(f"{own}:each", outputs, outputs, None)
    assert each.value == pytest.approx(outputs["y"][:, 0].mean())
    assert each.interval is not None
    assert each.interval.low < each.value < each.interval.high
    one = accuracy.score(f"{own}:one", outputs, outputs, None)
    assert one.interval is None
    assert accuracy.drop(f"{own}:one", outputs, outputs, None) is None
    with pytest.raises(BadInput, match="shape"):
        accuracy.score(f"{own}:rows", outputs, outputs, None)
