"""The whole path of a bundle on the device that this runs on; see ``jetson.sh``. Python 3.8."""

from __future__ import annotations

import json
import platform
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from agent_process import Agent

from device_agent.building import process
from device_agent.building.builds import EngineBuilds
from device_agent.config import Config
from device_agent.engines import load_runtime
from device_agent.engines.tensorrt_build import describe_layers
from device_agent.engines.tensorrt_log import Said
from device_agent.engines.tensorrt_module import load
from device_agent.manifest import MANIFEST_NAME, Manifest, dumps, read
from device_agent.metrics import Metrics
from device_agent.selftest import load_arrays

REQUESTS = 300
BUILD_TIMEOUT_S = 3600.0


class DevicePath:
    """One bundle's way."""

    def __init__(self, bundle: Path, work: Path) -> None:
        self.bundle, self.work = bundle, work
        self.manifest: Manifest = read(bundle)[0]
        self.agent = Agent(work / "agent", f"[timeouts]\nbuild_s = {BUILD_TIMEOUT_S}\n")

    def device(self) -> dict[str, Any]:
        """What this is."""
        return {
            "model": _text("/proc/device-tree/model"),
            "jetpack": _text("/etc/nv_tegra_release"),
            "machine": platform.machine(),
            "kernel": platform.release(),
            "python": platform.python_version(),
            "fingerprint": dict(load_runtime(self._runtime()).fingerprint()),
        }

    def build(self) -> dict[str, Any]:
        """Install, build, and pass the golden check: an engine serves only after that."""
        self.agent.start()
        self.agent.install(self.bundle)
        first = self.agent.status()["engine"]["runtime"]
        status = self.agent.wait("built", "failed", timeout_s=BUILD_TIMEOUT_S)
        return {"meanwhile": first, "serves": status["engine"]["runtime"], **status["engine_build"]}

    def latency(self) -> dict[str, Any]:
        """Requests of one golden row, one after the other, over HTTP with JSON."""
        golden = load_arrays(self.bundle / self.manifest.golden.inputs, self.manifest.inputs)
        row = {name: array[:1] for name, array in golden.items()}
        times_ms = []
        for _ in range(REQUESTS):
            begin_s = time.perf_counter()
            self.agent.infer(self.manifest.name, row)
            times_ms.append(1e3 * (time.perf_counter() - begin_s))
        quantiles = {f"p{q}_ms": round(float(np.quantile(times_ms, q / 100)), 3) for q in (50, 95, 99)}
        return {"requests": REQUESTS, **quantiles}

    def layers(self) -> Any:
        """What TensorRT's inspector says of the engine that was built here."""
        trt = load(self._runtime())
        engine_file = next((self.agent.state / "engines").glob("*.engine"))
        runtime = trt.Runtime(Said(trt).logger)
        return json.loads(describe_layers(trt, runtime.deserialize_cuda_engine(engine_file.read_bytes())))

    def dla(self) -> dict[str, Any]:
        """Build for the DLA, whether or not the bundle asks for it; which layers the GPU keeps."""
        wanted = EngineBuilds(Config(state_dir=self.work / "dla"), Metrics()).wanted(self.manifest)
        if wanted is None:
            return {"skipped": "no build of the bundle is for this device"}
        if wanted.build.precision == "fp32":
            return {"skipped": "the DLA has no fp32"}
        build = wanted.build
        job = {
            "runtime": build.runtime,
            "graph": str(self.bundle / build.graph),
            "precision": build.precision,
            # The DLA takes fixed shapes alone.
            "shapes": {name: [s.least] * 3 for name, s in build.shapes.items()},
            "workspace_bytes": build.workspace_bytes,
            "calibration_cache": str(self.bundle / build.calibration_cache)
            if build.calibration_cache
            else "",
            "layer_precisions": "",
            "dla_core": 0,
            "sm": wanted.fingerprint["sm"],
            "timing_cache": str(self.work / "dla-timing.cache"),
            "engine": str(self.work / "dla.engine"),
        }
        limits = process.Limits(BUILD_TIMEOUT_S, lambda: None)
        return process.run(job, limits, lambda message: None, threading.Event())

    def rollback(self) -> dict[str, Any]:
        """Update to the same model under the next version, and return."""
        newer = self.work / "newer"
        shutil.copytree(str(self.bundle), str(newer))
        (newer / MANIFEST_NAME).write_bytes(dumps(replace(self.manifest, version=self.manifest.version + 1)))
        before = self.agent.status()["serving"]
        self.agent.install(newer)
        after = self.agent.status()["serving"]
        self.agent.ask({"op": "rollback", "name": self.manifest.name})
        status = self.agent.status()
        return {
            "updated": after != before,
            "returned": status["serving"] == before,
            "serves": status["engine"]["runtime"],
        }

    def stop(self) -> dict[str, Any]:
        """End the agent; what it logged last."""
        code = self.agent.stop()
        return {"exit_code": code, "log": self.agent.log().splitlines()[-40:]}

    def _runtime(self) -> str:
        return self.manifest.builds[0].runtime if self.manifest.builds else "tensorrt"


def main(bundle: Path, out: Path) -> int:
    """Go the way, write the document, and return 0 if every step came through."""
    document: dict[str, Any] = {"bundle": bundle.name, "failed": []}
    with tempfile.TemporaryDirectory() as work:
        way = DevicePath(bundle, Path(work))
        steps: dict[str, Callable[[], Any]] = {
            step.__name__: step
            for step in (way.device, way.build, way.latency, way.layers, way.dla, way.rollback, way.stop)
        }
        for name, step in steps.items():
            print(f"{name} ...", file=sys.stderr, flush=True)
            try:
                document[name] = step()
            except Exception as failure:  # the later steps may still say something
                document[name] = {"error": f"{type(failure).__name__}: {failure}"}
                document["failed"].append(name)
                traceback.print_exc()
            out.write_text(json.dumps(document, indent=2) + "\n")
    return 1 if document["failed"] else 0


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip("\0\n ")
    except OSError:
        return ""


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()))
