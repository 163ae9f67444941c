"""The models that serve: engine, self-test and batcher as one, swapped as one.

A swap is a single assignment on the event loop: requests that came before it run on the old version, which
is closed when its queue is empty; requests after it run on the new one. None fails.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np

from device_agent.affinity import Placement, parse_cpus, resolve
from device_agent.batching.batcher import Batcher, BatcherSettings
from device_agent.batching.policy import PolicySettings
from device_agent.config import Config
from device_agent.engines import candidates
from device_agent.engines.base import Engine, EngineError, EngineSettings
from device_agent.errors import Refused
from device_agent.manifest import Manifest
from device_agent.memory import give_back
from device_agent.metrics import Metrics
from device_agent.selftest import SelfTest, check, load_arrays

_WARM_UP_RUNS = 3
_WARM_UP_BUDGET_S = 0.2  # for batches larger than one; a slow model learns them while it serves

_log = logging.getLogger(__name__)

Arrays = Dict[str, "np.ndarray[Any, Any]"]


@dataclass(frozen=True)
class LoadedModel:
    """A version that is ready to serve.

    Attributes:
        manifest: the bundle's manifest.
        digest: the bundle's identity.
        directory: where it is unpacked.
        engine: passed the self-test and is warm.
        batcher: the queue in front of the engine.
        selftest: how close it came to the golden outputs.
        batchable: whether requests may share a run: every tensor has a free batch axis.
    """

    manifest: Manifest
    digest: str
    directory: Path
    engine: Engine
    batcher: Batcher
    selftest: SelfTest
    batchable: bool

    @property
    def version(self) -> str:
        """The version as the protocol writes it."""
        return str(self.manifest.version)


class Models:
    """Loaded models by name."""

    def __init__(self, config: Config, metrics: Metrics) -> None:
        self._config = config
        self._metrics = metrics
        self._serving: Dict[str, LoadedModel] = {}

    def prepare(self, directory: Path, manifest: Manifest, digest: str) -> LoadedModel:
        """Open the engine of an unpacked bundle, self-test it and warm it up. Blocks; changes nothing.

        Raises:
            Missing: a runtime is not installed.
            Refused: no engine loads and reproduces the golden outputs, not even the portable graph.
        """
        settings = self._engine_settings(manifest.name)
        failure: Optional[Refused] = None
        for engine in candidates(directory, manifest, settings):
            try:
                return self._bring_up(engine, directory, manifest, digest)
            except Refused as error:
                _log.warning("%s of %s: %s: %s", engine.runtime, manifest.name, error.what, error.why)
                failure = error
        raise failure or Refused(
            f"{manifest.name} has no engine for this device", "none fits", "build the bundle for this device"
        )

    def _bring_up(self, engine: Engine, directory: Path, manifest: Manifest, digest: str) -> LoadedModel:
        try:
            selftest = check(engine, directory, manifest)
            batcher = Batcher(
                engine, self._batcher_settings(manifest), self._metrics.of_model(manifest.name, digest)
            )
            _warm_up(engine, batcher, directory, manifest)
        except BaseException:
            engine.close()
            raise
        give_back()
        return LoadedModel(manifest, digest, directory, engine, batcher, selftest, is_batchable(manifest))

    def switch(self, loaded: LoadedModel) -> Optional[LoadedModel]:
        """Send new requests to ``loaded``.

        Returns:
            The version that served until now, to be given to :meth:`retire`; None if there was none.
        """
        name = loaded.manifest.name
        old = self._serving.get(name)
        self._serving[name] = loaded
        self._metrics.activated(name, loaded.digest)
        return old

    def unload(self, name: str) -> Optional[LoadedModel]:
        """Serve ``name`` no more.

        Returns:
            The version that served, to be given to :meth:`retire`; None if there was none.
        """
        return self._serving.pop(name, None)

    async def retire(self, loaded: LoadedModel) -> None:
        """Let a replaced version finish what it accepted, then free it."""
        await loaded.batcher.drain()
        loaded.batcher.close()
        # Freeing a large model takes milliseconds, which the requests of others must not wait for.
        await asyncio.get_running_loop().run_in_executor(None, _close, loaded.engine)

    def get(self, name: str) -> Optional[LoadedModel]:
        """The serving version of a model."""
        return self._serving.get(name)

    def serving(self) -> List[LoadedModel]:
        """Every serving version, by name."""
        return [self._serving[name] for name in sorted(self._serving)]

    def _engine_settings(self, name: str) -> EngineSettings:
        model = self._config.of_model(name)
        node = None if model.numa_node < 0 else model.numa_node
        placement = resolve(Placement(parse_cpus(model.cpus), node))
        return EngineSettings(self._config.threads if model.threads < 0 else model.threads, placement)

    def _batcher_settings(self, manifest: Manifest) -> BatcherSettings:
        policy = PolicySettings(
            max_batch_size=manifest.max_batch_size if is_batchable(manifest) else 1,
            max_queue_delay_s=self._config.batching.max_queue_delay_us / 1e6,
        )
        return BatcherSettings(policy, self._config.limits.max_queue_size)


def _close(engine: Engine) -> None:
    engine.close()
    give_back()


def is_batchable(manifest: Manifest) -> bool:
    """Whether every tensor has a free first axis, which then is the batch."""
    return all(spec.shape[:1] == (-1,) for spec in manifest.inputs + manifest.outputs)


def _warm_up(engine: Engine, batcher: Batcher, directory: Path, manifest: Manifest) -> None:
    """Run the golden inputs until buffers are allocated and the latency of small batches is known."""
    golden = load_arrays(directory / manifest.golden.inputs, manifest.inputs)
    largest = manifest.max_batch_size if is_batchable(manifest) else 1
    try:
        _timed_run(engine, golden, 1)  # the first run allocates; its time says nothing
        rows, deadline_s = 1, time.monotonic() + _WARM_UP_BUDGET_S
        while rows <= largest and (rows == 1 or _fits(batcher, rows, deadline_s)):
            for _ in range(_WARM_UP_RUNS):
                batcher.latency.observe(rows, _timed_run(engine, golden, rows))
            rows *= 2
    except EngineError as error:
        raise Refused(
            f"{manifest.name} version {manifest.version} does not run at every batch size that it states",
            str(error),
            "build the bundle again with a smaller max_batch_size",
        ) from error


def _fits(batcher: Batcher, rows: int, deadline_s: float) -> bool:
    expected_s = batcher.latency.predict(rows) or 0.0
    return time.monotonic() + _WARM_UP_RUNS * expected_s < deadline_s


def _timed_run(engine: Engine, golden: Arrays, rows: int) -> float:
    """Seconds for ``rows`` golden rows; a model without a free batch axis runs them as they are."""
    fixed = any(spec.shape[:1] != (-1,) for spec in engine.inputs)
    inputs = (
        golden
        if fixed
        else {name: np.take(array, range(rows), axis=0, mode="wrap") for name, array in golden.items()}
    )
    started_s = time.monotonic()
    engine.run(inputs)
    return time.monotonic() - started_s
