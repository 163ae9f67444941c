"""A version of a model that is installed on this device."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Dict, Optional

from device_agent import manifest
from device_agent.errors import AgentError


@dataclass(frozen=True)
class Version:
    """An installed version of a model."""

    name: str
    digest: str
    directory: Path
    active: bool
    fallback: bool
    committed: bool

    def label(self) -> Dict[str, str]:
        """The name and the digest, for JSON."""
        return {"name": self.name, "digest": self.digest}

    def describe(self) -> Dict[str, Any]:
        """A form for JSON; the manifest's version number is null where the manifest is damaged."""
        try:
            number: Optional[int] = manifest.read(self.directory)[0].version
        except AgentError:
            number = None
        return {**asdict(self), "directory": str(self.directory), "version": number}
