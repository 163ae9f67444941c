"""The agent as a process on the GPU machine, and a client of it. Python 3.8, standard library."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any, Dict

import numpy as np

from device_agent.server import control

_SERVE = "import sys; from device_agent.cli import main; sys.exit(main())"
_DATATYPES = {"int64": "INT64", "float32": "FP32"}


def seed_timings(state: Path, timings: Path) -> None:
    """Give an agent what was measured here already, so that its builds take seconds."""
    from device_agent.engines.tensorrt import fingerprint  # a device may have another runtime

    own = json.dumps(dict(fingerprint()), sort_keys=True)
    engines = state / "engines"
    engines.mkdir(parents=True, exist_ok=True)
    name = f"timing-{hashlib.sha256(own.encode()).hexdigest()[:16]}.cache"
    (engines / name).write_bytes(timings.read_bytes())


class Agent:
    """``edgekit-agent serve`` with a state directory of its own."""

    def __init__(self, root: Path, settings: str = "") -> None:
        root.mkdir(parents=True, exist_ok=True)
        (root / "keys").mkdir(exist_ok=True)
        self.control = root / "control.sock"
        self.state = root / "state"
        self._log = root / "agent.log"
        self._config = root / "agent.toml"
        self._config.write_text(
            f'state_dir = "{self.state}"\nkeys_dir = "{root / "keys"}"\n'
            f'control_socket = "{self.control}"\nallow_unsigned = true\n{settings}\n'
            "[http]\nport = 0\n[grpc]\nenabled = false\n[metrics]\nport = 0\n[probation]\nduration_s = 0\n"
        )
        self.http = self.metrics = ""
        self.process: Any = None

    def start(self) -> Agent:
        """Start, and return when it serves."""
        with self._log.open("ab") as log:
            at = log.tell()
            paths = os.pathsep.join(filter(None, sys.path))
            self.process = subprocess.Popen(
                [sys.executable, "-c", _SERVE, "serve", "--config", str(self._config)],
                stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": paths},
            )  # fmt: skip
        deadline_s = time.monotonic() + 120
        while time.monotonic() < deadline_s and self.process.poll() is None:
            found = re.search(r"listening http=(\S+) metrics=(\S+)", self.log()[at:])
            if found:
                self.http, self.metrics = found.group(1), found.group(2)
                return self
            time.sleep(0.05)
        raise RuntimeError("the agent does not start: " + self.log()[-2000:])

    def log(self) -> str:
        """All that it logged."""
        return self._log.read_text(errors="replace")

    def install(self, bundle: Path) -> None:
        """Install a bundle, and make it active."""
        self.ask({"op": "install", "bundle": str(bundle)})

    def ask(self, message: Dict[str, Any]) -> Any:
        """Send a request to the control socket."""
        return control.request(self.control, message, lambda state: None)

    def status(self) -> Dict[str, Any]:
        """Of its one model."""
        found: Dict[str, Any] = self.ask({"op": "status"})[0]
        return found

    def wait(self, *states: str, timeout_s: float = 300.0) -> Dict[str, Any]:
        """Wait until the model's engine is in one of these states and what follows from it serves."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            status = self.status()
            build, runtime = status["engine_build"], status["engine"]["runtime"]
            settled = not build or build["state"] not in ("built", "failed")
            swapped = build and (build["state"] == "built") == (runtime != "onnxruntime")
            if build and build["state"] in states and (settled or swapped):
                return status
            time.sleep(0.1)
        raise RuntimeError(f"the engine never was {states}: {self.status()}")

    def infer(self, name: str, inputs: Dict[str, np.ndarray]) -> np.ndarray:
        """The model's only output."""
        tensors = [
            {
                "name": key,
                "datatype": _DATATYPES[str(array.dtype)],
                "shape": list(array.shape),
                "data": array.ravel().tolist(),
            }
            for key, array in inputs.items()
        ]
        request = urllib.request.Request(
            f"http://{self.http}/v2/models/{name}/infer", json.dumps({"inputs": tensors}).encode()
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            output = json.load(answer)["outputs"][0]
        return np.array(output["data"], np.float32).reshape(output["shape"])

    def metric(self, prefix: str) -> Any:
        """The lines of /metrics that begin so."""
        with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=10) as answer:
            return [line for line in answer.read().decode().splitlines() if line.startswith(prefix)]

    def builder(self) -> int:
        """The process that builds, a child of the agent; 0: there is none."""
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                if b"device_agent.building.child" in Path(f"/proc/{child}/cmdline").read_bytes():
                    return int(child)
        return 0

    def stop(self) -> int:
        """Stop it; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return int(self.process.wait(timeout=60))
        except subprocess.TimeoutExpired:
            self.process.kill()
            return -9
