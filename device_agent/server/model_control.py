"""The repository extension: which models there are, and what clients load and unload.

Installed bundles and the models of a repository answer alike. A bundle that a client unloads is back at the
next start; only ``edgekit-agent activate`` and ``remove`` are for good.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Dict, List, Mapping, Optional, Sequence

from device_agent.errors import AgentError
from device_agent.loaded import LoadedModel
from device_agent.models import Models
from device_agent.server.fields import ProtocolError, shown

if TYPE_CHECKING:
    from device_agent.repository.repository import Repository
    from device_agent.swap_plan import SwapPlan


class ModelControl:
    """Loads and unloads. What an operation replaces is returned, to be given to ``Models.retire``.

    Args:
        models: what serves.
        repository: the models besides bundles; None: there are none.
    """

    def __init__(self, models: Models, repository: Optional[Repository] = None) -> None:
        self._models = models
        self._repository = repository
        self._unloaded: Dict[str, LoadedModel] = {}  # bundles, by a client, which may load them again

    def index(self, ready_only: bool) -> List[Dict[str, str]]:
        """Every version that is loaded, and what could be; ``ready_only``: those that can answer now."""
        entries = [_loaded_entry(loaded) for loaded in self._models.serving()]
        if ready_only:
            return [entry for entry in entries if entry["state"] == "READY"]
        unloaded = [bundle for name, bundle in self._unloaded.items() if self._models.get(name) is None]
        entries += [_entry(bundle, "UNAVAILABLE", "unloaded") for bundle in unloaded]
        entries += self._repository.index() if self._repository is not None else []
        return sorted(entries, key=lambda entry: entry["name"])

    async def load(
        self, name: str, config: Optional[str] = None, files: Optional[Mapping[str, bytes]] = None
    ) -> Sequence[LoadedModel]:
        """Serve a model.

        Args:
            name: a bundle that was unloaded, or a model for the repository.
            config: a configuration in JSON in place of the repository's.
            files: uploaded files by path inside the model's directory, in place of the repository's.

        Raises:
            ProtocolError: 400: it is not there, does not come up, or clients may not load it; 503 in a
                planned pause.
        """
        is_bundle = name in self._unloaded or self._models.has_bundle(name)
        if is_bundle and (config is not None or files):
            raise ProtocolError(400, f"model '{name}' is a bundle, whose configuration and files are signed")
        try:
            if is_bundle:
                return await self._load_bundle(name)
            if self._repository is not None:
                return await self._repository.load(name, config, files or {})
        except AgentError as error:
            raise ProtocolError(400, f"{error.what}: {error.why}") from error
        raise ProtocolError(400, f"model {shown(name)} is not installed on this device")

    async def _load_bundle(self, name: str) -> Sequence[LoadedModel]:
        if self._models.get(name) is not None:
            return ()
        pause = self._models.pause_of(name)
        if pause is not None:
            raise paused(name, pause)
        known = self._unloaded[name]
        prepare = partial(self._models.prepare, known.directory, known.manifest, known.digest)
        loaded = await asyncio.get_running_loop().run_in_executor(None, prepare)
        # Another load, or an installation, may have been quicker; then that one stays.
        replaced = loaded if self._models.get(name) else self._models.switch(loaded)
        return () if replaced is None else (replaced,)

    def unload(self, name: str) -> Sequence[LoadedModel]:
        """Serve a model no more; an unknown one is no error.

        Raises:
            ProtocolError: 400: clients may not unload it.
        """
        if not self._models.has_bundle(name):
            try:
                return self._repository.unload(name) if self._repository is not None else ()
            except AgentError as error:
                raise ProtocolError(400, f"{error.what}: {error.why}") from error
        loaded = self._models.unload(name)
        if loaded is None:
            return ()
        self._unloaded[name] = loaded
        return (loaded,)


def paused(name: str, pause: SwapPlan) -> ProtocolError:
    """What is answered to clients of a model that changes its version."""
    return ProtocolError(503, f"model '{name}' changes its version: {pause}", pause.pause_s or 0.0)


def _loaded_entry(loaded: LoadedModel) -> Dict[str, str]:
    why_down = loaded.why_down
    return _entry(loaded, "UNAVAILABLE" if why_down else "READY", why_down)


def _entry(loaded: LoadedModel, state: str, reason: str) -> Dict[str, str]:
    return {"name": loaded.manifest.name, "version": loaded.version, "state": state, "reason": reason}
