"""The engines that this device builds: what is wanted, what is there, what goes on, and why there is none.

A build runs in a process of its own while something else serves: the old version, or ONNX Runtime. What it
gives is served only after it reproduced the golden outputs. One build runs at a time.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Callable, Dict, Mapping, Optional

from device_agent.building import process
from device_agent.building.cache import BuiltEngines
from device_agent.building.choice import Wanted, choose
from device_agent.building.process import BuildFailed, BuildStopped
from device_agent.config import Config
from device_agent.engines import load_runtime
from device_agent.engines.source import EngineSource, with_steps
from device_agent.manifest import Manifest
from device_agent.metrics import Metrics
from device_agent.swap_plan import available_bytes

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildReport:
    """How it stands with the engine that a model should have here, for ``status``.

    Attributes:
        state: ``wanted``, ``building``, ``built``, or ``failed``: ONNX Runtime serves in its place.
        runtime, precision: of the engine.
        phase: of a build that goes on, in TensorRT's words.
        done, steps: how far the phase is; 0 of 0 where TensorRT does not say.
        seconds: how long the build has taken.
        why: why it failed; empty: it did not.
        about: of a build that succeeded: ``layers``, ``not_on_dla``, ``constrained``, ``warnings``.
    """

    state: str
    runtime: str
    precision: str
    phase: str = ""
    done: int = 0
    steps: int = 0
    seconds: float = 0.0
    why: str = ""
    about: Optional[Mapping[str, Any]] = None


class EngineBuilds:
    """Builds engines and remembers what came of it. Every method may be called from any thread.

    Attributes:
        missing: set whenever a model is loaded without the engine that it should have.
    """

    def __init__(self, config: Config, metrics: Metrics) -> None:
        self._config = config
        self._metrics = metrics
        self._cache = BuiltEngines(config.state_dir / "engines")
        self._one_at_a_time = threading.Lock()
        self.missing = threading.Event()
        self._reports: Dict[str, BuildReport] = {}

    def wanted(self, manifest: Manifest) -> Optional[Wanted]:
        """The engine that this device should have built of a bundle; None: it needs none."""
        return choose(manifest, lambda runtime: load_runtime(runtime).fingerprint())

    def source(self, directory: Path, manifest: Manifest) -> Optional[EngineSource]:
        """What was built here for an unpacked bundle; None: nothing, or it needs nothing."""
        wanted = self.wanted(manifest)
        if wanted is None:
            self._reports.pop(manifest.name, None)
            return None
        path = self._cache.find(wanted)
        if path is None:
            why = self._cache.why_given_up(wanted)
            self._set(manifest.name, _report(wanted, "failed" if why else "wanted", why=why))
            if not why:
                self.missing.set()
            return None
        if self._state(manifest.name) != "built":
            self._set(manifest.name, _report(wanted, "built", about=self._cache.about(wanted)))
        return with_steps(EngineSource(wanted.build.runtime, str(path), wanted.device), directory, manifest)

    def is_missing(self, manifest: Manifest) -> bool:
        """Whether an engine should be built: it is wanted, not there, and not given up."""
        wanted = self.wanted(manifest)
        return (
            wanted is not None and not self._cache.why_given_up(wanted) and self._cache.find(wanted) is None
        )

    def build(
        self,
        directory: Path,
        manifest: Manifest,
        stop: threading.Event,
        tell: Callable[[str], None] = lambda line: None,
    ) -> bool:
        """Build what an unpacked bundle wants here. Blocks; takes minutes.

        Args:
            directory: where the bundle is.
            manifest: the bundle's.
            stop: set when the agent stops.
            tell: called with a line for a person now and then.

        Returns:
            Whether the engine is there now; why it is not, ``report`` says.

        Raises:
            BuildStopped: the agent stops.
        """
        with self._one_at_a_time:
            wanted = self.wanted(manifest)
            if wanted is None or not self.is_missing(manifest):
                return wanted is not None and self._cache.find(wanted) is not None
            began_s = time.monotonic()
            try:
                about = self._run(wanted, directory, manifest.name, stop, tell)
                seconds = time.monotonic() - began_s
                self._cache.keep(wanted, manifest.name, {**about, "seconds": seconds})
            except BuildStopped:
                self._cache.forget_attempt(wanted)
                self._set(manifest.name, _report(wanted, "wanted"))
                raise
            except (BuildFailed, OSError) as error:
                why = error.why if isinstance(error, BuildFailed) else str(error)
                with suppress(OSError):  # a full disk
                    self._cache.give_up(wanted, why, final=isinstance(error, BuildFailed) and error.final)
                self._fail(wanted, manifest.name, why, time.monotonic() - began_s)
                return False
            self._set(manifest.name, _report(wanted, "built", seconds=seconds, about=about))
            self._metrics.of_builds(manifest.name).succeeded(seconds)
            _log.info("%s: its %s engine was built in %.0f s", manifest.name, wanted.build.precision, seconds)
            if wanted.build.dla_core is not None:
                left, layers = about["not_on_dla"], about["layers"]
                _log.info(
                    "%s: on its DLA, the GPU runs %d of its %d layers", manifest.name, len(left), layers
                )
            return True

    def passed_over(self, manifest: Manifest, why: str) -> None:
        """An engine that was built here does not load this time, for want of memory perhaps."""
        wanted = self.wanted(manifest)
        if wanted is not None:
            self._fail(wanted, manifest.name, why, 0.0)

    def reject(self, manifest: Manifest, why: str) -> None:
        """An engine that was built here does not reproduce the golden outputs; it is not built again."""
        wanted = self.wanted(manifest)
        if wanted is not None:
            self._cache.reject(wanted, why)
            self._fail(wanted, manifest.name, why, 0.0)

    def report(self, name: str) -> Optional[Dict[str, Any]]:
        """How it stands with a model's engine, for ``status``; None: it needs none to be built."""
        report = self._reports.get(name)
        return None if report is None else asdict(report)

    def _run(
        self, wanted: Wanted, directory: Path, name: str, stop: threading.Event, tell: Callable[[str], None]
    ) -> Dict[str, Any]:
        self._cache.begin(wanted)
        reserve_bytes = self._config.limits.memory_reserve_bytes
        limits = process.Limits(
            self._config.timeouts.build_s,
            lambda: available_bytes(reserve_bytes),
            available_bytes(reserve_bytes),
        )
        building = _report(wanted, "building")
        self._set(name, building)
        tell(f"building a {building.precision} engine with {building.runtime}; what serves goes on")
        began_s = time.monotonic()

        def on_progress(message: Mapping[str, Any]) -> None:
            now = replace(
                building,
                phase=str(message.get("phase", "")),
                done=int(message.get("done", 0)),
                steps=int(message.get("steps", 0)),
                seconds=time.monotonic() - began_s,
            )
            self._set(name, now)
            tell(f"building: {now.phase}" + (f", {now.done} of {now.steps}" if now.steps else ""))

        return process.run(self._job(wanted, directory), limits, on_progress, stop)

    def _job(self, wanted: Wanted, directory: Path) -> Dict[str, Any]:
        build = wanted.build
        return {
            "runtime": build.runtime,
            "graph": str(directory / build.graph),
            "precision": build.precision,
            "shapes": {name: [s.least, s.usual, s.most] for name, s in build.shapes.items()},
            "workspace_bytes": build.workspace_bytes,
            "calibration_cache": _below(directory, build.calibration_cache),
            "layer_precisions": _below(directory, build.layer_precisions),
            "dla_core": build.dla_core,
            "sm": wanted.fingerprint["sm"],
            "timing_cache": str(self._cache.timing_cache(wanted)),
            "engine": str(self._cache.place(wanted)),
        }

    def _fail(self, wanted: Wanted, name: str, why: str, seconds: float) -> None:
        self._set(name, _report(wanted, "failed", why=why, seconds=seconds))
        self._metrics.of_builds(name).failed()
        _log.error("%s: ONNX Runtime serves it, for there is no engine: %s", name, why)

    def _set(self, name: str, report: BuildReport) -> None:
        self._reports[name] = report
        self._metrics.of_builds(name).fallback = report.state == "failed"

    def _state(self, name: str) -> str:
        report = self._reports.get(name)
        return "" if report is None else report.state


def _report(wanted: Wanted, state: str, **more: Any) -> BuildReport:
    return BuildReport(state, wanted.build.runtime, wanted.build.precision, **more)


def _below(directory: Path, path: str) -> str:
    return str(directory / path) if path else ""
