"""Brings a version up: opens its engine, self-tests it, and puts a warm queue in front of it."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Optional

from device_agent.affinity import ANYWHERE
from device_agent.batching.batcher import Batcher, BatcherSettings
from device_agent.batching.cores import Shares, on_one_core
from device_agent.batching.settings import Batching
from device_agent.building.builds import EngineBuilds
from device_agent.config import Config
from device_agent.engines import candidates, keep_up, on_restart, open_as_set
from device_agent.engines.base import Engine, EngineError, EngineSettings
from device_agent.engines.source import EngineSource
from device_agent.errors import AgentError, Refused
from device_agent.loaded import LoadedModel, is_batchable
from device_agent.manifest import Manifest, Resources
from device_agent.memory import give_back, resident_bytes
from device_agent.metrics import Metrics
from device_agent.resources import NO_WISHES, engine_settings
from device_agent.selftest import check, load_arrays
from device_agent.swap_plan import Cost
from device_agent.warmup import learn_latency

_log = logging.getLogger(__name__)


class Loader:
    """Opens engines as the agent is configured.

    Args:
        config: the settings of the agent and of each model.
        metrics: counts what the batchers do.
        builds: the engines that this device builds for itself.
    """

    def __init__(self, config: Config, metrics: Metrics, builds: EngineBuilds) -> None:
        self._config = config
        self._metrics = metrics
        self._builds = builds
        self._shares = Shares(config.concurrent_runs)

    def load(self, directory: Path, manifest: Manifest, digest: str) -> LoadedModel:
        """Open the engine of an unpacked bundle, self-test it and warm it up. Blocks.

        Raises:
            Missing: a runtime is not installed.
            Refused: no engine loads and reproduces the golden outputs, not even the portable graph.
        """
        settings = self.settings_of(manifest)
        failure: Optional[Refused] = None
        started_s, before_bytes = time.monotonic(), resident_bytes(os.getpid())
        built = self._builds.source(directory, manifest)

        def passed_over(source: EngineSource, error: AgentError) -> None:
            if source is built:
                self._builds.passed_over(manifest, f"{error.what}: {error.why}")

        for engine in candidates(directory, manifest, settings, built, passed_over):
            try:
                loaded = self._bring_up(engine, directory, manifest, digest)
                apart = engine.process != os.getpid()
                grown_bytes = resident_bytes(engine.process) - (0 if apart else before_bytes)
                return replace(loaded, cost=Cost(max(0, grown_bytes), time.monotonic() - started_s))
            except Refused as error:
                _log.warning("%s of %s: %s: %s", engine.runtime, manifest.name, error.what, error.why)
                failure = error
                if built is not None and engine.runtime == built.runtime:
                    self._builds.reject(manifest, f"{error.what}: {error.why}")
        raise failure or Refused(
            f"{manifest.name} has no engine for this device", "none fits", "build the bundle for this device"
        )

    def open_graph(self, graph: Path, name: str, threads: Optional[int]) -> Engine:
        """Load an ONNX file that no bundle describes, as a model of ``name`` is configured. Blocks.

        Args:
            graph: the file.
            name: the model's.
            threads: of one run, where the configuration has no own number for the model; None: the agent's.

        Raises:
            Missing: ONNX Runtime is not installed.
            Refused: it does not take the file.
        """
        settings = engine_settings(self._config, name, Resources(threads))
        engine = open_as_set(EngineSource("onnxruntime", str(graph)), settings)
        keep_up(engine, _accept_any)
        return engine

    def graph_batcher(
        self, engine: Engine, manifest: Manifest, digest: str, batching: Optional[Batching]
    ) -> Batcher:
        """The queue in front of an engine of :meth:`open_graph`; without ``batching`` requests run alone."""
        size = manifest.max_batch_size if batching is not None and is_batchable(manifest) else 1
        return self._batcher(engine, manifest, digest, size, batching or Batching())

    def settings_of(self, manifest: Manifest) -> EngineSettings:
        """Where and how a model's engine runs here."""
        return engine_settings(self._config, manifest.name, manifest.resources or NO_WISHES)

    def _bring_up(self, engine: Engine, directory: Path, manifest: Manifest, digest: str) -> LoadedModel:
        try:
            selftest = check(engine, directory, manifest)
            size = manifest.max_batch_size if is_batchable(manifest) else 1
            batcher = self._batcher(engine, manifest, digest, size, self._config.batching)
            _warm_up(engine, batcher, directory, manifest)
            keep_up(engine, partial(check, directory=directory, manifest=manifest))
        except BaseException:
            engine.close()
            raise
        give_back()
        return LoadedModel(manifest, digest, directory, engine, batcher, selftest, is_batchable(manifest))

    def _batcher(
        self, engine: Engine, manifest: Manifest, digest: str, max_batch_size: int, batching: Batching
    ) -> Batcher:
        model = self._config.of_model(manifest.name)
        placed = self.settings_of(manifest)
        settings = BatcherSettings(
            max_batch_size=max_batch_size,
            max_queue_size=model.max_queue_size or self._config.limits.max_queue_size,
            batching=model.batching or batching,
            slo_s=model.slo_ms / 1e3 or None,
            weight=model.weight,
            one_core=on_one_core(placed),
            own_thread=placed.isolate or bool(placed.placement),
            # An isolated engine's process has its place; what is left here only waits for it.
            placement=ANYWHERE if placed.isolate else placed.placement,
        )
        metrics = self._metrics.of_model(manifest.name, digest)
        on_restart(engine, metrics.count_engine_restart)
        return Batcher(engine, settings, metrics, self._shares.of(placed))


def _accept_any(engine: Engine) -> None:
    """A repository's model has no golden outputs: an engine process that loads it may serve."""


def _warm_up(engine: Engine, batcher: Batcher, directory: Path, manifest: Manifest) -> None:
    """Run the golden inputs until buffers are allocated and the latency of small batches is known."""
    golden = load_arrays(directory / manifest.golden.inputs, manifest.inputs)
    try:
        learn_latency(
            engine, batcher.latency, golden, manifest.max_batch_size if is_batchable(manifest) else 0
        )
    except EngineError as error:
        raise Refused(
            f"{manifest.name} version {manifest.version} does not run at every batch size that it states",
            str(error),
            "build the bundle again with a smaller max_batch_size",
        ) from error
