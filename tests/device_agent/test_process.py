from __future__ import annotations

import asyncio
import errno
import gc
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any, Callable, Iterator

import numpy as np
import pytest

from agent_testing import AgentProcess, identity, linear, linear_bundle, session_of
from device_agent import affinity
from device_agent.batching.job import Job
from device_agent.config import Config, ModelConfig
from device_agent.engines.base import EngineError, EngineSettings, EngineUnavailable, InputError
from device_agent.engines.process import ProcessEngine
from device_agent.engines.source import EngineSource
from device_agent.errors import Refused
from device_agent.metrics import Metrics
from device_agent.models import Models
from device_agent.repository.repository import EXPLICIT, Repository, RepositorySettings
from device_agent.tensors import NUMPY_DTYPES, object_array

X = np.ones((1, 8), np.float32)


def _source(directory: Path, model: Any) -> EngineSource:
    path = directory / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return EngineSource("onnxruntime", str(path))


def _settings(run_timeout_s: float = 60.0, **changes: Any) -> EngineSettings:
    return EngineSettings(threads=1, isolate=True, run_timeout_s=run_timeout_s, **changes)


@pytest.fixture(name="open_engine")
def _open_engine(tmp_path: Path) -> Iterator[Callable[..., ProcessEngine]]:
    engines = []

    def open_engine(model: Any, **settings: Any) -> ProcessEngine:
        engines.append(ProcessEngine(_source(tmp_path, model), _settings(**settings)))
        return engines[-1]

    yield open_engine
    for engine in engines:
        engine.close()


def _until(condition: Callable[[], Any], timeout_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it never came"
        time.sleep(0.01)


def _is_alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


# Tensors


def test_every_dtype_crosses_to_the_process_and_back_unchanged(tmp_path: Path) -> None:
    """Tensors of every type, empty ones and scalars' neighbours included, come back bit for bit."""
    from device_agent.engines.process_memory import SharedMemory, read_tensors, write_tensors
    from device_agent.manifest import TensorSpec

    arrays, specs = {}, []
    for dtype in sorted(NUMPY_DTYPES):
        specs.append(TensorSpec(dtype, dtype, (-1, -1)))
        if dtype == "BYTES":
            arrays[dtype] = object_array([b"", b"a\0", b"\xff" * 300, b"x", b"y", b"z"], (2, 3))
        else:
            arrays[dtype] = np.arange(6).reshape(2, 3).astype(NUMPY_DTYPES[dtype])
    for name, shape in (("empty", (0, 3)), ("scalar", ())):
        specs.append(TensorSpec(name, "FP32", shape))
        arrays[name] = np.full(shape, 7, np.float32)
    specs.append(TensorSpec("strided", "FP32", (-1, -1)))
    arrays["strided"] = np.arange(600_000, dtype=np.float32).reshape(300, 2000)[::2, ::-1]
    writer = SharedMemory.create("test")
    reader = SharedMemory(os.dup(writer.descriptor))
    read = read_tensors(reader, specs, write_tensors(writer, specs, arrays))
    for name, array in arrays.items():
        assert read[name].shape == array.shape
        assert read[name].tolist() == array.tolist()
    del read
    writer.close()
    reader.close()


@pytest.mark.parametrize("cut", [0, 7, 20])
def test_a_broken_header_is_an_error_not_a_wrong_tensor(cut: int) -> None:
    """What is no header, or points outside the memory, is refused."""
    from device_agent.engines.process_memory import SharedMemory, read_tensors, write_tensors
    from device_agent.manifest import TensorSpec

    memory = SharedMemory.create("test")
    specs = [TensorSpec("x", "FP32", (-1, 8))]
    header = write_tensors(memory, specs, {"x": X})
    far = header[:8] + (2**40).to_bytes(8, "little") + header[16:]
    for broken in (header[:cut], far, (2**40).to_bytes(8, "little") + header[8:]):
        with pytest.raises(EngineError):
            read_tensors(memory, specs, broken)
    memory.close()


def test_answers_are_those_of_the_runtime_and_stay(open_engine: Callable[..., ProcessEngine]) -> None:
    """An isolated engine answers as ONNX Runtime does, for any size; later runs change no answer."""
    engine = open_engine(linear())
    session = session_of(linear())
    inputs = [np.random.default_rng(i).standard_normal((rows, 8)).astype(np.float32)
              for i, rows in enumerate((1, 5, 100_000, 2))]  # fmt: skip
    answers = [engine.run({"x": x})["scores"] for x in inputs]
    for x, answer in zip(inputs, answers):
        np.testing.assert_array_equal(answer, session.run(None, {"x": x})[0])
    assert engine.process != os.getpid()
    assert (engine.inputs[0].name, engine.outputs[0].shape) == ("x", (-1, 4))


def test_a_request_that_fails_leaves_the_process_alone(open_engine: Callable[..., ProcessEngine]) -> None:
    """Inputs that the graph or the runtime cannot take are errors of their own kind; the next run works."""
    engine = open_engine(identity("BYTES", (-1, 1)))
    process = engine.process
    with pytest.raises(InputError, match="UTF-8"):
        engine.run({"x": object_array([b"\xff"], (1, 1))})
    with pytest.raises(EngineError, match="float32"):
        engine.run({"x": np.zeros((1, 1), np.float32)})
    assert engine.run({"x": object_array([b"a"], (1, 1))})["y"].tolist() == [[b"a"]]
    assert engine.process == process


def test_a_graph_that_does_not_load_is_refused_with_the_runtimes_reason(tmp_path: Path) -> None:
    """Opening an isolated engine fails as opening any other does."""
    path = tmp_path / "m.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(Refused, match=r"does not load m\.onnx"):
        ProcessEngine(EngineSource("onnxruntime", str(path)), _settings())


@pytest.mark.parametrize("cannot", ["socketpair", "Popen"])
def test_a_process_that_cannot_be_started_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cannot: str
) -> None:
    """A device without room for a process is asked again and again; no try costs descriptors or memory."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(socket if cannot == "socketpair" else subprocess, cannot, refuse)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(Refused, match="cannot be started"):
            ProcessEngine(_source(tmp_path, linear()), _settings())
    gc.collect()  # an error knows its frames, and with them what is mapped
    assert len(os.listdir("/proc/self/fd")) <= before  # threads of other tests may still end


# Crashes


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_crash_fails_the_run_and_the_process_serves_again(
    open_engine: Callable[..., ProcessEngine], number: signal.Signals
) -> None:
    """The run that was under way says how the process ended; a new one is checked, and then serves."""
    engine = open_engine(linear())
    expected = engine.run({"x": X})["scores"]
    checked = []
    engine.keep_up(lambda candidate: checked.append(candidate.run({"x": X})["scores"]))
    process = engine.process
    os.kill(process, signal.SIGSTOP)  # so that the run is under way when it ends

    def crash() -> None:
        os.kill(process, number)
        if number != signal.SIGKILL:  # which ends a stopped process; the others wait until it goes on
            os.kill(process, signal.SIGCONT)

    threading.Timer(0.2, crash).start()
    with pytest.raises(EngineUnavailable, match=number.name):
        engine.run({"x": X})
    _until(lambda: engine.restarts == 1)
    np.testing.assert_array_equal(engine.run({"x": X})["scores"], expected)
    np.testing.assert_array_equal(checked[0], expected)
    assert engine.process not in (0, process)
    assert number.name in engine.last_failure


def test_ending_a_process_that_another_thread_has_waited_for_is_no_error(
    open_engine: Callable[..., ProcessEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the end of a process and the note of it, a run that fails says how the process ended."""
    engine = open_engine(linear())

    def gone(process: int, number: int) -> None:
        raise ProcessLookupError

    serving = engine._serving
    assert serving is not None
    os.kill(serving.process, signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr(os, "kill", gone)
        serving.kill()
    serving.kill()
    assert "SIGKILL" in serving.wait()


def test_a_hang_ends_after_its_timeout(open_engine: Callable[..., ProcessEngine]) -> None:
    """A run that takes longer than run_timeout_s is given up, its process is ended, and a new one serves."""
    engine = open_engine(linear(), run_timeout_s=0.5)
    engine.keep_up(lambda candidate: None)
    os.kill(engine.process, signal.SIGSTOP)
    with pytest.raises(EngineUnavailable, match=r"within 0\.5 s"):
        engine.run({"x": X})
    _until(lambda: engine.restarts == 1)
    assert engine.run({"x": X})["scores"].shape == (1, 4)


def test_a_process_that_fails_its_check_does_not_serve(open_engine: Callable[..., ProcessEngine]) -> None:
    """After a crash nothing is answered until a process passes the self-test; attempts become rarer."""
    engine = open_engine(linear())
    verdicts = [Refused("bad", "bad", "bad"), EngineError("bad")]
    attempts_s = []

    def accept(candidate: Any) -> None:
        attempts_s.append(time.monotonic())
        with pytest.raises(EngineUnavailable, match="started again"):
            engine.run({"x": X})
        if verdicts:
            raise verdicts.pop()

    engine.keep_up(accept)
    os.kill(engine.process, signal.SIGKILL)
    _until(lambda: engine.restarts == 1)
    assert len(attempts_s) == 3
    assert attempts_s[2] - attempts_s[1] > 0.4  # the pauses double: 0.1, 0.2, 0.4
    assert engine.run({"x": X})["scores"].shape == (1, 4)


def test_closing_ends_a_process_that_hangs(open_engine: Callable[..., ProcessEngine]) -> None:
    """Unloading needs no help from the process, and leaves none behind."""
    engine = open_engine(linear())
    process = engine.process
    os.kill(process, signal.SIGSTOP)
    engine.close()
    assert not _is_alive(process)
    with pytest.raises(EngineUnavailable):
        engine.run({"x": X})


# Serving


def _isolated_models() -> Models:
    return Models(Config(threads=1, models={"model": ModelConfig(isolate=True)}), Metrics())


def test_twenty_cycles_give_their_memory_and_descriptors_back(tmp_path: Path) -> None:
    """Loading and unloading leaves no process, no descriptor and no growing memory in the agent."""
    bundle = linear_bundle(tmp_path / "1")
    models = _isolated_models()

    async def cycle() -> int:
        loaded = models.prepare(bundle.directory, bundle.manifest, bundle.digest)
        process = loaded.engine.process
        models.switch(loaded)
        models.unload("model")
        await models.retire(loaded)
        return process

    def held() -> Any:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd")), threading.active_count()

    async def main() -> Any:
        await cycle()
        await cycle()
        before = held()
        processes = [await cycle() for _ in range(20)]
        return before, held(), processes

    before, after, processes = asyncio.run(main())
    assert after[0] < 1.05 * before[0]
    assert after[1:] == before[1:]
    assert not any(map(_is_alive, processes))


def test_a_model_that_may_not_serve_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repository's model whose name an installed bundle has is refused, and its process ended."""
    bundle = linear_bundle(tmp_path / "1")
    models = _isolated_models()
    (tmp_path / "models" / "model" / "1").mkdir(parents=True)
    (tmp_path / "models" / "model" / "1" / "model.onnx").write_bytes(linear(seed=5).SerializeToString())
    opened, open_graph = [], models.loader.open_graph

    def open_and_note(*arguments: Any) -> Any:
        engine = open_graph(*arguments)
        opened.append(engine.process)
        return engine

    monkeypatch.setattr(models.loader, "open_graph", open_and_note)

    async def main() -> None:
        loaded = models.prepare(bundle.directory, bundle.manifest, bundle.digest)
        models.switch(loaded)
        await Repository(RepositorySettings(tmp_path / "models"), models).start()
        assert models.get("model") is loaded
        assert loaded.engine.process
        models.unload("model")
        await models.retire(loaded)

    asyncio.run(main())
    assert [_is_alive(process) for process in opened] == [False]


def test_a_model_that_was_uploaded_twice_survives_its_crash(tmp_path: Path) -> None:
    """The same files once more change nothing; the process still finds them when it is started again."""
    models = _isolated_models()
    (tmp_path / "models").mkdir()
    files = {"1/model.onnx": linear().SerializeToString()}

    async def main() -> None:
        repository = Repository(RepositorySettings(tmp_path / "models", EXPLICIT), models)
        try:
            for _ in range(2):
                for replaced in await repository.load("model", "{}", files):
                    await models.retire(replaced)
            loaded = models.get("model")
            assert loaded is not None
            os.kill(loaded.engine.process, signal.SIGKILL)
            _until(lambda: loaded.why_down)
            _until(lambda: not loaded.why_down)
            for replaced in repository.unload("model"):
                await models.retire(replaced)
        finally:
            repository.close()

    asyncio.run(main())


def test_an_isolated_model_never_runs_on_the_event_loop(tmp_path: Path) -> None:
    """However short its runs are, a process that hangs holds up its own model only, not the agent."""
    bundle = linear_bundle(tmp_path / "1")
    models = _isolated_models()

    async def main() -> None:
        loaded = models.prepare(bundle.directory, bundle.manifest, bundle.digest)
        for _ in range(50):
            loaded.batcher.latency.observe(1, 1e-6)
        os.kill(loaded.engine.process, signal.SIGSTOP)
        done = asyncio.get_running_loop().create_future()
        loaded.batcher.submit(Job({"x": X}, 1, "k", done.set_result))
        await asyncio.sleep(0.1)  # the loop turns
        assert not done.done()
        os.kill(loaded.engine.process, signal.SIGCONT)
        job = await done
        assert job.error is None
        await models.retire(loaded)

    asyncio.run(main())


def test_an_isolated_model_survives_its_crash_over_http(
    tmp_path: Path, start_agent: Callable[..., AgentProcess]
) -> None:
    """While the process is gone clients get 503 with Retry-After and the cause, and then answers again."""
    import tritonclient.http as triton

    agent = start_agent(linear_bundle(tmp_path / "b"), settings="\n[models.model]\nisolate = true\n")
    (worker,) = _children(agent.process.pid)
    os.kill(worker, signal.SIGSTOP)
    threading.Timer(0.3, os.kill, (worker, signal.SIGKILL)).start()
    with triton.InferenceServerClient(agent.http) as client:
        x = triton.InferInput("x", [1, 8], "FP32")
        x.set_data_from_numpy(X)
        with pytest.raises(triton.InferenceServerException, match="SIGKILL") as caught:
            client.infer("model", [x])
        assert "503" in str(caught.value.status())
        agent.wait_for("serves again")
        np.testing.assert_allclose(
            client.infer("model", [x]).as_numpy("scores"), session_of(linear()).run(None, {"x": X})[0]
        )
    (successor,) = _children(agent.process.pid)
    assert agent.stop() == 0
    _until(lambda: not _is_alive(successor))


def test_an_isolated_model_is_not_ready_while_its_process_is_gone(
    tmp_path: Path, start_agent: Callable[..., AgentProcess]
) -> None:
    """Both protocols and the index say so until a new process passes its check; the restart is counted."""
    import tritonclient.grpc
    import tritonclient.http

    settings = "\n[models.model]\nisolate = true\n[grpc]\nenabled = true\nport = 0\n"
    bundle = linear_bundle(tmp_path / "b")
    agent = start_agent(bundle, settings=settings)
    grpc_address = agent.wait_for(r" grpc=(\S+)").group(1)
    http = tritonclient.http.InferenceServerClient(agent.http)
    grpc = tritonclient.grpc.InferenceServerClient(grpc_address)
    counter = f'edgekit_inference_engine_restarts_total{{digest="{bundle.digest}",model="model"}} '
    with http, grpc:
        assert http.is_model_ready("model")
        assert grpc.is_model_ready("model")
        assert counter + "0.0" in _metrics_page(agent)
        held = tmp_path / "held"
        # A new process cannot be checked while the golden inputs are away, so the old one stays alone.
        golden = next((tmp_path / "agent0" / "state").rglob(bundle.manifest.golden.inputs))
        golden.rename(held)
        os.kill(next(iter(_children(agent.process.pid))), signal.SIGKILL)
        _until(lambda: not http.is_model_ready("model"))
        assert not grpc.is_model_ready("model")
        assert not http.is_server_ready()
        assert not grpc.is_server_ready()
        assert http.is_server_live()
        (entry,) = http.get_model_repository_index()
        assert entry["state"] == "UNAVAILABLE"
        assert "SIGKILL" in entry["reason"]
        held.rename(golden)
        _until(lambda: http.is_model_ready("model"))
        assert grpc.is_model_ready("model")
        assert http.is_server_ready()
        assert http.get_model_repository_index()[0]["state"] == "READY"
        _until(lambda: counter + "1.0" in _metrics_page(agent))


def _metrics_page(agent: AgentProcess) -> str:
    with urllib.request.urlopen(f"http://{agent.metrics}/metrics", timeout=10) as response:
        return str(response.read().decode())


def test_no_process_outlives_an_agent_that_is_killed(
    tmp_path: Path, start_agent: Callable[..., AgentProcess]
) -> None:
    """Whatever ends the agent ends its engines, also one that hangs."""
    agent = start_agent(linear_bundle(tmp_path / "b"), settings="\n[models.model]\nisolate = true\n")
    (worker,) = _children(agent.process.pid)
    os.kill(worker, signal.SIGSTOP)
    agent.kill()
    _until(lambda: not _is_alive(worker))
    assert not _is_alive(worker)


def _children(process: int) -> Any:
    children = set()
    for thread in affinity.threads_of(process):
        text = Path(f"/proc/{process}/task/{thread}/children").read_text()
        children |= set(map(int, text.split()))
    return children


def test_an_isolated_engine_runs_on_its_cores(open_engine: Callable[..., ProcessEngine]) -> None:
    """Every thread of the process is where the model's settings want it."""
    core = max(os.sched_getaffinity(0))
    engine = open_engine(linear(), placement=affinity.Placement((core,)))
    report = affinity.describe(engine.process, engine.threads)
    assert report
    assert {entry["cpus"] for entry in report} == {str(core)}
