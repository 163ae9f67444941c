"""What is on this device already, so that it need not be fetched."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Dict

from device_agent import archive, manifest
from device_agent.errors import AgentError

if TYPE_CHECKING:
    from device_agent.lifecycle import Lifecycle


def files_here(lifecycle: Lifecycle) -> Dict[str, Path]:
    """The files of every installed version, by the SHA-256 that their manifests give; nothing is verified."""
    files: Dict[str, Path] = {}
    for version in lifecycle.list():
        directory = Path(version["directory"])
        try:
            listed = manifest.read(directory)[0].files
        except (AgentError, OSError):
            continue  # damaged, or just removed: then its files are fetched
        for entry in listed:
            files[entry.sha256] = directory / entry.path
    return files


def is_whole_here(lifecycle: Lifecycle, head: archive.Head) -> bool:
    """Whether this very bundle, with this signature, is active, has proven itself, and serves."""
    for model in lifecycle.status():
        if model["name"] == head.manifest.name and model["active"] == model["serving"] == head.digest:
            directories = [Path(v["directory"]) for v in model["versions"] if v["digest"] == head.digest]
            return head.digest in model["committed"] and _signature_is(directories[0], head)
    return False


def _signature_is(directory: Path, head: archive.Head) -> bool:
    try:
        return archive.read_head(directory).signature == head.signature
    except (AgentError, OSError):
        return False
