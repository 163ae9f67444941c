"""Lists of cores as the kernel writes them, such as ``0-1,4``. Standard library only; Python 3.8."""

from __future__ import annotations

from typing import Iterable, List, Set, Tuple

_MAX_CORES = 1024


def parse_cpus(text: str) -> Tuple[int, ...]:
    """Read a list of cores as the kernel writes it, ``0-1,4``; empty text is an empty list.

    Raises:
        ValueError: it is malformed.
    """
    cores: Set[int] = set()
    for part in text.split(",") if text.strip() else ():
        first, dash, last = part.strip().partition("-")
        if not is_number(first) or (dash and not is_number(last)):
            raise ValueError(f"{part.strip()!r} is neither a core nor a range of cores")
        low, high = int(first), int(last or first)
        if not low <= high < _MAX_CORES:
            raise ValueError(f"{part.strip()!r} is not an ascending range below {_MAX_CORES}")
        cores.update(range(low, high + 1))
    return tuple(sorted(cores))


def is_number(text: str) -> bool:
    """Whether the kernel could have written this as the number of a core or a node, or a count of pages."""
    return text.isascii() and text.isdigit() and len(text) <= 5


def format_cpus(cores: Iterable[int]) -> str:
    """Write a list of cores as the kernel does."""
    ranges: List[List[int]] = []
    for core in sorted(set(cores)):
        if ranges and core == ranges[-1][1] + 1:
            ranges[-1][1] = core
        else:
            ranges.append([core, core])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges)
