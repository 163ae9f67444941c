"""Shadow traffic: a new version computes copies of live requests before it serves, and no client notices."""

from __future__ import annotations

import http.client
import json
import mmap
import re
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra import numpy as arrays
from onnx import helper, numpy_helper

from agent_testing import AgentProcess, TestBundle, linear_bundle, make_model, picky, write_bundle
from device_agent import config
from device_agent.batching.job import Job
from device_agent.errors import AgentError, BadInput
from device_agent.manifest import Contract, TensorSpec
from device_agent.probation.agreement import Agreement
from device_agent.probation.mirror import MOST_WAITING, Mirror
from device_agent.probation.report import line
from device_agent.probation.settings import ProbationSettings
from device_agent.probation.shadow import why_skipped
from device_agent.probation.verdict import Mirrored, against_mirrored
from device_agent.server import control

SETTINGS = ProbationSettings()
P95_10MS = Contract(latency_quantile="p95", latency_ms=10.0)


# What is kept of a request


def _answered(inputs: Dict[str, Any], **changes: Any) -> Job:
    job = Job(inputs, 1, "key", lambda done: None, probe=changes.pop("probe", False))
    job.outputs, job.batch_rows, job.started_s, job.finished_s = {"y": np.zeros(1)}, 1, 1.0, 1.5
    for name, value in changes.items():
        setattr(job, name, value)
    return job


@pytest.mark.parametrize("owner", [bytearray(8), np.zeros(8, np.uint8), mmap.mmap(-1, 8)])
@pytest.mark.parametrize("made_by", [np.frombuffer, lambda data, dtype: np.ndarray((8,), dtype, data)])
def test_what_others_may_write_to_is_copied(owner: Any, made_by: Callable[..., Any]) -> None:
    """The next request on a connection, or a client in its shared memory, changes no copy that was taken."""
    view = memoryview(owner)
    view[:] = b"\x00" * 8
    mirror = Mirror(1.0)
    mirror.offer([_answered({"x": made_by(view, np.uint8)[2:4]})])
    view[:] = b"\x07" * 8
    sample = mirror.next()
    assert sample is not None
    assert sample.inputs["x"].tolist() == [0, 0]
    assert sample.run_s == 0.5


def test_what_nobody_can_write_to_is_not_copied() -> None:
    """Arrays of a request's own, and views of bytes, cost nothing to keep."""
    own, fixed = np.zeros(4), np.frombuffer(memoryview(b"12345678"), np.uint8)
    mirror = Mirror(1.0)
    mirror.offer([_answered({"own": own, "fixed": fixed})])
    sample = mirror.next()
    assert sample is not None
    assert sample.inputs["own"] is own
    assert np.shares_memory(sample.inputs["fixed"], fixed)


def test_only_answered_requests_are_kept_and_few_of_them() -> None:
    """What failed, was given up or is the agent's own is left out; what finds no room is dropped."""
    mirror = Mirror(1.0)
    for left_out in ({"error": ValueError()}, {"cancelled": True}, {"probe": True}):
        mirror.offer([_answered({}, **left_out)])
    assert (mirror.next(), mirror.dropped) == (None, 0)
    mirror.offer([_answered({"x": np.zeros(1)}) for _ in range(MOST_WAITING + 3)])
    assert mirror.dropped == 3
    mirror.clear()
    assert mirror.next() is None


def test_a_request_that_shared_its_run_has_no_time_of_its_own() -> None:
    """Engine times are compared only for runs that both versions made of the same rows."""
    mirror = Mirror(1.0)
    mirror.offer([_answered({}, batch_rows=4)])
    sample = mirror.next()
    assert sample is not None
    assert sample.run_s is None


# How outputs agree


FLOATS = arrays.arrays(np.float32, arrays.array_shapes(min_dims=2, max_dims=3, min_side=2))


@given(FLOATS)
def test_equal_outputs_agree_entirely(values: Any) -> None:
    """Whatever the values, infinities and NaN among them, the same outputs differ in nothing."""
    spec = (TensorSpec("y", "FP32", (-1,) * values.ndim),)
    agreement = Agreement(spec, spec)
    agreement.add({"y": values}, {"y": values.copy()})
    seen = agreement.describe()["y"]
    assert seen["agreeing_fraction"] == 1.0
    assert seen["largest_difference"] in (0.0, None if not np.isfinite(values).any() else 0.0)


def test_the_difference_of_outputs_is_told_by_output() -> None:
    """Rows of floats are compared by argmax, others by element; what only one version has is left out."""
    new = (
        TensorSpec("scores", "FP32", (-1, 2)),
        TensorSpec("label", "BYTES", (-1,)),
        TensorSpec("z", "FP32", ()),
    )
    agreement = Agreement(new, new[:2])
    scores = np.array([[1.0, 2.0], [3.0, 1.0]], np.float32)
    labels = np.array([b"cat", b"dog"], object)
    agreement.add(
        {"scores": scores, "label": labels, "z": np.zeros(())},
        {"scores": scores + np.float32([[0, 0], [-2.5, 0]]), "label": np.array([b"cat", b"cow"], object)},
    )
    agreement.add({"scores": scores, "label": labels}, {"scores": scores[:1], "label": labels})
    assert agreement.describe() == {
        "scores": {"largest_difference": 2.5, "agreeing_fraction": 0.5, "other_shapes": 1},
        "label": {"largest_difference": None, "agreeing_fraction": 0.75, "other_shapes": 0},
    }


# The rules


def _pairs(old_s: float, new_s: float) -> Mirrored:
    return Mirrored(run_s=[new_s] * 40, pairs_s=[(old_s, new_s)] * 40)


VERDICTS: Dict[str, Tuple[Mirrored, Contract, str]] = {
    "as fast": (_pairs(0.004, 0.004), Contract(), ""),
    "nothing seen yet": (Mirrored(), Contract(), ""),
    "slower": (_pairs(0.004, 0.012), Contract(), "3.0 times the old version's time"),
    "a cold engine": (_pairs(1e-5, 1e-4), Contract(), ""),
    "within its contract though slower": (_pairs(0.002, 0.009), P95_10MS, ""),
    "past its contract": (_pairs(0.008, 0.011), P95_10MS, "the contract's p95"),
    "past a contract that the old one misses too": (_pairs(0.02, 0.022), P95_10MS, ""),
    "far past a contract that the old one misses too": (_pairs(0.02, 0.06), P95_10MS, "3.0 times"),
    "failures": (Mirrored(failed=3, failure="bad index", run_s=[1e-3] * 3), Contract(), "3 of 6.*bad index"),
    "one hiccup": (Mirrored(failed=1, failure="?", run_s=[1e-3] * 40), Contract(), ""),
    "wrong golden rows": (Mirrored(wrong="'y' is off"), Contract(), "is off"),
    "a crash": (Mirrored(crash="signal 11"), Contract(), "signal 11"),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_what_speaks_against_a_version_before_the_switch(case: str) -> None:
    """Failures, engine times and golden rows are judged, each with its own reason."""
    mirrored, contract, reason = VERDICTS[case]
    found = against_mirrored(mirrored, contract, SETTINGS) or ""
    assert bool(found) == bool(reason)
    assert re.search(reason, found)


@pytest.mark.parametrize(
    "table", ["shadow_fraction = 1.5", "shadow_fraction = -0.1", "shadow_fraction = 0.1\nduration_s = 0"]
)
def test_a_fraction_without_meaning_is_refused(table: str) -> None:
    """The configuration names what is wrong with it."""
    with pytest.raises(BadInput, match=r"probation\.shadow_fraction"):
        config.parse(f"[probation]\n{table}\n", "agent.toml")


def _version(shape: Tuple[int, ...] = (-1, 8), size: int = 8) -> Any:
    manifest = SimpleNamespace(inputs=(TensorSpec("x", "FP32", shape),), max_batch_size=size)
    return SimpleNamespace(manifest=manifest, batchable=True, version="1")


SKIPPED = {
    "no requests can come": (_version(), _version(), {"live": False}),
    "no version serves yet": (_version(), None, {}),
    "memory does not hold both versions": (_version(), _version(), {"paused": True}),
    "it has other inputs than version 1": (_version((-1, 9)), _version(), {}),
    "it takes smaller batches than version 1": (_version(size=4), _version(), {}),
    "": (_version(size=16), _version(), {}),
}


@pytest.mark.parametrize("reason", SKIPPED)
def test_why_a_version_gets_no_shadow_traffic(reason: str) -> None:
    """Where it cannot compute the old version's requests, that is said and the update goes on without."""
    loaded, old, options = SKIPPED[reason]
    assert why_skipped(loaded, old, **{"paused": False, "live": True, **options}) == reason


# With an agent

SHADOW = "\n[probation]\nshadow_fraction = {}\nduration_s = {}\n"


class Client(threading.Thread):
    """Asks over one connection, binary and with other values each time, until it is stopped."""

    def __init__(self, address: str, value: Optional[float]) -> None:
        super().__init__(daemon=True)
        self.statuses: List[int] = []
        self._address = address
        self._value = value
        self._end = threading.Event()

    def run(self) -> None:
        """Ask."""
        rng = np.random.default_rng(0)
        tensor = {"name": "x", "datatype": "FP32", "shape": [1, 8], "parameters": {"binary_data_size": 32}}
        head = json.dumps({"inputs": [tensor]}).encode()
        headers = {"Inference-Header-Content-Length": str(len(head))}
        connection = http.client.HTTPConnection(self._address, timeout=30)
        while not self._end.is_set():
            values = rng.standard_normal(8) if self._value is None else np.full(8, self._value)
            body = head + values.astype(np.float32).tobytes()
            connection.request("POST", "/v2/models/model/infer", body, headers)
            response = connection.getresponse()
            response.read()
            self.statuses.append(response.status)
            self._end.wait(0.002)
        connection.close()

    def stop(self) -> List[int]:
        """End, and return what came."""
        self._end.set()
        self.join(30)
        return self.statuses


@pytest.fixture(name="client")
def _client() -> Iterator[Callable[..., Client]]:
    started: List[Client] = []

    def start(agent: AgentProcess, value: Optional[float] = None) -> Client:
        started.append(Client(agent.http, value))
        started[-1].start()
        while len(started[-1].statuses) < 20:
            time.sleep(0.005)
        return started[-1]

    yield start
    for each in started:
        each.stop()


def _install(agent: AgentProcess, bundle: TestBundle) -> List[str]:
    states: List[str] = []
    message = {"op": "install", "bundle": str(bundle.directory), "activate": True}
    control.request(agent.control, message, states.append)
    return states


def _status(agent: AgentProcess) -> Any:
    (status,) = control.request(agent.control, {"op": "status"}, lambda state: None)
    return status


def _refused(agent: AgentProcess, old: TestBundle, new: TestBundle, reason: str) -> Any:
    """Install ``new``, which must be refused before the switch; what is kept of its shadow traffic."""
    with pytest.raises(AgentError, match=reason) as refused:
        _install(agent, new)
    assert refused.value.exit_code == 5
    status = _status(agent)
    assert (status["serving"], status["active"], status["committed"]) == (
        old.digest,
        old.digest,
        [old.digest],
    )
    last = status["last_operation"]
    assert (last["digest"], last["state"], status["shadow"]) == (new.digest, "selftested", None)
    assert last["failure"]["why"] == last["shadow"]["verdict"]
    return last["shadow"]


def test_a_good_version_is_switched_to_after_it_computed_live_requests(
    tmp_path: Path, start_agent: Callable[..., AgentProcess], client: Callable[..., Client]
) -> None:
    """The same model differs in nothing, although every request comes into the memory of the one before."""
    agent = start_agent(linear_bundle(tmp_path / "1"), settings=SHADOW.format(1, 0.6))
    asking = client(agent)
    states = _install(agent, linear_bundle(tmp_path / "2", version=2))
    assert set(asking.stop()) == {200}
    said = states.index("shadow traffic: 1 of the requests for 0.6 s")
    assert states[said - 1 : said + 2 : 2] == ["selftested", "switched"]
    shadow = _status(agent)["last_operation"]["shadow"]
    assert shadow["requests"] > 3
    assert (shadow["failed"], shadow["verdict"], shadow["skipped"]) == (0, None, None)
    assert shadow["outputs"]["scores"] == {
        "largest_difference": 0.0, "agreeing_fraction": 1.0, "other_shapes": 0,
    }  # fmt: skip


def test_another_model_is_switched_to_and_its_difference_is_told(
    tmp_path: Path, start_agent: Callable[..., AgentProcess], client: Callable[..., Client]
) -> None:
    """Other weights give other outputs, which is reported and holds no version back."""
    agent = start_agent(linear_bundle(tmp_path / "1"), settings=SHADOW.format(0.5, 0.5))
    client(agent)
    _install(agent, linear_bundle(tmp_path / "2", seed=1, version=2))
    shadow = _status(agent)["last_operation"]["shadow"]
    seen = shadow["outputs"]["scores"]
    assert seen["largest_difference"] > 0.1
    assert seen["agreeing_fraction"] < 1
    assert re.search(r"\d+ requests and \d+ golden rows, 0 failed; .* 'scores' agrees in ", line(shadow))


def test_a_version_that_fails_on_live_requests_never_serves_one(
    tmp_path: Path, start_agent: Callable[..., AgentProcess], client: Callable[..., Client]
) -> None:
    """What a probation would show to clients as errors, shadow traffic keeps from them."""
    old = linear_bundle(tmp_path / "1")
    agent = start_agent(old, settings=SHADOW.format(1, 30))
    asking = client(agent, value=100.0)
    new = write_bundle(tmp_path / "2", picky(), {"x": np.ones((2, 8), np.float32)}, version=2)
    shadow = _refused(agent, old, new, "requests failed that the old version answered")
    assert shadow["failed"] >= 2
    assert set(asking.stop()) == {200}


def slow(width: int = 1500) -> Any:
    """As good as any, at a thousand times the cost."""
    rng = np.random.default_rng(1)
    sizes = [(8, width), (width, width), (width, width), (width, 4)]
    weights = [(rng.standard_normal(size) / width).astype(np.float32) for size in sizes]
    tensors = ["x", "a", "b", "c", "scores"]
    return make_model(
        [helper.make_node("MatMul", [tensors[i], f"w{i}"], [tensors[i + 1]]) for i in range(4)],
        [TensorSpec("x", "FP32", (-1, 8))],
        [TensorSpec("scores", "FP32", (-1, 4))],
        [numpy_helper.from_array(array, f"w{i}") for i, array in enumerate(weights)],
    )


@pytest.mark.parametrize("asked", [True, False])
def test_a_version_that_breaks_its_contract_never_serves(
    tmp_path: Path, start_agent: Callable[..., AgentProcess], client: Callable[..., Client], asked: bool
) -> None:
    """Its engine is too slow for what it promises: told by live requests, or by golden rows without any."""
    old = linear_bundle(tmp_path / "1")
    agent = start_agent(old, settings=SHADOW.format(1, 30 if asked else 0.2))
    if asked:
        client(agent)
    golden = {"x": np.random.default_rng(1).standard_normal((2, 8)).astype(np.float32)}
    promise = Contract(latency_quantile="p95", latency_ms=0.6)
    new = write_bundle(tmp_path / "2", slow(), golden, tolerance=1e-2, version=2, contract=promise)
    shadow = _refused(agent, old, new, "the contract's p95")
    assert (shadow["requests"] > 0, shadow["golden_rows"] > 0) == (asked, not asked)


def test_golden_rows_count_where_nobody_asks(
    tmp_path: Path, start_agent: Callable[..., AgentProcess]
) -> None:
    """An idle device updates as well; what is missing in evidence, golden rows give."""
    agent = start_agent(linear_bundle(tmp_path / "1"), settings=SHADOW.format(0.1, 0.1))
    _install(agent, linear_bundle(tmp_path / "2", seed=1, version=2))
    status = _status(agent)
    shadow = status["last_operation"]["shadow"]
    assert (shadow["requests"], shadow["golden_rows"]) == (0, SETTINGS.min_requests)
    assert status["last_operation"]["state"] == "committed"
    assert control.request(agent.control, {"op": "rollback", "name": "model"}, lambda state: None)
    assert _status(agent)["last_operation"]["shadow"] is None


def test_a_first_version_says_that_it_had_no_shadow_traffic(
    tmp_path: Path, start_agent: Callable[..., AgentProcess]
) -> None:
    """Without an old version there are no requests to copy, which is said and kept."""
    agent = start_agent(settings=SHADOW.format(0.5, 0.1))
    assert "no shadow traffic: no version serves yet" in _install(agent, linear_bundle(tmp_path / "1"))
    shadow = _status(agent)["last_operation"]["shadow"]
    assert line(shadow) == "  shadow traffic: none: no version serves yet"


def test_a_stop_ends_the_update_before_the_switch(
    tmp_path: Path, start_agent: Callable[..., AgentProcess]
) -> None:
    """The agent does not wait for shadow traffic when it stops; the old version serves at the next start."""
    old = linear_bundle(tmp_path / "1")
    agent = start_agent(old, settings=SHADOW.format(0.5, 60))
    ends: List[str] = []

    def install() -> None:
        try:
            _install(agent, linear_bundle(tmp_path / "2", version=2))
        except AgentError as error:
            ends.append(str(error))

    installing = threading.Thread(target=partial(install), daemon=True)
    installing.start()
    deadline_s = time.monotonic() + 30
    while _status(agent)["shadow"] is None:
        assert time.monotonic() < deadline_s, "it never came"
        time.sleep(0.02)
    assert agent.stop() == 0
    installing.join(30)
    assert "the agent stops before model version 2 was switched to" in ends[0]
    agent.start()
    status = _status(agent)
    assert (status["serving"], len(status["versions"])) == (old.digest, 1)
