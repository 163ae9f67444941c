"""An engine that stands in front of another and changes what goes in and what comes out."""

from __future__ import annotations

from typing import FrozenSet, Tuple

from device_agent.engines.base import Engine
from device_agent.manifest import TensorSpec


class EngineInFront:
    """All of an :class:`~device_agent.engines.base.Engine` but ``run``.

    Args:
        engine: what runs.
        inputs: as clients see them.
        outputs: likewise.
    """

    def __init__(
        self, engine: Engine, inputs: Tuple[TensorSpec, ...], outputs: Tuple[TensorSpec, ...]
    ) -> None:
        self.runtime, self.memory_policy = engine.runtime, engine.memory_policy
        self.inputs, self.outputs = inputs, outputs
        self._engine = engine

    @property
    def process(self) -> int:
        """See :class:`~device_agent.engines.base.Engine`."""
        return self._engine.process

    @property
    def threads(self) -> FrozenSet[int]:
        """See :class:`~device_agent.engines.base.Engine`."""
        return self._engine.threads

    def close(self) -> None:
        """Free the engine."""
        self._engine.close()
