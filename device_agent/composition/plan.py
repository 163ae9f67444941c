"""In which order the steps of a composition run, and when a tensor is needed no more. Pure."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Dict, List, Sequence, Set, Tuple

if TYPE_CHECKING:
    from device_agent.manifest import Step

MAX_STEPS = 64


class PlanError(ValueError):
    """The steps do not make a model; the text says why."""


def order(steps: Sequence[Step], inputs: Sequence[str], outputs: Sequence[str]) -> Tuple[Step, ...]:
    """Sort the steps so that each comes after those whose tensors it takes.

    Among steps that may run in any order, the given one is kept.

    Args:
        steps: in any order.
        inputs: the tensors that the client sends.
        outputs: the tensors that it gets.

    Raises:
        PlanError: a name is used twice, a tensor is made twice or not at all, or steps wait for each other.
    """
    _check_names(steps, inputs)
    made, waiting, ordered = set(inputs), list(steps), []
    while waiting:
        ready = next((step for step in waiting if set(step.inputs.values()) <= made), None)
        if ready is None:
            raise PlanError(_why_stuck(waiting, made))
        waiting.remove(ready)
        ordered.append(ready)
        made.update(ready.outputs.values())
    missing = sorted(set(outputs) - made)
    if missing:
        raise PlanError(f"no step makes the output '{missing[0]}'")
    return tuple(ordered)


def _check_names(steps: Sequence[Step], inputs: Sequence[str]) -> None:
    if len(steps) > MAX_STEPS:
        raise PlanError(f"it has {len(steps)} steps; the limit is {MAX_STEPS}")
    names = Counter(step.name for step in steps)
    for name, count in names.items():
        if not name or count > 1:
            raise PlanError(f"{count} steps are named '{name}'")
    makers = Counter(tensor for step in steps for tensor in step.outputs.values())
    makers.update(inputs)
    for tensor, count in makers.items():
        if count > 1:
            raise PlanError(f"the tensor '{tensor}' has {count} origins")
    for step in steps:
        if not step.outputs:
            raise PlanError(f"step '{step.name}' makes nothing")


def _why_stuck(waiting: Sequence[Step], made: Set[str]) -> str:
    to_come = {tensor for step in waiting for tensor in step.outputs.values()}
    for step in waiting:
        for tensor in step.inputs.values():
            if tensor not in made | to_come:
                return f"step '{step.name}' takes '{tensor}', which no step makes"
    return "these steps wait for each other: " + ", ".join(sorted(step.name for step in waiting))


def last_uses(steps: Sequence[Step], outputs: Sequence[str]) -> List[Tuple[str, ...]]:
    """For each step, in order, the tensors that nothing needs after it."""
    last: Dict[str, int] = {}
    for number, step in enumerate(steps):
        for tensor in (*step.inputs.values(), *step.outputs.values()):
            last[tensor] = number
    gone: List[List[str]] = [[] for _ in steps]
    for tensor, number in last.items():
        if tensor not in outputs:
            gone[number].append(tensor)
    return [tuple(sorted(tensors)) for tensors in gone]
