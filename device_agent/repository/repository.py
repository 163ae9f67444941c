"""The models of a repository on their way into and out of service.

Preparing a model blocks and runs on another thread than the event loop's; everything else runs on the loop.
A repository is not signed: whoever may write to its directory, or may ask for a load in explicit mode,
decides what this device runs. The user names it on the command line, and the log says so once.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Dict, List, Mapping, Optional, Sequence

from device_agent.errors import AgentError, BadInput, Refused
from device_agent.loaded import LoadedModel
from device_agent.models import Models
from device_agent.repository import files
from device_agent.repository.uploads import Uploads
from device_agent.repository.version import open_version

NONE, EXPLICIT = "none", "explicit"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RepositorySettings:
    """How a repository is used.

    Attributes:
        root: its directory.
        control_mode: ``none`` loads every model at the start; ``explicit`` loads what ``load_models`` names,
            and then what clients ask for.
        load_models: names, or ``*`` for all; only in explicit mode.
        max_upload_bytes: of all models together that came inside load requests.
    """

    root: Path
    control_mode: str = NONE
    load_models: Sequence[str] = ()
    max_upload_bytes: int = 256 * 1024 * 1024


class Repository:
    """A directory of models in Triton's layout, and what of it serves."""

    def __init__(self, settings: RepositorySettings, models: Models) -> None:
        files.check_root(settings.root)
        self._settings = settings
        self._models = models
        self._uploads = Uploads(settings.max_upload_bytes)
        self._directories: Dict[str, Path] = {}  # of models that were loaded, also from an upload
        self._failures: Dict[str, str] = {}
        self._turn = asyncio.Lock()  # one model is prepared at a time: it takes the processor and memory

    async def start(self) -> None:
        """Load what should serve from the start; a model that does not load is logged and left out."""
        root = self._settings.root
        _log.warning("models in %s are not signed: whoever writes there decides what runs here", root)
        for name in self._startup_names():
            try:
                await self._load(name, root / name, None)
            except AgentError as error:
                self._failures[name] = f"{error.what}: {error.why}"
                _log.error("model %s is not served: %s: %s", name, error.what, error.why)
            except Exception as error:  # whatever a runtime raised, the other models may still serve
                self._failures[name] = f"{type(error).__name__}: {error}"
                _log.exception("model %s is not served", name)

    def _startup_names(self) -> List[str]:
        wanted = self._settings.load_models
        if self._settings.control_mode == EXPLICIT and "*" not in wanted:
            return list(wanted)
        return files.model_names(self._settings.root)

    def index(self) -> List[Dict[str, str]]:
        """What does not serve, and why; what serves is known to ``Models``."""
        names = {*files.model_names(self._settings.root), *self._directories}
        return [
            {"name": name, "version": "", "state": "UNAVAILABLE", "reason": self._reason(name)}
            for name in sorted(names)
            if self._models.get(name) is None
        ]

    def _reason(self, name: str) -> str:
        return self._failures.get(name, "unloaded" if name in self._directories else "not loaded")

    async def load(
        self, name: str, override: Optional[str], uploaded: Mapping[str, bytes]
    ) -> List[LoadedModel]:
        """Load a model, or load it again if something changed; until it is ready, the old one serves.

        Args:
            name: the model.
            override: a configuration in JSON in place of its file.
            uploaded: files by path inside the model's directory, in place of the repository's.

        Returns:
            What it replaced, to be given to ``Models.retire``.

        Raises:
            AgentError: it does not load, there is no such model, or clients may not load here.
        """
        self._check_explicit()
        directory = self._settings.root / name
        if uploaded:
            if override is None:
                raise BadInput(
                    f"model '{name}' cannot be loaded from files",
                    "they come without a configuration",
                    "give the parameter 'config' too; {} takes all from the graph",
                )
            loop = asyncio.get_running_loop()
            directory = await loop.run_in_executor(None, self._uploads.add, name, uploaded)
        elif name not in files.model_names(self._settings.root):
            raise BadInput(
                f"model '{name}' is not in the repository",
                f"there is no directory {name}",
                "put it there, or send its files with the request",
            )
        try:
            return await self._load(name, directory, override)
        except BaseException:
            self._uploads.remove(directory)
            raise

    async def _load(self, name: str, directory: Path, override: Optional[str]) -> List[LoadedModel]:
        loop = asyncio.get_running_loop()
        async with self._turn:
            serving = self._models.versions(name)
            prepare = partial(prepare_versions, self._models, directory, override, serving)
            versions = await loop.run_in_executor(None, prepare)
            try:
                old = self._models.replace(name, versions)
            except Refused:
                await loop.run_in_executor(None, _discard, self._models, versions, serving)
                raise
            previous = self._directories.get(name)
            self._directories[name] = directory
            self._failures.pop(name, None)
            if previous is not None and previous != directory:
                self._uploads.remove(previous)
            return old

    def unload(self, name: str) -> List[LoadedModel]:
        """Serve a model no more.

        Returns:
            What served, to be given to ``Models.retire``.

        Raises:
            Refused: clients may not unload here.
        """
        self._check_explicit()
        old = self._models.replace(name, [])
        if self._directories.get(name) not in (None, self._settings.root / name):
            self._uploads.remove(self._directories.pop(name))  # it cannot come back without its files
        return old

    def close(self) -> None:
        """Delete what was uploaded."""
        self._uploads.clear()

    def _check_explicit(self) -> None:
        if self._settings.control_mode != EXPLICIT:
            raise Refused(
                "models of the repository are not loaded or unloaded by clients",
                "the agent was started with --model-control-mode none",
                "start it with --model-control-mode explicit",
            )


def prepare_versions(
    models: Models, directory: Path, override: Optional[str], serving: Sequence[LoadedModel]
) -> List[LoadedModel]:
    """Bring up every version of a model that should serve; one that serves unchanged is kept. Blocks.

    Raises:
        AgentError: one of them does not come up; none is then kept.
    """
    config = files.read_config(directory, override)
    for note in config.notes:
        _log.warning("model '%s': %s", config.name, note)
    chosen = config.version_policy.choose(files.versions(directory))
    if not chosen:
        raise BadInput(
            f"model '{config.name}' has no version to serve",
            f"there is no directory {directory.name}/1, or version_policy excludes it",
            f"put the graph at {directory.name}/1/{config.filename}",
        )
    ready: List[LoadedModel] = []
    # What an earlier upload brought goes with its files, which a process that is started again reads.
    known = {loaded.digest: loaded for loaded in serving if loaded.directory == directory}
    try:
        for version in chosen:
            identity = files.digest(directory, version, config)
            ready.append(known.get(identity) or open_version(models, directory, version, config, identity))
    except BaseException:
        _discard(models, ready, serving)
        raise
    return ready


def _discard(models: Models, versions: Sequence[LoadedModel], serving: Sequence[LoadedModel]) -> None:
    """Free versions that will not serve, but none that serves already. Blocks."""
    for loaded in versions:
        if not any(loaded is kept for kept in serving):
            models.discard(loaded)
