"""A version that is ready to serve: engine, self-test and batcher as one."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Mapping, Optional, Tuple

from device_agent.batching.batcher import Batcher
from device_agent.engines import why_down
from device_agent.engines.base import Engine
from device_agent.manifest import Manifest
from device_agent.selftest import SelfTest
from device_agent.swap_plan import Cost


@dataclass(frozen=True)
class LoadedModel:
    """A version that is ready to serve.

    Attributes:
        manifest: the bundle's manifest; of a repository's model, what its configuration says.
        digest: the bundle's identity, or that of the repository's files.
        directory: where it is unpacked.
        engine: passed the self-test and is warm.
        batcher: the queue in front of the engine.
        selftest: how close it came to the golden outputs.
        batchable: whether requests may share a run: every tensor has a free batch axis.
        config: of a repository's model, its configuration in Triton's JSON form.
        cost: what loading it took.
        labels: the names of the classes, by output; outputs without names are not in it.
    """

    manifest: Manifest
    digest: str
    directory: Path
    engine: Engine
    batcher: Batcher
    selftest: SelfTest
    batchable: bool
    config: Optional[Mapping[str, Any]] = None
    labels: Mapping[str, Tuple[str, ...]] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)

    @property
    def version(self) -> str:
        """The version as the protocol writes it."""
        return str(self.manifest.version)

    @property
    def why_down(self) -> str:
        """Why it cannot answer at the moment although it is loaded; empty: it can."""
        return why_down(self.engine)


def is_batchable(manifest: Manifest) -> bool:
    """Whether every tensor has a free first axis, which then is the batch."""
    free = all(spec.shape[:1] == (-1,) for spec in manifest.inputs + manifest.outputs)
    return free and manifest.max_batch_size > 0
