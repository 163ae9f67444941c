"""Engines that were built here, on disk: a file, and beside it what it is and its digest.

    engines/KEY.engine      the serialized engine
    engines/KEY.json        {"sha256", "size_bytes", "model", "fingerprint", "seconds", ...}
    engines/KEY.attempts    how often a build of it was begun that has not succeeded, and why it failed
    engines/timing-*.cache  what TensorRT measured, which makes the next build faster

Nothing here is precious: what is missing or damaged is built again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any, Dict, Mapping, Optional

from device_agent import durable
from device_agent.building.choice import Wanted

MAX_ATTEMPTS = 3  # a build that keeps ending with the agent or the device is not begun again
_OF_THE_FILE = ("model", "fingerprint", "sha256", "size_bytes", "seconds")
_KEPT_PER_MODEL = 2  # the active version's engine and the fallback's

_log = logging.getLogger(__name__)


class BuiltEngines:
    """The engines below a directory, which is made when the first is kept."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def find(self, wanted: Wanted) -> Optional[Path]:
        """An engine that was built here and is whole; one that is not is removed."""
        path, about = self._path(wanted, "engine"), self._read(self._path(wanted, "json"))
        if about is None or not path.is_file():
            return None
        if path.stat().st_size == about.get("size_bytes") and digest_of(path) == about.get("sha256"):
            return path
        _log.error("the engine %s that was built here is damaged; it is built again", path.name)
        self._remove(wanted.key)
        return None

    def about(self, wanted: Wanted) -> Dict[str, Any]:
        """What came of building an engine, as it was given to :meth:`keep`."""
        document = self._read(self._path(wanted, "json")) or {}
        return {key: value for key, value in document.items() if key not in _OF_THE_FILE}

    def place(self, wanted: Wanted) -> Path:
        """Where a build writes the engine before :meth:`keep`; what an earlier one left is removed."""
        durable.make_directory(self._directory)
        path = self._path(wanted, "part")
        durable.empty(path)
        return path

    def keep(self, wanted: Wanted, model: str, about: Mapping[str, Any]) -> Path:
        """Give an engine its name, once it is whole on disk.

        Args:
            wanted: what it is.
            model: whose.
            about: what else is worth knowing.
        """
        part, path = self._path(wanted, "part"), self._path(wanted, "engine")
        size_bytes, digest = part.stat().st_size, digest_of(part)
        os.replace(str(part), str(path))
        document = {
            **about,
            "model": model,
            "fingerprint": dict(wanted.fingerprint),
            "sha256": digest,
            "size_bytes": size_bytes,
        }
        self._write(self._path(wanted, "json"), document)
        durable.empty(self._path(wanted, "attempts"))
        self._remove_older(model)
        return path

    def begin(self, wanted: Wanted) -> None:
        """Count a build before it begins: it may take the agent or the device with it."""
        attempts = self._attempts(wanted)
        durable.make_directory(self._directory)
        self._write(self._path(wanted, "attempts"), {**attempts, "count": int(attempts.get("count", 0)) + 1})

    def give_up(self, wanted: Wanted, why: str, *, final: bool) -> None:
        """Keep why a build failed; ``final``: the same would happen again."""
        count = MAX_ATTEMPTS if final else int(self._attempts(wanted).get("count", 0))
        self._write(self._path(wanted, "attempts"), {"count": count, "why": why})

    def forget_attempt(self, wanted: Wanted) -> None:
        """The build was ended by the agent and says nothing of what it would have come to."""
        attempts = self._attempts(wanted)
        count = int(attempts.get("count", 0)) - 1
        self._write(self._path(wanted, "attempts"), {**attempts, "count": max(0, count)})

    def why_given_up(self, wanted: Wanted) -> str:
        """Why this engine is not built any more; empty: it may be."""
        attempts = self._attempts(wanted)
        if int(attempts.get("count", 0)) < MAX_ATTEMPTS:
            return ""
        return str(attempts.get("why") or f"{MAX_ATTEMPTS} builds were begun and none came to an end")

    def reject(self, wanted: Wanted, why: str) -> None:
        """Remove an engine that does not serve, and build it no more."""
        self._remove(wanted.key)
        self.give_up(wanted, why, final=True)

    def timing_cache(self, wanted: Wanted) -> Path:
        """Where the timings of this device with this TensorRT are."""
        text = json.dumps(wanted.device, sort_keys=True)
        return self._directory / f"timing-{hashlib.sha256(text.encode()).hexdigest()[:16]}.cache"

    # Files

    def _path(self, wanted: Wanted, suffix: str) -> Path:
        return self._directory / f"{wanted.key}.{suffix}"

    def _attempts(self, wanted: Wanted) -> Dict[str, Any]:
        return self._read(self._path(wanted, "attempts")) or {}

    def _remove(self, key: str) -> None:
        for suffix in ("json", "engine", "part"):
            durable.empty(self._directory / f"{key}.{suffix}")

    def _remove_older(self, model: str) -> None:
        """Keep the newest engines of a model."""
        entries = sorted(self._directory.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
        of_model = [path for path in entries if (self._read(path) or {}).get("model") == model]
        for path in of_model[_KEPT_PER_MODEL:]:
            self._remove(path.stem)

    def _write(self, path: Path, document: Mapping[str, Any]) -> None:
        durable.write(path, json.dumps(document, sort_keys=True).encode())

    def _read(self, path: Path) -> Optional[Dict[str, Any]]:
        try:
            document = json.loads(path.read_bytes())
        except (OSError, ValueError):
            return None
        return document if isinstance(document, dict) else None


def digest_of(path: Path) -> str:
    """The SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
