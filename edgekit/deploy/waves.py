"""How far a rollout goes at each step: ``1,10%,100%``."""

from __future__ import annotations

from edgekit.errors import BadInput


def parse(text: str) -> tuple[tuple[float, bool], ...]:
    """Read steps that are separated by commas.

    Returns:
        For each step a number, and whether it is per cent.

    Raises:
        BadInput: a step is no number above zero, or is more than 100%.
    """
    return tuple(_step(part.strip(), text) for part in text.split(","))


def sizes(text: str, devices: int) -> list[int]:
    """Split a fleet into waves.

    A step says how many devices have the new version at its end; a share is rounded up. Steps that add no
    device are left out, so that a small fleet has fewer waves.

    Args:
        text: such as ``1,10%,100%``.
        devices: how many there are.

    Returns:
        The number of devices of each wave; their sum is less than ``devices`` where the last step is.

    Raises:
        BadInput: a step is malformed.
    """
    found: list[int] = []
    done = 0
    for number, per_cent in parse(text):
        target = -(-int(number * 1000) * devices // 100_000) if per_cent else int(number)
        target = min(target, devices)
        if target > done:
            found.append(target - done)
            done = target
    return found


def _step(part: str, text: str) -> tuple[float, bool]:
    per_cent = part.endswith("%")
    try:
        number = float(part[:-1]) if per_cent else float(int(part))
    except ValueError as error:
        raise _malformed(text, f"{part!r} is neither a number of devices nor a share in %") from error
    if not 0 < number <= (100 if per_cent else 10**9):
        raise _malformed(text, f"{part!r} is not above zero, or more than all")
    return number, per_cent


def _malformed(text: str, why: str) -> BadInput:
    return BadInput(f"--waves {text!r} is malformed", why, "write steps such as 1,10%,100%")
