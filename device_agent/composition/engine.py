"""An engine whose run is a chain of engines.

A tensor goes from step to step as the array that the runtime made, which is a view on the runtime's own
memory: nothing is copied between steps (``BYTES`` and ``BF16`` excepted, which ONNX Runtime does not share).
To the batcher and the self-test the chain is one engine.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Any, Callable, Dict, FrozenSet, List, Mapping, Sequence, Tuple

import numpy as np

from device_agent.composition.plan import last_uses
from device_agent.engines.base import Arrays, Engine, EngineError, EngineSettings, InputError
from device_agent.engines.source import EngineSource
from device_agent.errors import Refused
from device_agent.manifest import Step, TensorSpec

_Open = Callable[[EngineSource, EngineSettings], Engine]


def open_composition(source: EngineSource, settings: EngineSettings, open_step: _Open) -> Engine:
    """Load the engine of each step and check that what one makes is what the next takes.

    Args:
        source: its steps in the order in which they run.
        settings: for each step.
        open_step: loads the engine of one step.

    Raises:
        Missing: as ``open_step``.
        Refused: as ``open_step``; or the tensors of two steps differ in type or shape, or no
            step takes an input.
    """
    with ExitStack() as undo:
        engines = []
        for step in source.steps:
            engines.append(open_step(source.of_step(step), settings))
            undo.callback(engines[-1].close)
        tensors = _check(source.steps, engines)
        unused = [name for name in source.inputs if name not in tensors]
        if unused:
            raise _refused(f"no step takes '{unused[0]}'")
        undo.pop_all()
    names = tuple(tensors[name] for name in source.inputs), tuple(tensors[name] for name in source.outputs)
    return ComposedEngine(source, engines, *names)


class ComposedEngine:
    """See :class:`device_agent.engines.base.Engine`."""

    def __init__(
        self,
        source: EngineSource,
        engines: Sequence[Engine],
        inputs: Tuple[TensorSpec, ...],
        outputs: Tuple[TensorSpec, ...],
    ) -> None:
        self.runtime = source.runtime
        self.inputs = inputs
        self.outputs = outputs
        self.memory_policy = engines[0].memory_policy
        self._engines = engines
        self._steps = list(zip(source.steps, engines, last_uses(source.steps, source.outputs)))

    @property
    def process(self) -> int:
        """This process."""
        return os.getpid()

    @property
    def threads(self) -> FrozenSet[int]:
        """The threads of every step."""
        return frozenset(thread for engine in self._engines for thread in engine.threads)

    def run(self, inputs: Arrays) -> Dict[str, np.ndarray[Any, Any]]:
        """Run the steps in order; see :meth:`device_agent.engines.base.Engine.run`."""
        tensors = dict(inputs)
        for step, engine, gone in self._steps:
            made = _run(step, engine, {own: tensors[name] for own, name in step.inputs.items()})
            for own, name in step.outputs.items():
                tensors[name] = made[own]
            for name in gone:  # a large intermediate is free before the next step needs memory
                del tensors[name]
        return {spec.name: tensors[spec.name] for spec in self.outputs}

    def close(self) -> None:
        """Free every step."""
        for engine in self._engines:
            engine.close()


def _run(step: Step, engine: Engine, feeds: Arrays) -> Dict[str, np.ndarray[Any, Any]]:
    try:
        return engine.run(feeds)
    except InputError:
        raise
    except EngineError as error:
        raise EngineError(f"step '{step.name}': {error}") from error


def _check(steps: Sequence[Step], engines: Sequence[Engine]) -> Dict[str, TensorSpec]:
    """Every tensor of the composition as the steps see it; the narrowest shape where they differ."""
    tensors: Dict[str, TensorSpec] = {}
    for step, engine in zip(steps, engines):
        for kind, names, specs in (
            ("input", step.inputs, engine.inputs),
            ("output", step.outputs, engine.outputs),
        ):
            _check_names(step, kind, names, [spec.name for spec in specs])
            for spec in specs:
                name = names.get(spec.name)
                if name is not None:
                    tensors[name] = _meet(step, TensorSpec(name, spec.dtype, spec.shape), tensors.get(name))
    return tensors


def _check_names(step: Step, kind: str, names: Mapping[str, str], own: List[str]) -> None:
    strange = sorted(set(names) - set(own))
    # An output that nobody takes may be left out; an input may not.
    unfed = sorted(set(own) - set(names)) if kind == "input" else []
    if strange or unfed:
        what = f"has no {kind} '{strange[0]}'" if strange else f"is not given its input '{unfed[0]}'"
        raise _refused(f"step '{step.name}' {what}; its {kind}s are {', '.join(own)}")


def _meet(step: Step, mine: TensorSpec, theirs: Any) -> TensorSpec:
    if theirs is None:
        return mine
    if mine.dtype != theirs.dtype:
        raise _refused(f"'{mine.name}' is {theirs.dtype}, step '{step.name}' takes {mine.dtype}")
    fits = len(mine.shape) == len(theirs.shape) and all(
        a == b or -1 in (a, b) for a, b in zip(mine.shape, theirs.shape)
    )
    if not fits:
        raise _refused(
            f"'{mine.name}' has shape {list(theirs.shape)}, step '{step.name}' takes {list(mine.shape)}"
        )
    return TensorSpec(mine.name, mine.dtype, tuple(max(a, b) for a, b in zip(mine.shape, theirs.shape)))


def _refused(why: str) -> Refused:
    return Refused(
        "the steps of the composition do not fit together", why, "make the bundle again with graphs that fit"
    )
