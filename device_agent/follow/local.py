"""What is on this device already, so that it need not be fetched."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Mapping, NamedTuple

from device_agent import archive, manifest
from device_agent.errors import AgentError

if TYPE_CHECKING:
    from device_agent.lifecycle import Lifecycle

_SERVED = ("switched", "probation")


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


class Standing(NamedTuple):
    """What the life cycle has to say about a bundle.

    Attributes:
        proven: it is active with this very signature, committed, and serves.
        on_trial: it is active and has not proven itself yet.
        failure: why it was given up the last time, if it ever served; empty: it was not.
    """

    proven: bool = False
    on_trial: bool = False
    failure: str = ""


def standing(lifecycle: Lifecycle, head: archive.Head) -> Standing:
    """How a bundle stands on this device."""
    for model in lifecycle.status():
        if model["name"] == head.manifest.name:
            return _standing(model, head)
    return Standing()


def _standing(model: Mapping[str, Any], head: archive.Head) -> Standing:
    if model["active"] == head.digest and head.digest not in model["committed"]:
        return Standing(on_trial=True)
    if model["active"] == model["serving"] == head.digest:
        directories = [Path(v["directory"]) for v in model["versions"] if v["digest"] == head.digest]
        return Standing(proven=_signature_is(directories[0], head))
    last = model["last_operation"] or {}
    if last.get("digest") == head.digest and last.get("failure") and last.get("state") in _SERVED:
        return Standing(failure=f"{last['failure']['what']}: {last['failure']['why']}")
    return Standing()


def _signature_is(directory: Path, head: archive.Head) -> bool:
    try:
        return archive.read_head(directory).signature == head.signature
    except (AgentError, OSError):
        return False
