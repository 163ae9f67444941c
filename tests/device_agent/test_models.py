from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, List

import numpy as np
import pytest
from onnx import helper, numpy_helper

from agent_testing import TestBundle, linear, linear_bundle, make_model, session_of, write_bundle
from device_agent.batching.batcher import Job
from device_agent.config import Config
from device_agent.errors import Refused
from device_agent.loaded import LoadedModel, is_batchable
from device_agent.manifest import EngineEntry, TensorSpec
from device_agent.metrics import Metrics
from device_agent.models import Models
from device_agent.server.fields import ProtocolError
from device_agent.server.model_control import ModelControl
from device_agent.swap_plan import NOTHING_TO_STOP

X = np.ones((1, 8), np.float32)


def make_models() -> Models:
    """Models with one thread."""
    return Models(Config(threads=1), Metrics())


def prepare(models: Models, bundle: TestBundle) -> LoadedModel:
    """Load a bundle."""
    return models.prepare(bundle.directory, bundle.manifest, bundle.digest)


async def infer(loaded: LoadedModel, x: Any = X) -> Any:
    """Run one request through a model's queue."""
    future = asyncio.get_running_loop().create_future()
    loaded.batcher.submit(Job({"x": x}, len(x), "k", future.set_result))
    job = await future
    if job.error is not None:
        raise job.error
    return job.outputs["scores"]


def test_preparing_changes_nothing_that_serves(tmp_path: Path) -> None:
    """A prepared version answers only after the switch; a refused one never does."""
    models = make_models()
    first = prepare(models, linear_bundle(tmp_path / "1"))
    assert models.get("model") is None
    assert models.switch(first) is None
    assert models.get("model") is first
    bad = write_bundle(
        tmp_path / "2", linear(), {"x": X}, {"scores": np.full((1, 4), 99, np.float32)}, version=2
    )
    with pytest.raises(Refused, match="self-test"):
        prepare(models, bad)
    assert models.get("model") is first
    assert [m.digest for m in models.serving()] == [first.digest]


def test_the_latency_of_small_batches_is_known_before_the_first_request(tmp_path: Path) -> None:
    """The warm-up teaches the batcher, so that its first decisions are informed."""
    loaded = prepare(make_models(), linear_bundle(tmp_path / "1"))
    expected_s = loaded.batcher.latency.predict(1)
    assert expected_s is not None
    assert 0 < expected_s < 0.1


def test_fifty_swaps_under_load_lose_no_request(tmp_path: Path) -> None:
    """Every request is answered by the version that it was sent to, while versions change under it."""
    bundles = [linear_bundle(tmp_path / str(i), seed=i, version=i + 1) for i in range(2)]
    expected = [session_of(linear(seed=i)).run(None, {"x": X})[0] for i in range(2)]
    models = make_models()
    answered = [0, 0]

    async def client(stop: asyncio.Event) -> None:
        while not stop.is_set():
            loaded = models.get("model")
            assert loaded is not None
            which = loaded.manifest.version - 1
            np.testing.assert_allclose(await infer(loaded), expected[which], rtol=1e-5, atol=1e-6)
            answered[which] += 1

    async def main() -> None:
        stop = asyncio.Event()
        models.switch(prepare(models, bundles[0]))
        clients = [asyncio.ensure_future(client(stop)) for _ in range(8)]
        loop = asyncio.get_running_loop()
        for number in range(1, 51):
            loaded = await loop.run_in_executor(None, prepare, models, bundles[number % 2])
            old = models.switch(loaded)
            assert old is not None
            await models.retire(old)
        stop.set()
        await asyncio.gather(*clients)

    asyncio.run(main())
    assert min(answered) > 50


def test_retiring_waits_for_what_was_accepted(tmp_path: Path) -> None:
    """A replaced version answers its queue before its engine is closed."""
    models = make_models()
    answers: List[Any] = []

    async def main() -> None:
        loaded = prepare(models, linear_bundle(tmp_path / "1"))
        models.switch(loaded)
        tasks = [asyncio.ensure_future(infer(loaded)) for _ in range(30)]
        await asyncio.sleep(0)
        models.unload("model")
        await models.retire(loaded)
        answers.extend(await asyncio.gather(*tasks))

    asyncio.run(main())
    assert len(answers) == 30
    assert models.get("model") is None


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_replaced_versions_give_their_memory_back(tmp_path: Path) -> None:
    """After many updates the process is not larger by the models that it once served."""
    weights = np.random.default_rng(0).standard_normal((8, 500_000)).astype(np.float32)  # 16 MB
    model = make_model(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("ReduceSum", ["h", "axis"], ["scores"]),
        ],
        [TensorSpec("x", "FP32", (-1, 8))],
        [TensorSpec("scores", "FP32", (-1, 1))],
        [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(np.array([1], np.int64), "axis")],
    )
    bundle = write_bundle(tmp_path / "1", model, {"x": X}, tolerance=1.0)
    models = make_models()

    async def swap() -> None:
        loaded = await asyncio.get_running_loop().run_in_executor(None, prepare, models, bundle)
        old = models.switch(loaded)
        if old is not None:
            await models.retire(old)

    async def main() -> int:
        for _ in range(3):
            await swap()
        before = _resident_bytes()
        for _ in range(12):
            await swap()
        return _resident_bytes() - before

    assert asyncio.run(main()) < 4 * weights.nbytes  # twelve times as much, if they stayed


def _fixed_batch_model() -> Any:
    weights = numpy_helper.from_array(np.ones((2, 4), np.float32), "w")
    return make_model(
        [helper.make_node("MatMul", ["x", "w"], ["scores"])],
        [TensorSpec("x", "FP32", (1, 2))],
        [TensorSpec("scores", "FP32", (1, 4))],
        [weights],
    )


def test_a_model_with_a_fixed_batch_runs_requests_alone(tmp_path: Path) -> None:
    """Without a free batch axis nothing is merged, and everything is answered."""
    x = np.ones((1, 2), np.float32)
    bundle = write_bundle(tmp_path / "1", _fixed_batch_model(), {"x": x}, max_batch_size=1)
    models = make_models()
    assert not is_batchable(bundle.manifest)

    async def main() -> None:
        loaded = prepare(models, bundle)
        answers = await asyncio.gather(*(infer(loaded, x) for _ in range(5)))
        assert [a.tolist() for a in answers] == [[[2.0] * 4]] * 5
        await models.retire(loaded)

    asyncio.run(main())


def test_a_batch_size_that_does_not_run_is_refused_at_once(tmp_path: Path) -> None:
    """A manifest that promises batches which the graph cannot run is found before it serves."""
    shape = numpy_helper.from_array(np.array([1, 8], np.int64), "shape")
    model = make_model(
        [helper.make_node("Reshape", ["x", "shape"], ["scores"])],
        [TensorSpec("x", "FP32", (-1, 8))],
        [TensorSpec("scores", "FP32", (-1, 8))],
        [shape],
    )
    with pytest.raises(Refused, match="batch size"):
        prepare(make_models(), write_bundle(tmp_path / "1", model, {"x": X}))


def test_an_engine_that_computes_wrongly_is_passed_over(tmp_path: Path) -> None:
    """A prebuilt engine that fails the self-test, or does not load, gives way to the portable graph."""
    bundle = linear_bundle(tmp_path / "1")
    (bundle.directory / "wrong.onnx").write_bytes(linear(seed=9).SerializeToString())
    (bundle.directory / "broken.onnx").write_bytes(b"no model")
    engines = tuple(EngineEntry("onnxruntime", f"{name}.onnx", "fp32", {}) for name in ("broken", "wrong"))
    manifest = replace(bundle.manifest, engines=engines)

    async def main() -> None:
        loaded = make_models().prepare(bundle.directory, manifest, bundle.digest)
        expected = session_of(linear()).run(None, {"x": X})[0]
        np.testing.assert_array_equal(await infer(loaded), expected)

    asyncio.run(main())


def test_free_axes_make_a_model_batchable(tmp_path: Path) -> None:
    """One output without a batch axis is enough to keep requests apart."""
    manifest = linear_bundle(tmp_path / "1").manifest
    assert is_batchable(manifest)
    scalar = replace(manifest.outputs[0], shape=())
    assert not is_batchable(replace(manifest, outputs=(scalar,)))


def test_a_pause_keeps_the_name_of_its_model(tmp_path: Path) -> None:
    """While a bundle changes its version nobody may load another model in its place; clients come back."""
    bundle = linear_bundle(tmp_path / "1")
    models = Models(Config(threads=1), Metrics())
    loaded = models.prepare(bundle.directory, bundle.manifest, bundle.digest)
    models.switch(loaded)
    models.begin_pause("model", NOTHING_TO_STOP)
    with pytest.raises(Refused, match="serves already"):
        models.replace("model", [loaded])
    with pytest.raises(ProtocolError, match="changes its version") as caught:
        asyncio.run(ModelControl(models).load("model"))
    assert caught.value.status == 503
    models.end_pause("model")
    models.discard(loaded)
