"""Engines that do not fit, and builds that come to nothing, with the real TensorRT and the real agent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict

import numpy as np

from agent_models import add_engine, error, file_entry
from agent_process import Agent, seed_timings
from device_agent.engines import cuda
from device_agent.errors import AgentError
from device_agent.manifest import MANIFEST_NAME, dumps, read

_HOG = """
import sys
from device_agent.engines.cuda import device
gpu = device(); gpu.use()
while gpu.free_bytes() > 300_000_000:
    gpu.allocate(min(1 << 30, gpu.free_bytes() - 250_000_000))
print('full', gpu.free_bytes(), flush=True)
sys.stdin.read()
"""

_OPEN = """
import sys
from device_agent.engines import open_here
from device_agent.engines.base import EngineSettings
from device_agent.engines.source import EngineSource
from device_agent.errors import AgentError
try:
    open_here(EngineSource("tensorrt", sys.argv[1]), EngineSettings())
    print("it loads")
except AgentError as error:
    print(error.what, "|", error.why)
"""


def run(bench: Any) -> Dict[str, Any]:
    """Every attack; each says what served in the end, and the one line of why."""
    figures: Dict[str, Any] = {"direct": _direct(bench)}
    cases: Dict[str, Callable[[Any, Path], Dict[str, Any]]] = {
        "first_start": _first_start,
        "prebuilt_for_another_sm": _wrong_sm,
        "prebuilt_by_another_tensorrt": _other_tensorrt,
        "prebuilt_for_another_model": _other_model,
        "golden_outputs_not_reproduced": _wrong_golden,
        "damaged_in_the_cache": _damaged,
        "build_child_killed": _killed,
        "no_gpu_memory_at_load": _no_memory,
    }
    for name, case in cases.items():
        try:
            figures[name] = case(bench, bench.work / "attacks" / name)
        except Exception as failure:
            figures[name] = {"attack_failed": f"{type(failure).__name__}: {failure}"[:1500]}
        print(name, figures[name], flush=True)
    return figures


def _direct(bench: Any) -> Dict[str, Any]:
    """What TensorRT itself says of files that are not for it."""
    good = bench.engine_file("digits", "fp16").read_bytes()
    files = {
        "empty": b"",
        "half": good[: len(good) // 2],
        "without_its_end": good[:-1],
        "noise": os.urandom(1000),
        "another_version": good[:24] + bytes([good[24] ^ 1]) + good[25:],
    }
    said: Dict[str, Any] = {}
    for name, data in files.items():
        path = bench.work / "direct.engine"
        path.write_bytes(data)
        # In a process of its own: what TensorRT makes of half an engine may not be an error.
        done = subprocess.run(
            [sys.executable, "-c", _OPEN, str(path)], capture_output=True, timeout=60,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )  # fmt: skip
        said[name] = (done.stdout.decode().strip() or f"exit status {done.returncode}")[-300:]
    return said


def _start(bench: Any, root: Path, route: str = "fp16", **changes: Any) -> Agent:
    bundle = bench.models["digits"].bundle(root / "bundle", route, **changes)
    seed_timings(root / "state", bench.work / "timing.cache")
    agent = Agent(root).start()
    agent.install(bundle)
    return agent


def _end(bench: Any, agent: Agent, *states: str) -> Dict[str, Any]:
    """What serves, how right it is, and why."""
    status = agent.wait(*(states or ("built", "failed")))
    model = bench.models["digits"]
    rows = {name: array[:4] for name, array in model.inputs.items()}
    found = {
        "serves": status["engine"]["runtime"],
        "state": status["engine_build"]["state"],
        "why": status["engine_build"]["why"],
        "error": error(agent.infer("digits", rows), model.reference[:4])["largest"],
        "fallback_metric": agent.metric("edgekit_engine_fallback{"),
        "log": [line for line in agent.log().splitlines() if "passed over" in line or "no engine" in line][
            -3:
        ],
    }
    found["stopped_with"] = agent.stop()
    return found


def _first_start(bench: Any, root: Path) -> Dict[str, Any]:
    """ONNX Runtime serves, the engine is built and takes over; the next start finds it."""
    agent = _start(bench, root)
    at_once = agent.status()["engine"]["runtime"]
    began_s = time.monotonic()
    built = _end(bench, agent, "built")
    took_s = time.monotonic() - began_s
    agent.start()
    again = _end(bench, agent, "built")
    return {"at_once": at_once, "after_the_build": built, "took_s": took_s, "next_start": again["serves"]}


def _with_engine(bench: Any, root: Path, data: bytes, **fingerprint: str) -> Agent:
    """A bundle with a prebuilt engine, and one to build."""
    bundle = add_engine(bench.models["digits"].bundle(root / "bundle", "fp16"), data, fingerprint)
    seed_timings(root / "state", bench.work / "timing.cache")
    agent = Agent(root).start()
    agent.install(bundle)
    return agent


def _wrong_sm(bench: Any, root: Path) -> Dict[str, Any]:
    data = bench.engine_file("digits", "fp16").read_bytes()
    return _end(bench, _with_engine(bench, root, data, sm="72", tensorrt="8.5.2.2"))


def _other_tensorrt(bench: Any, root: Path) -> Dict[str, Any]:
    data = bench.engine_file("digits", "fp16").read_bytes()
    return _end(bench, _with_engine(bench, root, data, sm=cuda.device().sm, tensorrt="8.6.1.6"))


def _without_build_report(bench: Any, agent: Agent) -> Dict[str, Any]:
    """A prebuilt engine that says it fits: none is built in its place."""
    model = bench.models["digits"]
    rows = {name: array[:4] for name, array in model.inputs.items()}
    found = {
        "serves": agent.status()["engine"]["runtime"],
        "error": error(agent.infer("digits", rows), model.reference[:4])["largest"],
        "log": [
            x for x in agent.log().splitlines() if "passed over" in x or "self-test" in x or "not the" in x
        ][-2:],
    }
    found["stopped_with"] = agent.stop()
    return found


def _other_model(bench: Any, root: Path) -> Dict[str, Any]:
    """An engine of other tensors and other shapes that claims to fit."""
    data = bench.engine_file("deep", "fp16").read_bytes()
    return _without_build_report(bench, _with_engine(bench, root, data, sm=cuda.device().sm))


def _wrong_golden(bench: Any, root: Path) -> Dict[str, Any]:
    """A bundle whose graph to build is not its portable one: the golden outputs find out."""
    model = bench.models["digits"]
    bundle = model.bundle(root / "bundle", "fp16")
    manifest, _ = read(bundle)
    outputs = {model.output: model.reference[:8] + np.float32(3.0)}
    np.savez(str(bundle / "golden_outputs.npz"), **outputs)
    files = tuple(
        file_entry(bundle / entry.path) if entry.path == "golden_outputs.npz" else entry
        for entry in manifest.files
    )
    (bundle / MANIFEST_NAME).write_bytes(dumps(replace(manifest, files=files)))
    agent = Agent(root).start()
    try:
        agent.install(bundle)
        said = "it was installed"
    except AgentError as failure:
        said = f"{failure.what} | {failure.why}"
    return {"said": said, "stopped_with": agent.stop()}


def _damaged(bench: Any, root: Path) -> Dict[str, Any]:
    """An engine that was cut short on disk is built again."""
    agent = _start(bench, root)
    agent.wait("built")
    agent.stop()
    cached = next((agent.state / "engines").glob("*.engine"))
    cached.write_bytes(cached.read_bytes()[:1000])
    agent.start()
    at_once = agent.status()["engine"]["runtime"]
    return {"at_once": at_once, **_end(bench, agent)}


def _killed(bench: Any, root: Path) -> Dict[str, Any]:
    agent = _start(bench, root)
    deadline_s = time.monotonic() + 30
    killed = 0
    while time.monotonic() < deadline_s and not killed:
        killed = agent.builder()
        time.sleep(0.05)
    os.kill(killed, signal.SIGKILL)
    return _end(bench, agent, "failed")


def _no_memory(bench: Any, root: Path) -> Dict[str, Any]:
    """The engine is there, and another process holds the GPU's memory when the agent starts."""
    agent = _start(bench, root)
    agent.wait("built")
    agent.stop()
    hog = subprocess.Popen(
        [sys.executable, "-c", _HOG], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    try:
        full = hog.stdout.readline().decode().strip() if hog.stdout else ""
        agent.start()
        found = _end(bench, agent, "failed", "built")
    finally:
        hog.kill()
        hog.wait()
    agent.start()
    return {"hog": full, **found, "afterwards": _end(bench, agent)["serves"]}
