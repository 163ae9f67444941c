"""Processor cores and memory nodes of a model: asked for, applied to threads, and read back.

Linux keeps both for each thread, and a new thread inherits those of the one that starts it. A runtime's own
threads are therefore placed by placing the thread that opens the engine (``placed``), and the thread that
runs it is placed when it starts (``place_thread``). What came of it is read from ``/proc`` (``describe``).
"""

from __future__ import annotations

import ctypes
import os
import platform
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Optional, Set, Tuple

from device_agent.core_list import format_cpus, is_number, parse_cpus
from device_agent.errors import Refused

_NODES = Path("/sys/devices/system/node")
_MASK_BITS = 1024  # of a mask of memory nodes
_MPOL_DEFAULT, _MPOL_BIND = 0, 2  # linux/mempolicy.h
_POLICIES = {0: "default", 1: "preferred", 2: "bind", 3: "interleave", 4: "local", 5: "preferred many"}

#: The numbers of set_mempolicy(2) and get_mempolicy(2), which the C library does not wrap.
_SYSCALLS = {"x86_64": (238, 239), "aarch64": (237, 236), "riscv64": (237, 236)}

_Mask = ctypes.c_ulong * (_MASK_BITS // (8 * ctypes.sizeof(ctypes.c_ulong)))


@dataclass(frozen=True)
class Placement:
    """Where a model may run.

    Attributes:
        cpus: the cores that its threads may use, ascending; empty: any.
        numa_node: the node that its memory comes from; None: any.
    """

    cpus: Tuple[int, ...] = ()
    numa_node: Optional[int] = None

    def __bool__(self) -> bool:
        return bool(self.cpus) or self.numa_node is not None


ANYWHERE = Placement()


def resolve(placement: Placement) -> Placement:
    """Take a node's cores where none are named, and check that all of it may be used.

    Raises:
        Refused: a core or a node does not exist or is not allowed to this process.
    """
    cpus = placement.cpus
    if placement.numa_node is not None and not cpus:
        cpus = _cpus_of_node(placement.numa_node)
    allowed = os.sched_getaffinity(os.getpid())  # the main thread's, which is never placed
    missing = [core for core in cpus if core not in allowed]
    if missing:
        raise Refused(
            f"the cores {format_cpus(missing)} cannot be used",
            f"this process may use {format_cpus(allowed)}",
            "name some of those in the model's cpus, or give the service more (CPUAffinity=)",
        )
    return Placement(cpus, placement.numa_node)


def _cpus_of_node(node: int) -> Tuple[int, ...]:
    try:
        return parse_cpus((_NODES / f"node{node}" / "cpulist").read_text())
    except OSError as error:
        there = ", ".join(sorted(path.name[4:] for path in _NODES.glob("node[0-9]*"))) or "none"
        raise Refused(
            f"the memory node {node} is not there",
            f"this machine has: {there}",
            "set the model's numa_node to one of those, or leave it out",
        ) from error


# Applying


@contextmanager
def placed(placement: Placement) -> Iterator[None]:
    """Place the calling thread, and with it every thread that it starts, for a ``with`` block.

    Raises:
        Refused: the kernel does not allow it.
    """
    if not placement:
        yield
        return
    cores, policy = os.sched_getaffinity(0), _get_policy() if placement.numa_node is not None else None
    try:
        place_thread(placement)
        yield
    finally:
        os.sched_setaffinity(0, cores)
        if policy is not None:
            _set_policy(*policy)


def place_thread(placement: Placement) -> None:
    """Place the calling thread for good.

    Raises:
        Refused: the kernel does not allow it.
    """
    if placement.cpus:
        try:
            os.sched_setaffinity(0, placement.cpus)
        except OSError as error:
            raise Refused(
                f"a thread cannot be bound to the cores {format_cpus(placement.cpus)}",
                error.strerror or str(error),
                "name other cores in the model's cpus, or none",
            ) from error
    if placement.numa_node is not None:
        mask = _Mask()
        word, bit = divmod(placement.numa_node, 8 * ctypes.sizeof(ctypes.c_ulong))
        mask[word] = 1 << bit
        _set_policy(_MPOL_BIND, mask)


def place_process(placement: Placement) -> None:
    """Place every thread that this process has, also those that libraries started when they were imported.

    Raises:
        Refused: the kernel does not allow it.
    """
    place_thread(placement)
    for thread in threads_of(os.getpid()) if placement.cpus else ():
        with suppress(ProcessLookupError):  # it has just ended
            os.sched_setaffinity(thread, placement.cpus)


def _set_policy(mode: int, mask: Any) -> None:
    # The kernel refuses a mask with the default policy.
    arguments = (None, 0) if mode == _MPOL_DEFAULT else (ctypes.byref(mask), _MASK_BITS)
    _policy_call(0, ctypes.c_long(mode), *arguments)


def _get_policy() -> Tuple[int, Any]:
    mode, mask = ctypes.c_int(), _Mask()
    _policy_call(1, ctypes.byref(mode), ctypes.byref(mask), _MASK_BITS, None, 0)
    return mode.value, mask


def _policy_call(which: int, *arguments: Any) -> None:
    numbers = _SYSCALLS.get(platform.machine())
    if numbers is None:
        raise _no_policy(f"it is not known how to ask for it on {platform.machine()}")
    libc = ctypes.CDLL(None, use_errno=True)
    widened = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments]
    if libc.syscall(ctypes.c_long(numbers[which]), *widened) != 0:
        raise _no_policy(os.strerror(ctypes.get_errno()))


def _no_policy(why: str) -> Refused:
    return Refused(
        "memory cannot be bound to a node",
        why,
        "leave the model's numa_node out; a kernel without NUMA, or a container, may not allow it",
    )


# Reading back


def threads_of(process: int) -> Set[int]:
    """The ids of a process's threads; empty once it has ended."""
    try:
        return {int(name) for name in os.listdir(f"/proc/{process}/task")}
    except FileNotFoundError:
        return set()


def describe(process: int, threads: Iterable[int]) -> List[Dict[str, Any]]:
    """What the kernel says of threads: the cores they may use, the nodes, and the core that ran each last.

    Returns:
        One entry a thread with ``thread``, ``cpus``, ``memory_nodes`` and ``last_core``; threads that have
        ended are left out.
    """
    entries = []
    for thread in sorted(threads):
        task = Path(f"/proc/{process}/task/{thread}")
        try:
            status = dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines())
            # Field 39; the name before it may hold spaces.
            last_core = int((task / "stat").read_text().rpartition(")")[2].split()[36])
        except (FileNotFoundError, ProcessLookupError):
            continue
        entries.append(
            {
                "thread": thread,
                "cpus": status["Cpus_allowed_list"],
                "memory_nodes": status["Mems_allowed_list"],
                "last_core": last_core,
            }
        )
    return entries


def policy_of_thread() -> str:
    """The memory policy of the calling thread, such as ``default`` or ``bind 0``.

    Raises:
        Refused: the kernel does not tell.
    """
    mode, mask = _get_policy()
    bits = 8 * ctypes.sizeof(ctypes.c_ulong)
    nodes = [w * bits + b for w, word in enumerate(mask) for b in range(bits) if word >> b & 1]
    return f"{_POLICIES.get(mode, mode)} {format_cpus(nodes)}".rstrip()


def pages_by_node(process: int) -> Dict[str, int]:
    """How many pages of a process lie on each memory node; empty where the kernel does not say."""
    counts: Dict[str, int] = {}
    try:
        maps = Path(f"/proc/{process}/numa_maps").read_text()
    except OSError:
        return counts
    for field in maps.split():
        node, equals, pages = field.partition("=")
        if equals and node[:1] == "N" and is_number(node[1:]) and is_number(pages):
            counts[node[1:]] = counts.get(node[1:], 0) + int(pages)
    return counts
