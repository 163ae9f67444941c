"""The accuracy benchmark: its metrics count rightly, its test data is unseen, its verdict is honest."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from accuracy import average_precision, cache, judging, scans, verdict
from accuracy.case import Case, Data, image_rows
from accuracy.cases import CASES, detector
from accuracy.comparison import Comparison, Entry, compare
from accuracy.tools import PEERS, TOOLS, Result, ToolFailed, applies
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

UNUSED = CASES["digits"]


def logits(*rows: tuple[float, ...]) -> list[np.ndarray]:
    return [np.array(rows, np.float32)]


def test_divergence_is_that_of_the_probabilities() -> None:
    """From (1/2, 1/2) to (3/4, 1/4) is 1/2 log2(4/3) bits, given in thousandths."""
    found = judging.divergence(axis=1)(logits((0.0, 0.0)), logits((math.log(3.0), 0.0)))
    assert found == pytest.approx(1e3 * 0.5 * math.log2(4 / 3), rel=1e-5)


@given(st.lists(st.floats(-30, 30, width=32), min_size=3, max_size=3), st.floats(-5, 5, width=32))
def test_divergence_sees_no_difference_that_softmax_does_not(row: list[float], shift: float) -> None:
    """The same logits, and logits that all moved by the same amount, are at distance zero."""
    moved = tuple(value + shift for value in row)
    assert judging.divergence(axis=1)(logits(tuple(row)), logits(moved)) == pytest.approx(0, abs=0.1)


def test_likelihood_is_in_bits() -> None:
    """A fair coin has a log-likelihood of -1 bit."""
    assert judging.likelihood(logits((2.0, 2.0)), np.array([1])) == pytest.approx(-1)


def test_mean_iou_averages_over_the_classes_that_occur() -> None:
    """Half of class 0 found, a class 1 twice too large, and no class 2: (1/2 + 1/2) / 2."""
    truth = np.array([[[0, 0, 1]]])
    predicted = np.eye(3)[np.array([[[0, 1, 1]]])].transpose(0, 3, 1, 2)
    assert judging.mean_iou([predicted], truth) == pytest.approx(0.5)


def test_the_paired_error_of_a_mean_is_the_usual_one() -> None:
    """For accuracy and as many groups as rows it is the standard error of the mean difference."""
    random = np.random.default_rng(0)
    truth = random.integers(0, 2, 20)
    ours, theirs = (random.normal(size=(20, 2)).astype(np.float32) for _ in range(2))
    difference = (ours.argmax(1) == truth).astype(float) - (theirs.argmax(1) == truth)
    expected = difference.std(ddof=1) / math.sqrt(20)
    assert judging.paired_error(judging.accuracy, [ours], [theirs], truth) == pytest.approx(expected)


def test_a_model_does_not_differ_from_itself() -> None:
    """The paired error of equal answers is zero, however noisy the metric."""
    answers = [np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)]
    truth = np.random.default_rng(1).integers(0, 3, 50)
    assert judging.paired_error(judging.accuracy, answers, answers, truth) == 0


def test_average_precision_of_a_known_ranking() -> None:
    """Hit, miss, hit on two boxes: precision 1 up to half the recall, then 2/3."""
    found = average_precision.average_precision(np.array([0.9, 0.8, 0.7]), np.array([True, False, True]), 2)
    assert found == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


def test_a_box_is_found_once() -> None:
    """A second detection of the same box is a false one, and a box of another class is none."""
    truth = np.array([[[1, 0, 0, 10, 10], [-1, -1, -1, -1, -1]]], np.float32)
    twice = np.array([[[1, 0, 0, 10, 10, 0.9], [1, 0, 0, 10, 9, 0.8]]], np.float32)
    other = np.array([[[2, 0, 0, 10, 10, 0.9]]], np.float32)
    assert average_precision.mean(twice, truth, (0.5,)) == 1.0
    assert average_precision.mean(twice[:, ::-1] * [1, 1, 1, 1, 1, -1], truth, (0.95,)) == 0.5
    assert average_precision.mean(other, truth, (0.5,)) == 0.0


def test_what_the_detector_is_taught_is_what_is_read_from_it() -> None:
    """Maps made from the boxes of scenes give these boxes back, at strict overlaps too."""
    boxes = scans.scenes(20, 3, test=True).boxes
    heat, regression, _ = detector.targets(boxes)
    outputs = [np.log(heat + 1e-6) - np.log(1 - heat + 1e-6), regression[:, :2], regression[:, 2:]]
    assert average_precision.mean(detector.detections(outputs), boxes, (0.5, 0.9)) > 0.99


def test_scenes_are_reproducible_and_drawn_from_unseen_scans() -> None:
    """A seed gives the same scenes; no scan of the test part is in the training part."""
    first, again = (scans.scenes(3, 0, test=True) for _ in range(2))
    assert np.array_equal(first.images, again.images)
    train, test = scans.split()
    assert not set(train) & set(test)
    assert len(train) + len(test) == 1797


@settings(max_examples=10)
@given(seed=st.integers(0, 1000), test=st.booleans())
def test_boxes_hold_their_digits(seed: int, test: bool) -> None:
    """Each box lies in its scene and touches pixels of its digit at every edge."""
    found = scans.scenes(2, seed, test=test)
    for boxes, mask in zip(found.boxes, found.masks, strict=True):
        for label, *edges in boxes[boxes[:, 0] >= 0].astype(int):
            x0, y0, x1, y1 = edges
            inside = mask[y0:y1, x0:x1] == label + 1
            assert inside.any(axis=0)[[0, -1]].all()
            assert inside.any(axis=1)[[0, -1]].all()


def entry(quality: float | None, distance: float | None, error: float | None = 0.01) -> Entry:
    return Entry(quality, distance, error, Result(), None if quality is not None else "broke", 1.0)


def comparison(ours: Entry, **others: Entry) -> Comparison:
    return Comparison(UNUSED, 10, 0.9, {"ours": ours, **others})


def test_equal_distances_are_neither_won_nor_lost() -> None:
    """A tie with one peer loses nothing, but the model is not won."""
    tied = comparison(entry(0.9, 1.0), nncf=entry(0.9, 1.0), ort_minmax=entry(0.9, 2.0))
    found = verdict.figures([tied])
    assert (found["lost_pairs"], found["models_won_fraction"], found["compared_pairs"]) == (0, 0.0, 2)


def test_a_closer_peer_is_a_pair_lost() -> None:
    """The pair is counted and named."""
    found = verdict.figures([comparison(entry(0.9, 1.0), nncf=entry(0.9, 0.5))])
    assert (found["lost_pairs"], found["lost"]) == (1, ["digits/nncf"])


def test_labels_count_beyond_twice_their_error() -> None:
    """A peer that scores higher by less than two standard errors is within noise, by more is reported."""
    within = comparison(entry(0.90, 1.0), nncf=entry(0.91, 2.0))
    beyond = comparison(entry(0.90, 1.0), nncf=entry(0.93, 2.0))
    assert verdict.figures([within])["pairs_below_peer_beyond_error"] == 0
    assert verdict.figures([beyond])["below_peer_beyond_error"] == ["digits/nncf"]


def test_a_peer_that_failed_is_no_victory() -> None:
    """It is not compared with, and the table says why."""
    failed = comparison(entry(0.9, 1.0), nncf=entry(None, None))
    assert verdict.figures([failed])["compared_pairs"] == 0
    assert "broke" in verdict.render([failed])


def test_a_failure_of_ours_loses_every_pair() -> None:
    """Where ours writes no graph and a peer does, the peer wins."""
    found = verdict.figures([comparison(entry(None, None), nncf=entry(0.9, 1.0))])
    assert (found["lost_pairs"], found["models_won_fraction"]) == (1, 0.0)


def tiny_case() -> Case:
    """A convolution and a linear layer with random weights: no training, the same road."""
    random = np.random.default_rng(0)
    weights = {
        "kernel": random.normal(size=(8, 3, 3, 3)).astype(np.float32),
        "matrix": random.normal(size=(8, 4)).astype(np.float32),
        "axes": np.array([2, 3], np.int64),
    }

    def export(path: Path) -> None:
        nodes = [
            helper.make_node("Conv", ["image", "kernel"], ["wide"], "conv"),
            helper.make_node("Relu", ["wide"], ["positive"], "relu"),
            helper.make_node("ReduceMean", ["positive", "axes"], ["mean"], "mean", keepdims=0),
            helper.make_node("MatMul", ["mean", "matrix"], ["logits"], "head"),
        ]
        graph = helper.make_graph(
            nodes, "tiny",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, 8, 8])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 4])],
            [numpy_helper.from_array(value, name) for name, value in weights.items()],
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        onnx.save(model, str(path))

    def data() -> Data:
        images = random.normal(size=(40, 3, 8, 8)).astype(np.float32)
        return Data(image_rows(images[:16]), image_rows(images[16:], batch=8), np.arange(24) % 4)

    return Case(
        "tiny", "random", "accuracy", judging.accuracy, "divergence_millibits", judging.divergence(axis=1),
        transformer=False, export=export, data=data, sources=(),
    )  # fmt: skip


def test_tools_are_compared_on_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours and onnxruntime's each write a graph that runs, near the float model and not equal to it."""
    monkeypatch.setattr(cache, "HOME", tmp_path)
    tools = ["ours", "ort_minmax", "ort_percentile", "ort_entropy", "ort_minmax_linear"]
    found = compare(replace(tiny_case(), transformer=True), tools)
    assert found.rows == 24
    assert list(found.entries) == tools
    for name, result in found.entries.items():
        assert result.why is None, name
        assert result.distance is not None
        assert 0 < result.distance < 100
    assert found.entries["ours"].result.settings.split(" + ")[0] in ("minmax", "percentile", "mse", "entropy")
    assert found.entries["ort_minmax"].error is not None


def test_a_tool_that_breaks_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its entry holds the reason in place of figures, and the others are still compared."""

    def broken(*_: object) -> Result:
        raise ToolFailed("no luck")

    monkeypatch.setattr(cache, "HOME", tmp_path)
    monkeypatch.setitem(TOOLS, "nncf", broken)  # type: ignore[arg-type]  # a dict behind a Mapping
    found = compare(tiny_case(), ["ours", "nncf"])
    assert (found.entries["nncf"].why, found.entries["nncf"].quality) == ("no luck", None)


def test_models_are_kept_until_their_code_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second call trains nothing; another source file does, and removes the model that it replaces."""
    monkeypatch.setattr(cache, "HOME", tmp_path)
    case = tiny_case()
    first = cache.prepared(case)
    made = first.stat().st_mtime_ns
    assert cache.prepared(case).stat().st_mtime_ns == made
    changed = Case(**{**vars(case), "sources": (Path(__file__),)})
    assert cache.prepared(changed) != first
    assert not first.exists()


def test_the_issue_s_models_and_peers_are_there() -> None:
    """Six models and four peers, and three fairer ones on the two transformers: 30 pairs."""
    assert len(CASES) == 6
    everywhere = {"ort_minmax", "ort_entropy", "ort_percentile", "nncf"}
    on_transformers = {"ort_minmax_linear", "ort_entropy_linear", "ort_percentile_linear"}
    assert set(PEERS) == everywhere | on_transformers
    pairs = 0
    for case in CASES.values():
        found = {name for name in PEERS if applies(name, case)}
        assert found == everywhere | (on_transformers if case.transformer else set())
        pairs += len(found)
    assert verdict.TARGETS["compared_pairs"] == (">=", pairs)
