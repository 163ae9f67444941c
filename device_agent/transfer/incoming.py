"""The bundles that are on their way to this device, in ``STATE_DIR/incoming/chunks/DIGEST/``.

Each belongs to one connection at a time, the last that offered it: an older one may hang on a link that is
long dead. What a broken transfer left is kept for a week for the next offer of the same bundle, or of another
version of the model, and is then removed.

Python 3.8.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Dict, List, Set, Tuple

from device_agent import archive, durable, manifest
from device_agent.disk import disk_errors
from device_agent.errors import AgentError, Refused
from device_agent.manifest import FileEntry
from device_agent.transfer.offer import ChunkedFile
from device_agent.transfer.partial import Partial, allocated_bytes

if TYPE_CHECKING:
    from device_agent.lifecycle import Lifecycle

_MAX_AGE_S = 7 * 24 * 3600.0
_log = logging.getLogger(__name__)


class Incoming:
    """Every bundle on its way; its methods are called by one thread at a time.

    Args:
        lifecycle: says which bundles are let in, and what is installed.
    """

    def __init__(self, lifecycle: Lifecycle) -> None:
        self._lifecycle = lifecycle
        self._root = lifecycle.incoming
        self._holders: Dict[str, object] = {}
        self._installing: Set[str] = set()

    def admit(self, head: archive.Head, activate: bool = True, allow_downgrade: bool = False) -> None:
        """Check what can be checked before the files are here: trust, and the space that they need.

        Args:
            head: of the bundle that is offered.
            activate: whether it will be switched to, which takes memory.
            allow_downgrade: whether it may be older than what was committed.

        Raises:
            BadInput: the bundle is not trusted.
            Refused: there is no space for it; or it is being installed.
        """
        if head.digest in self._installing:
            raise Refused(
                f"{head.manifest.name!r} is being installed already",
                "another connection brought the same bundle",
                "wait for its end: `edgekit fleet status` shows it",
            )
        self._collect()
        with disk_errors("what an earlier transfer left cannot be read"):
            here_bytes = allocated_bytes(self._directory(head.digest))
        choices = {"activate": activate, "allow_downgrade": allow_downgrade}
        try:
            self._lifecycle.preflight(head, -here_bytes, **choices)
        except Refused:
            if not self._discard_others(head.digest):
                raise
            self._lifecycle.preflight(head, -here_bytes, **choices)

    def open(self, head: archive.Head, files: Tuple[ChunkedFile, ...], holder: object) -> Partial:
        """Begin a bundle, or go on with it, and take for it what is on this device already.

        Args:
            head: what ``admit`` let in.
            files: its chunks.
            holder: the connection, which alone may add to it from now on.

        Raises:
            Refused: the disk failed.
        """
        self._holders[head.digest] = holder
        with disk_errors(f"the bundle {head.manifest.name!r} cannot be received"):
            partial = Partial(self._directory(head.digest), head, files, whole=self._lifecycle.holds(head))
            if not partial.complete:
                partial.seed(self._sources(head))
            self._discard_others(head.digest, head.manifest.name)
        return partial

    def require_holder(self, partial: Partial, holder: object) -> None:
        """Refuse a connection whose bundle another one has taken over.

        Raises:
            Refused: it has.
        """
        if self._holders.get(partial.head.digest) is not holder:
            raise Refused(
                "the transfer was taken over",
                "another connection offered the same bundle",
                "nothing: the other one goes on with it",
            )

    def release(self, partial: Partial, holder: object) -> None:
        """Forget a connection that ends; what it received is kept."""
        if self._holders.get(partial.head.digest) is holder:
            del self._holders[partial.head.digest]

    def begin_install(self, partial: Partial, holder: object) -> None:
        """Keep everyone's hands off a bundle while it is installed.

        Raises:
            Refused: another connection took it over.
        """
        self.require_holder(partial, holder)
        self._installing.add(partial.head.digest)

    def end_install(self, partial: Partial, installed: bool) -> None:
        """Let others offer the bundle again; remove what the store did not need of an installed one."""
        if installed:
            self._remove(partial.directory)
        self._installing.discard(partial.head.digest)

    # Helpers

    def _directory(self, digest: str) -> Path:
        return self._root / digest

    def _sources(self, head: archive.Head) -> List[Tuple[Path, FileEntry]]:
        """Files of the same model: of the active version, of others, of transfers that broke off."""
        versions = [v for v in self._lifecycle.list() if v["name"] == head.manifest.name]
        versions.sort(key=lambda version: not version["active"])
        directories = [Path(version["directory"]) for version in versions]
        directories += [path for path in self._partials() if path.name != head.digest]
        found: Dict[str, Tuple[Path, FileEntry]] = {}
        for directory in directories:
            for entry in _listed(directory, head.manifest.name):
                found.setdefault(entry.sha256, (directory / entry.path, entry))
        wanted = {entry.path for entry in head.manifest.files}
        return sorted(found.values(), key=lambda source: source[1].path not in wanted)

    def _partials(self) -> List[Path]:
        return sorted(self._root.iterdir()) if self._root.is_dir() else []

    def _collect(self) -> None:
        """Remove what nobody came back for."""
        now_s = time.time()
        for path in self._partials():
            if now_s - path.lstat().st_mtime > _MAX_AGE_S and path.name not in self._holders:
                self._remove(path)

    def _discard_others(self, digest: str, name: str = "") -> bool:
        """Remove other transfers that broke off, of one model or of all; return whether there were any."""
        found = False
        for path in self._partials():
            free = path.name != digest and path.name not in self._holders
            if free and path.name not in self._installing and (not name or _listed(path, name)):
                self._remove(path)
                found = True
        return found

    def _remove(self, path: Path) -> None:
        try:
            durable.empty(path)
        except OSError as error:
            _log.warning("%s could not be removed: %s", path, error.strerror)


def _listed(directory: Path, name: str) -> Tuple[FileEntry, ...]:
    """The files of a version or of a partial bundle of the model ``name``; none where that is unreadable."""
    try:
        found = manifest.read(directory)[0]
    except AgentError:
        return ()
    return found.files if found.name == name else ()
