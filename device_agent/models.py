"""The models that serve, by name, swapped one for another.

An installed bundle serves one version; a model of a repository serves as many as its configuration says.

A swap is a single assignment on the event loop: requests that came before it run on the old version, which
is closed when its queue is empty; requests after it run on the new one. None fails.
"""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple

from device_agent.building.builds import EngineBuilds
from device_agent.config import Config
from device_agent.engine_report import report
from device_agent.engines.base import Engine
from device_agent.errors import Refused
from device_agent.loaded import LoadedModel
from device_agent.loading import Loader
from device_agent.manifest import Manifest
from device_agent.memory import give_back
from device_agent.metrics import Metrics
from device_agent.probation.shadow import Shadow, why_skipped
from device_agent.probation.verdict import Reference
from device_agent.probation.watch import Watch, reference_of
from device_agent.swap_plan import NOTHING_TO_STOP, SwapPlan, available_bytes, estimate, plan, require_memory


class Models:
    """Loaded models by name.

    Attributes:
        builds: the engines that this device builds for itself.
        loader: opens engines as they are configured here.
    """

    def __init__(self, config: Config, metrics: Metrics) -> None:
        self.builds = EngineBuilds(config, metrics)
        self.loader = Loader(config, metrics, self.builds)
        self._config = config
        self._metrics = metrics
        self._serving: Dict[str, Tuple[LoadedModel, ...]] = {}  # by name; versions ascend
        self._repository_names: Set[str] = set()
        self._pauses: Dict[str, SwapPlan] = {}
        self._retiring: List[LoadedModel] = []

    def prepare(self, directory: Path, manifest: Manifest, digest: str) -> LoadedModel:
        """Open the engine of an unpacked bundle, self-test it and warm it up. Blocks; changes nothing.

        Raises:
            Missing: a runtime is not installed.
            Refused: no engine loads and reproduces the golden outputs, not even the portable graph; or the
                model repository serves a model of that name.
        """
        if manifest.name in self._repository_names:
            raise Refused(
                f"a model named {manifest.name} serves already",
                "it comes from the model repository",
                "unload it there, or start the agent without --model-repository",
            )
        return self.loader.load(directory, manifest, digest)

    def describe_engine(self, name: str) -> Optional[Dict[str, Any]]:
        """Where a model's engine runs, read back now (see ``engine_report``); None if it does not serve."""
        loaded = self.get(name)
        return None if loaded is None else report(loaded, self.loader.settings_of(loaded.manifest))

    def plan_swap(self, manifest: Manifest) -> SwapPlan:
        """How a version would take the place of the one that serves, with what is free now."""
        old = self.get(manifest.name)
        if old is None:
            return NOTHING_TO_STOP
        needed_bytes = estimate(manifest, old.manifest, old.cost)
        return plan(needed_bytes, available_bytes(self._config.limits.memory_reserve_bytes), old.cost.load_s)

    def require_memory(self, manifest: Manifest) -> None:
        """Refuse a version that this device cannot hold, even without the one that serves.

        Raises:
            Refused: its weights alone take more than there is.
        """
        old = self.get(manifest.name)
        require_memory(manifest, available_bytes(0), 0 if old is None else old.cost.memory_bytes)

    def watch(
        self,
        loaded: LoadedModel,
        old: Optional[LoadedModel],
        *,
        paused: bool,
        live: bool,
        stop: threading.Event,
        seen_s: float,
    ) -> Watch:
        """The probation of a version that serves.

        Args:
            loaded: the version.
            old: the one before, if there was one.
            paused: whether the old one was freed already.
            live: whether requests can come.
            stop: set when the agent stops.
            seen_s: for how long it was watched before the agent was started again.
        """
        name = loaded.manifest.name
        reference = (
            Reference() if old is None else reference_of(old, self._metrics.of_model(name, old.digest))
        )
        return Watch(
            loaded,
            self._metrics.of_model(name, loaded.digest),
            None if paused else old,
            reference,
            self._config.probation,
            timeout_s=self._config.of_model(name).run_timeout_s,
            live=live,
            stop=stop,
            seen_s=seen_s,
        )

    def shadow(
        self,
        loaded: LoadedModel,
        old: Optional[LoadedModel],
        *,
        paused: bool,
        live: bool,
        stop: threading.Event,
    ) -> Optional[Shadow]:
        """What a version does before it serves, on copies of live requests; None: that is not asked for.

        Args:
            loaded: the version.
            old: the one that serves, if there is one.
            paused: whether that was freed already.
            live: whether requests can come.
            stop: set when the agent stops.

        Raises:
            Refused: the golden files cannot be read.
        """
        if not self._config.probation.shadow_fraction:
            return None
        name = loaded.manifest.name
        skipped = why_skipped(loaded, old, paused=paused, live=live)
        return Shadow(
            loaded,
            self._metrics.of_model(name, loaded.digest),
            None if skipped else old,
            self._config.probation,
            timeout_s=self._config.of_model(name).run_timeout_s,
            is_idle=self._is_idle,
            stop=stop,
            skipped=skipped,
        )

    def _is_idle(self) -> bool:
        """Whether no model has anything to do."""
        return all(loaded.batcher.idle for loaded in self.serving())

    def discard(self, loaded: LoadedModel) -> None:
        """Free a version that never served."""
        loaded.batcher.close()
        _close(loaded.engine)

    def begin_pause(self, name: str, planned: SwapPlan) -> Optional[LoadedModel]:
        """Serve ``name`` no more until :meth:`end_pause`; clients are told when to come back.

        Returns:
            The version that served, to be given to :meth:`retire`.
        """
        self._pauses[name] = planned
        return self.unload(name)

    def end_pause(self, name: str) -> None:
        """The pause is over, whatever serves now."""
        self._pauses.pop(name, None)

    def pause_of(self, name: str) -> Optional[SwapPlan]:
        """Why a model does not serve at the moment, if that is planned."""
        return self._pauses.get(name)

    def switch(self, loaded: LoadedModel) -> Optional[LoadedModel]:
        """Send new requests to ``loaded``.

        Returns:
            The version that served until now, to be given to :meth:`retire`; None if there was none.
        """
        return next(iter(self._replace(loaded.manifest.name, (loaded,))), None)

    def replace(self, name: str, versions: Sequence[LoadedModel]) -> List[LoadedModel]:
        """Serve these versions of a repository's model, ascending; none unloads it.

        Returns:
            What served until now and does no more, to be given to :meth:`retire`.

        Raises:
            Refused: an installed bundle serves under that name.
        """
        if self.has_bundle(name):
            raise Refused(
                f"a model named {name} serves already",
                "it is an installed bundle",
                f"rename the directory {name} of the repository, or remove the bundle",
            )
        self._repository_names.add(name)
        if not versions:
            self._repository_names.discard(name)
        return self._replace(name, tuple(versions))

    def _replace(self, name: str, versions: Tuple[LoadedModel, ...]) -> List[LoadedModel]:
        old = self._serving.pop(name, ())
        if versions:
            self._serving[name] = versions
            self._metrics.activated(name, {loaded.digest: loaded.version for loaded in versions})
        return [loaded for loaded in old if not any(loaded is kept for kept in versions)]

    def unload(self, name: str) -> Optional[LoadedModel]:
        """Serve the bundle ``name`` no more.

        Returns:
            The version that served, to be given to :meth:`retire`; None if there was none.
        """
        return next(iter(self._replace(name, ())), None)

    async def retire(self, loaded: LoadedModel) -> None:
        """Let a replaced version finish what it accepted, then free it."""
        self._retiring.append(loaded)
        await loaded.batcher.drain()
        self._retiring = [other for other in self._retiring if other is not loaded]
        loaded.batcher.close()
        # Freeing a large model takes milliseconds, which the requests of others must not wait for.
        await asyncio.get_running_loop().run_in_executor(None, _close, loaded.engine)

    def get(self, name: str, version: Optional[str] = None) -> Optional[LoadedModel]:
        """A serving version of a model; the highest where none is asked for."""
        versions = self._serving.get(name, ())
        if version is None:
            return versions[-1] if versions else None
        return next((loaded for loaded in versions if loaded.version == version), None)

    def has_bundle(self, name: str) -> bool:
        """Whether what serves under a name is an installed bundle, or one that is paused."""
        return name in self._pauses or (name in self._serving and name not in self._repository_names)

    def versions(self, name: str) -> Tuple[LoadedModel, ...]:
        """Every serving version of a model, ascending."""
        return self._serving.get(name, ())

    def serving(self) -> List[LoadedModel]:
        """Every serving version, by name."""
        return [loaded for name in sorted(self._serving) for loaded in self._serving[name]]

    def hung(self) -> str:
        """Which engine's run takes longer than ``run_timeout_s``; empty: none.

        Versions that are being retired are looked at too: their engines hold memory and the device.
        """
        for loaded in (*self.serving(), *self._retiring):
            name = loaded.manifest.name
            timeout_s = self._config.of_model(name).run_timeout_s
            if loaded.batcher.running_s > timeout_s:
                return f"a run of {name} {loaded.version} takes longer than {timeout_s:g} s"
        return ""


def _close(engine: Engine) -> None:
    engine.close()
    give_back()
