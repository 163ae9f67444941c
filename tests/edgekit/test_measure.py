"""Measurements: in turns, of the whole peak, and metrics that mean what they are called."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import TensorProto, helper, numpy_helper

from edgekit.errors import BadInput
from edgekit.measure import accuracy, graph, latency, memory

# Latency


def test_candidates_take_turns() -> None:
    """Run by run, so that a slow minute slows them all; warm-up runs are not counted."""
    order: list[str] = []
    candidates = {name: lambda name=name: order.append(name) for name in ("a", "b", "c")}
    timed = latency.interleaved(candidates, runs=5, warmup=2, batch=4, where="here")
    assert order == ["a", "b", "c"] * 7
    for figures in timed.values():
        assert (figures.runs, figures.batch, figures.where) == (5, 4, "here")
        assert 0 < figures.p50 <= figures.p95 <= figures.p99


def test_the_garbage_collector_waits_and_comes_back() -> None:
    """No collection falls into a timed run, and the collector is on again, even if a run fails."""
    seen = []
    latency.interleaved({"a": lambda: seen.append(gc.isenabled())}, runs=2, warmup=1, batch=1, where="")
    assert seen == [True, False, False]
    assert gc.isenabled()

    calls = iter([None])
    with pytest.raises(StopIteration):
        latency.interleaved({"a": lambda: next(calls)}, runs=3, warmup=1, batch=1, where="")
    assert gc.isenabled()


def test_a_slower_candidate_measures_slower() -> None:
    """Twice the work takes longer: the clock is around the run and nothing else."""
    matrix = np.random.default_rng(0).normal(size=(300, 300))
    work = {"once": lambda: matrix @ matrix, "ten": lambda: [matrix @ matrix for _ in range(10)]}
    timed = latency.interleaved(work, runs=20, warmup=2, batch=1, where="")
    assert timed["ten"].p50 > timed["once"].p50


@given(st.floats(0.5, 2), st.integers(0, 2**32 - 1))
def test_the_interval_of_a_speed_up_says_what_the_runs_can_tell(truth: float, seed: int) -> None:
    """It holds the measured value, turns round with the two, and what slows both alike does not widen it."""
    rng = np.random.default_rng(seed)
    candidate, slow = rng.lognormal(0, 0.1, 50), np.repeat(rng.uniform(1, 3, 5), 10)
    original = truth * rng.lognormal(0, 0.1, 50)

    def interval(first: Any, second: Any) -> Any:
        first, second = latency.summary([*first], 1, ""), latency.summary([*second], 1, "")
        found = latency.speedup_interval(first, second)
        assert found.low <= first.p50 / second.p50 <= found.high
        return found

    assert interval(original, candidate).low == pytest.approx(
        1 / interval(candidate, original).high, rel=0.05
    )
    exact = interval(truth * candidate * slow, candidate * slow)
    assert exact.low == pytest.approx(truth) == exact.high


# Memory


def test_the_peak_sees_an_allocation_and_forgets_it() -> None:
    """A block's peak holds what it allocated and freed again; the next block's does not."""
    peaks: list[int] = []
    for numbers in (1, 25_000_000, 1):
        with memory.peak_rss() as peak:
            block = np.ones(numbers)
            del block
            measured = peak()
        if measured is None:
            pytest.skip("this kernel does not let a process reset its high-water mark")
        peaks.append(measured)
    before, large, after = peaks
    assert large - before > 190_000_000
    assert large - after > 190_000_000


# Metrics

_rows = arrays.arrays(
    np.float32, st.tuples(st.integers(1, 6), st.integers(1, 5)), elements=st.floats(-100, 100, width=32)
)


@given(_rows)
def test_cosine_of_equal_outputs_is_one(a: np.ndarray[Any, Any]) -> None:
    """Equal is one, zeros included; opposite is minus one; the scale does not matter."""
    assert accuracy.mean_cosine(a, a) == pytest.approx(1)
    assert accuracy.mean_cosine(a, 3 * a) == pytest.approx(1, abs=1e-5)
    if np.abs(a).max(axis=1).min() > 1e-3:
        assert accuracy.mean_cosine(a, -a) == pytest.approx(-1)


@given(_rows, st.integers(0, 9))
def test_cosine_is_symmetric_and_bounded(a: np.ndarray[Any, Any], seed: int) -> None:
    """Between minus one and one, the same both ways, and every sample counts alike."""
    b = np.random.default_rng(seed).normal(size=a.shape)
    value = accuracy.mean_cosine(a, b)
    assert -1 - 1e-9 <= value <= 1 + 1e-9
    assert accuracy.mean_cosine(b, a) == pytest.approx(value)
    each = [accuracy.mean_cosine(a[i : i + 1], b[i : i + 1]) for i in range(len(a))]
    assert value == pytest.approx(np.mean(each))


def test_a_dead_output_is_not_similar() -> None:
    """Zeros against something are no agreement."""
    assert accuracy.mean_cosine(np.zeros((1, 3)), np.ones((1, 3))) == 0


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1))
def test_top1_is_the_share_of_right_answers(pairs: list[tuple[int, int]]) -> None:
    """The largest logit against the label."""
    logits = np.eye(4)[[said for said, _ in pairs]]
    labels = np.array([label for _, label in pairs])
    score = accuracy.score("top1", {"y": logits}, {"y": logits}, labels)
    assert score.value == np.mean([said == label for said, label in pairs])
    assert score.samples == len(pairs)


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        (np.zeros((3, 2)), None),
        (np.zeros((3, 2, 2)), np.zeros(3, int)),
        (np.zeros((3, 2)), np.zeros((3, 2), int)),
    ],
)
def test_top1_on_something_else_is_refused(logits: Any, labels: Any) -> None:
    """Maps, missing labels or one-hot labels: an error instead of a number."""
    with pytest.raises(BadInput, match="top1 does not suit"):
        accuracy.score("top1", {"y": logits}, {"y": logits}, labels)


def test_the_metric_is_chosen_by_the_labels() -> None:
    """Top1 with labels, cosine without; what needs labels and has none is refused."""
    assert accuracy.choose(None, labelled=True) == "top1"
    assert accuracy.choose(None, labelled=False) == "cosine"
    with pytest.raises(BadInput, match="needs labels"):
        accuracy.choose("top1", labelled=False)
    with pytest.raises(BadInput, match="did you mean 'cosine'"):
        accuracy.choose("cosin", labelled=True)


@pytest.fixture
def own_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module with metrics of a user."""
    (tmp_path / "own_metrics.py").write_text(
        "def mean(outputs, labels):\n    return outputs['y'].mean()\n"
        "def nan(outputs, labels):\n    return float('nan')\n"
        "def broken(outputs, labels):\n    return outputs['z']\n"
        "def words(outputs, labels):\n    return 'good'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return "own_metrics"


def test_a_metric_of_one_s_own_counts(own_metrics: str) -> None:
    """``module:fn`` gets outputs by name and labels, and its number is reported under its name."""
    name = accuracy.choose(f"{own_metrics}:mean", labelled=False)
    score = accuracy.score(name, {"y": np.full((4, 2), 0.25)}, {}, None)
    assert (score.name, score.value, score.samples) == ("own_metrics:mean", 0.25, 4)


@pytest.mark.parametrize(
    ("function", "words"), [("nan", "nan"), ("broken", "KeyError"), ("words", "ValueError")]
)
def test_a_metric_that_fails_is_named(own_metrics: str, function: str, words: str) -> None:
    """What the user's function did wrong is in the message, with how it is called."""
    with pytest.raises(BadInput, match=f"own_metrics:{function}") as caught:
        accuracy.score(f"{own_metrics}:{function}", {"y": np.zeros((4, 2))}, {}, None)
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["own_metrics:men", "no_such_module:fn"])
def test_a_metric_that_is_not_there_is_refused_before_the_work(own_metrics: str, name: str) -> None:
    """A misspelt function or module is an error when the plan is made."""
    with pytest.raises(BadInput):
        accuracy.choose(name, labelled=True)


# Graphs


def _graph(path: Path) -> Path:
    weight = numpy_helper.from_array(np.ones((8, 3, 3, 3), np.float32), "w")
    fc = numpy_helper.from_array(np.ones((8, 5), np.float32), "fc")
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1], doc_string="secret/path.py"),
        helper.make_node("GlobalAveragePool", ["c"], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("MatMul", ["f", "fc"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, "h", "w"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5])
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], [weight, fc]), opset_imports=[helper.make_opsetid("", 17)]
    )
    model.ir_version = 8
    onnx.save(model, str(path))
    return path


def test_a_graph_s_facts_are_those_counted_by_hand(tmp_path: Path) -> None:
    """Parameters, multiply-accumulates for one sample at the example's size, operators, opset."""
    facts = graph.read(_graph(tmp_path / "m.onnx"), {"x": np.zeros((1, 3, 6, 4), np.float32)})
    assert facts.params == 8 * 3 * 9 + 8 * 5
    assert facts.macs == 6 * 4 * 8 * 3 * 9 + 8 * 5
    assert facts.opset == 17
    assert facts.operators == {"Conv": 1, "GlobalAveragePool": 1, "Flatten": 1, "MatMul": 1}
    assert facts.size_bytes == (tmp_path / "m.onnx").stat().st_size


def test_a_stripped_graph_names_no_source(tmp_path: Path) -> None:
    """Exporters' notes about files of this machine are gone; the graph is the same otherwise."""
    model = onnx.load(str(_graph(tmp_path / "m.onnx")))
    graph.strip(model)
    assert b"secret" not in model.SerializeToString()
    assert len(model.graph.node) == 4
