"""What an operation on a model ended with, for whoever asked for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from device_agent.journal import Operation
from device_agent.manifest import Manifest
from device_agent.model_state import ModelState
from device_agent.signature import Signer
from device_agent.swap_plan import SwapPlan


@dataclass(frozen=True)
class Installed:
    """What an operation ended with.

    Attributes:
        name: the model.
        digest: the version that the operation was about.
        version: the manifest's version number.
        state: ``committed``, or ``staged`` where nothing was to be activated.
        previous: digest of the version that was active before; None if there was none.
        signer: name of the key that signed it; empty if it is unsigned.
        pause: why and for about how long nothing served meanwhile; empty: the old version did.
    """

    name: str
    digest: str
    version: int
    state: str
    previous: Optional[str]
    signer: str
    pause: str


def outcome_of(
    operation: Operation, manifest: Manifest, before: ModelState, signer: Signer, planned: SwapPlan
) -> Installed:
    """What an operation that came to its goal ended with."""
    return Installed(
        operation.name,
        operation.digest,
        manifest.version,
        operation.state,
        before.active,
        signer.name,
        "" if planned.pause_s is None else str(planned),
    )
