"""Whether an engine that was built somewhere fits this device."""

from __future__ import annotations

from typing import Dict, Mapping, Optional

from device_agent.manifest import EngineEntry, Manifest


def of_entry(entry: EngineEntry, manifest: Manifest) -> Dict[str, str]:
    """What the device must equal for a prebuilt engine to fit.

    ``precision`` and ``graph`` (the SHA-256 of the ONNX file that it was built from) are the bundle's own
    affair; what of them disagrees with the manifest stays, and then fits no device.
    """
    digests = {file.sha256 for file in manifest.files}
    return {
        key: value
        for key, value in entry.fingerprint.items()
        if not (key == "precision" and value == entry.precision) and not (key == "graph" and value in digests)
    }


def misfit(asked: Mapping[str, str], own: Mapping[str, str]) -> Optional[str]:
    """Why an engine does not fit a device; None: it does."""
    for key, value in asked.items():
        if own.get(key) != value:
            return f"it was built for {key} {value}, this device has {own.get(key)}"
    return None
