"""Installed bundles on disk, and which of them is active.

    STATE_DIR/lock                              held by the one process that may write
    STATE_DIR/temporary/                        meaningless after a crash; emptied when the store is opened
    STATE_DIR/trust/                            what was learned about keys and versions (see trust_store)
    STATE_DIR/incoming/                         bundles on their way; nothing in it is needed (see transfer)
    STATE_DIR/models/NAME/versions/DIGEST/      an unpacked bundle, published whole
    STATE_DIR/models/NAME/state.json            which version is active, which is the fallback
    STATE_DIR/models/NAME/journal.json          the last operation on this model (see journal)
    STATE_DIR/models/NAME/starts.json           starts that did not come to an end (see startup)

``state.json`` is replaced atomically, and it is the only file that decides what a device serves.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Dict, List, Mapping, Optional, Type

from device_agent import archive, durable, json_text, manifest
from device_agent.bounded import Timeouts, bounded
from device_agent.disk import disk_errors, lock
from device_agent.errors import AgentError, BadInput, Refused
from device_agent.installed import Version
from device_agent.manifest_checks import valid_name
from device_agent.model_state import ModelState

_log = logging.getLogger(__name__)
_RESERVE_BYTES = 1024 * 1024
_BLOCK_BYTES = 4096
_MIN_PREFIX = 6


class Store:
    """The store below ``state_dir``, opened for writing by this process alone.

    Raises:
        Refused: another process has it open, or there is no store and none can be made. A store on a disk
            that cannot be written any more opens, so that what is installed is still served.
    """

    def __init__(self, state_dir: Path) -> None:
        self._root = state_dir
        self._temporary = state_dir / "temporary"
        with disk_errors(f"the store {state_dir} cannot be opened"):
            if not state_dir.is_dir():
                durable.make_directory(state_dir)
            self._lock = lock(state_dir / "lock")
        try:
            with disk_errors(f"the store {state_dir} cannot be prepared"):
                self._prepare()
        except Refused as error:
            if not (state_dir / "models").is_dir():
                self.close()
                raise
            _log.error("what is installed can be served and nothing changed: %s: %s", error.what, error.why)

    def _prepare(self) -> None:
        durable.make_directory(self._root / "models")
        durable.make_directory(self._temporary)
        for leftover in self._temporary.iterdir():
            durable.empty(leftover)

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let another process open the store."""
        os.close(self._lock)

    # Reading

    @property
    def trust_dir(self) -> Path:
        """Where the trust store lies; it is written under this store's lock."""
        return self._root / "trust"

    def names(self) -> List[str]:
        """Names of the models that were ever installed, sorted."""
        return sorted(path.name for path in (self._root / "models").iterdir() if valid_name(path.name))

    def list(self) -> List[Version]:
        """Every installed version, by model and digest."""
        return [version for name in self.names() for version in self.versions(name)]

    def versions(self, name: str) -> List[Version]:
        """The installed versions of one model, by digest."""
        state = self.state(name)
        directory = self._model(name) / "versions"
        digests = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
        return [
            Version(
                name,
                digest,
                directory / digest,
                active=digest == state.active,
                fallback=digest == state.fallback,
                committed=digest in state.committed,
            )
            for digest in digests
        ]

    def directory(self, name: str, digest: str) -> Path:
        """Where a version lies, or would lie."""
        return self._model(name) / "versions" / digest

    @property
    def incoming(self) -> Path:
        """Where bundles are put together of chunks; ``add`` moves them from there."""
        return self._root / "incoming" / "chunks"

    def owns(self, bundle: Path) -> bool:
        """Whether a bundle's directory lies in ``incoming``, and so in its space on the disk already."""
        return self.incoming in bundle.parents and bundle.is_dir()

    def holds(self, head: archive.Head) -> bool:
        """Whether a version is installed, whole; reads all of it."""
        return _is_whole(self.directory(head.manifest.name, head.digest), head)

    def has(self, name: str, digest: str) -> bool:
        """Whether a version is installed."""
        return self.directory(name, digest).is_dir()

    def active(self, name: str) -> Optional[str]:
        """Digest of the active version."""
        return self.state(name).active

    def state(self, name: str) -> ModelState:
        """Which versions matter; nothing is active if ``state.json`` is missing or damaged."""
        raw = self._read_json(name, "state.json")
        state = ModelState.parse({} if raw is None else raw)
        if state is None:
            _log.error("the state of %s is damaged and ignored", name)
        return state or ModelState()

    def find(self, prefix: str) -> Version:
        """The one installed version whose digest begins with ``prefix``.

        Raises:
            BadInput: none, or more than one, or fewer than six characters.
        """
        if len(prefix) < _MIN_PREFIX:
            raise BadInput(
                f"{prefix!r} is too short for a digest",
                f"at least {_MIN_PREFIX} characters are needed",
                "`edgekit-agent list` shows the digests",
            )
        found = [version for version in self.list() if version.digest.startswith(prefix)]
        if len(found) != 1:
            why = "no version" if not found else f"{len(found)} versions"
            raise BadInput(
                f"{prefix!r} names no installed version",
                f"{why} on this device has a digest that begins so",
                "`edgekit-agent list` shows the digests",
            )
        return found[0]

    def journal(self, name: str) -> Optional[Dict[str, Any]]:
        """The last operation on a model, as lifecycle wrote it."""
        return self._read_json(name, "journal.json")

    def starts(self, name: str, digest: str) -> int:
        """How many starts in a row with this version did not come to an end (see startup)."""
        raw = self._read_json(name, "starts.json") or {}
        count = raw.get("count")
        return count if raw.get("digest") == digest and type(count) is int else 0

    # Writing

    def add(self, bundle: Path, head: archive.Head, timeout_s: float = Timeouts.stage_s) -> bool:
        """Copy a bundle into the store, checking every byte; one in ``incoming`` is moved.

        Args:
            bundle: either form.
            head: what was read of it, and authenticated, before.
            timeout_s: for reading it: a stick or a network share may hang.

        Returns:
            Whether the version is new here; one that is there and whole is kept, with a new signature.

        Raises:
            TrustError: a file differs from the manifest.
            BadInput: the bundle is damaged.
            Refused: there is not enough space, it took too long, or the disk failed; nothing is left of it.
        """
        final = self.directory(head.manifest.name, head.digest)
        if final.is_dir():
            if _is_whole(final, head):
                self._keep(final, head)
                return False
            _log.error("installed version %s is damaged; it is replaced", head.digest)
            with disk_errors("the damaged version cannot be removed"):
                durable.remove(final, self._temporary)
        with disk_errors(f"the bundle {head.manifest.name!r} cannot be stored"):
            if self.owns(bundle):
                archive.check_files(bundle, head.manifest)
                durable.make_directory(final.parent)
                durable.publish(bundle, final)
            else:
                self._copy(bundle, head, final, timeout_s)
        return True

    def _copy(self, bundle: Path, head: archive.Head, final: Path, timeout_s: float) -> None:
        self.require_space(head)
        temporary = self._temporary / head.digest
        try:
            durable.empty(temporary)
            bounded(
                partial(archive.unpack, bundle, head, temporary),
                timeout_s,
                f"the bundle {head.manifest.name!r} was not read in time",
            )  # what comes too late lies in temporary, which is emptied
            durable.make_directory(final.parent)
            durable.publish(temporary, final)
        except BaseException:
            durable.empty(temporary)
            raise

    def require_space(self, head: archive.Head, beside_bytes: int = 0) -> None:
        """Refuse before a byte is copied, rather than fill the disk.

        Args:
            head: of the bundle.
            beside_bytes: what will be written to the same disk besides; below zero: what is there already.

        Raises:
            Refused: the bundle does not fit, with some room to spare for what the store itself writes.
        """
        needed = head.size_bytes + _BLOCK_BYTES * (len(head.manifest.files) + 4) + _RESERVE_BYTES
        needed += beside_bytes
        free = shutil.disk_usage(str(self._root)).free
        if free < needed:
            raise Refused(
                f"there is no space for the bundle {head.manifest.name!r}",
                f"it needs {needed} bytes, {free} are free in {self._root}",
                "remove versions that are not needed with `edgekit-agent remove DIGEST`",
            )

    def set_state(self, name: str, state: ModelState) -> None:
        """Replace ``state.json``.

        Raises:
            Refused: the disk failed.
        """
        self._write_json(name, "state.json", asdict(state))

    def set_journal(self, name: str, entry: Mapping[str, Any]) -> None:
        """Replace the model's journal.

        Raises:
            Refused: the disk failed.
        """
        self._write_json(name, "journal.json", entry)

    def set_starts(self, name: str, digest: str, count: int) -> None:
        """Count the starts with a version that did not come to an end.

        Raises:
            Refused: the disk failed.
        """
        if count != self.starts(name, digest):
            self._write_json(name, "starts.json", {"digest": digest, "count": count})

    def remove(self, name: str, digest: str) -> None:
        """Remove a version that is not active.

        Raises:
            BadInput: it is active.
            Refused: the disk failed.
        """
        state = self.state(name)
        if digest == state.active:
            raise BadInput(
                f"{digest[:12]} is the active version of {name!r}",
                "removing it would leave the device without this model",
                "activate another version first, or roll back",
            )
        # In this order a crash leaves no fallback that is gone, and no version that nobody would collect.
        if digest == state.fallback:
            self.set_state(name, state.without_fallback())
        with disk_errors(f"{digest[:12]} cannot be removed"):
            durable.remove(self.directory(name, digest), self._temporary)
        if digest in state.committed:
            self.set_state(name, state.without(digest))

    def collect(self, name: str) -> List[str]:
        """Remove versions that once served and are neither active nor the fallback any more.

        Versions that were installed and never activated stay.

        Returns:
            The digests that were removed.

        Raises:
            Refused: the disk failed.
        """
        old = [v for v in self.versions(name) if v.committed and not v.active and not v.fallback]
        for version in old:
            self.remove(name, version.digest)
        return [version.digest for version in old]

    # Helpers

    def _model(self, name: str) -> Path:
        if not valid_name(name):
            raise BadInput(
                f"{name!r} is not a model's name", "it is malformed", "`edgekit-agent list` shows them"
            )
        return self._root / "models" / name

    def _keep(self, final: Path, head: archive.Head) -> None:
        with disk_errors("the new signature cannot be stored"):
            durable.make_directory(final)
            if head.signature is not None:
                durable.write(final / manifest.SIGNATURE_NAME, head.signature)

    def _read_json(self, name: str, file: str) -> Optional[Dict[str, Any]]:
        path = self._model(name) / file
        try:
            raw = json_text.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            _log.error("%s is damaged and ignored: %s", path, error)
            return None
        return raw if isinstance(raw, dict) else None

    def _write_json(self, name: str, file: str, document: Mapping[str, Any]) -> None:
        data = (json.dumps(document, sort_keys=True, indent=2) + "\n").encode()
        with disk_errors(f"{file} of {name!r} cannot be written"):
            durable.make_directory(self._model(name))
            durable.write(self._model(name) / file, data)


def _is_whole(directory: Path, head: archive.Head) -> bool:
    try:
        installed = archive.read_head(directory)
        archive.check_files(directory, installed.manifest)
    except (AgentError, OSError):
        return False
    return installed.digest == head.digest
