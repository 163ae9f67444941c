"""What a device has learned about trust, on disk.

    STATE_DIR/trust/rotations.json      the rotation documents that were accepted, in order
    STATE_DIR/trust/floors.json         by key and model, the highest version that was committed

Each file is replaced atomically. Nothing here widens trust by itself: documents are verified again from the
keys in ``keys_dir`` whenever they are read (see ``keyring``), and floors only ever refuse.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Dict, List, Mapping

from device_agent import durable, json_text
from device_agent.disk import disk_errors
from device_agent.errors import Refused
from device_agent.ratchet import Floors

MAX_ROTATIONS = 256

_log = logging.getLogger(__name__)


class TrustStore:
    """The files below ``directory``; whoever holds the store's lock may write them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def rotations(self) -> List[bytes]:
        """The rotation documents that were accepted, in order."""
        documents = self._read("rotations.json").get("documents", [])
        if not isinstance(documents, list) or not all(isinstance(item, str) for item in documents):
            _log.error("%s is damaged and ignored", self._directory / "rotations.json")
            return []
        return [item.encode("utf-8") for item in documents]

    def add_rotation(self, document: bytes) -> None:
        """Keep one more rotation document, which is valid UTF-8.

        Raises:
            Refused: there are too many, or the disk failed; the keys are those of before.
        """
        documents = [item.decode("utf-8") for item in self.rotations()]
        if len(documents) >= MAX_ROTATIONS:
            raise Refused(
                "no more rotation documents are taken",
                f"{MAX_ROTATIONS} were taken before",
                "put the newest key among the files of keys_dir, and empty the agent's state",
            )
        text = document.decode("utf-8")
        self._write("rotations.json", {"documents": [*documents, text]})

    def floors(self) -> Floors:
        """By key and model, the highest version that was committed.

        A damaged file is no reason to refuse every update; what is installed still says what was committed.
        """
        raw = self._read("floors.json").get("floors", {})
        if not _is_floors(raw):
            _log.error("%s is damaged and ignored", self._directory / "floors.json")
            return {}
        return raw  # type: ignore[no-any-return]  # just checked

    def set_floors(self, floors: Floors) -> None:
        """Replace the floors.

        Raises:
            Refused: the disk failed.
        """
        self._write("floors.json", {"floors": floors})

    def _read(self, file: str) -> Dict[str, Any]:
        path = self._directory / file
        try:
            raw = json_text.loads(path.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            _log.error("%s is damaged and ignored: %s", path, error)
            return {}
        return raw if isinstance(raw, dict) else {}

    def _write(self, file: str, document: Mapping[str, Any]) -> None:
        data = (json.dumps(document, sort_keys=True, indent=2) + "\n").encode()
        with disk_errors(f"{self._directory / file} cannot be written"):
            durable.make_directory(self._directory)
            durable.write(self._directory / file, data)


def _is_floors(raw: Any) -> bool:
    return isinstance(raw, dict) and all(
        isinstance(models, dict) and all(type(version) is int for version in models.values())
        for models in raw.values()
    )
