"""The machine itself: Python, processor, memory, disk."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from pathlib import Path

from edgekit.doctor.finding import Finding
from edgekit.measure import processor

_MIN_PYTHON = (3, 10)
#: The demo peaks at 1.1 GB and leaves some hundred megabytes in its store; models of one's own are larger.
_USUAL_MEMORY_BYTES = 2 << 30
_USUAL_DISK_BYTES = 2 << 30
_MEMINFO = Path("/proc/meminfo")
#: Instructions that add products of 8-bit integers in 32 bits, as Linux names them.
_EXACT_ARM = ("asimddp", "i8mm")
_WIDTH_X86 = ("avx512f", "avx2", "avx")


def look(store: Path) -> list[Finding]:
    """A line each.

    Args:
        store: where stages keep their work; need not exist.
    """
    return [python(sys.version_info[:2]), int8(platform.machine(), processor.flags()), _memory(), disk(store)]


def python(version: tuple[int, ...]) -> Finding:
    """Whether this interpreter is new enough."""
    detail = f"{platform.python_version()} on {platform.machine()}, {len(os.sched_getaffinity(0))} CPUs"
    if version >= _MIN_PYTHON:
        return Finding("python", "ok", detail)
    return Finding("python", "missing", detail, "use Python 3.10 or newer")


def int8(machine: str, flags: frozenset[str]) -> Finding:
    """What the processor's instructions mean for INT8 here; see ``calibration.session.exact_session``.

    Args:
        machine: the architecture, such as ``x86_64``.
        flags: of the processor, as the kernel names them.
    """
    x86 = machine in processor.X86
    found = [flag for flag in (processor.EXACT_ON_X86 if x86 else _EXACT_ARM) if flag in flags]
    if found:
        return Finding("int8", "ok", f"{', '.join(found)}: 8-bit products are exact and quick")
    width = next((flag for flag in _WIDTH_X86 if flag in flags), "no AVX")
    if x86:
        return Finding(
            "int8",
            "warning",
            f"{width} without VNNI: exact 8-bit products need slower kernels, and INT8 may lose to FP32",
            "compress measures both; for devices like this one use --profile x86-cpu-avx2 (7-bit weights)",
        )
    return Finding(
        "int8",
        "warning",
        f"{machine} without dot-product instructions: INT8 may lose to FP32",
        "compress measures both, and ships nothing slower",
    )


def _memory() -> Finding:
    for line in _MEMINFO.read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key == "MemAvailable":
            return _room("memory", int(value.split()[0]) << 10, _USUAL_MEMORY_BYTES, "available")
    return Finding("memory", "warning", "the kernel does not say how much is available")


def disk(store: Path) -> Finding:
    """Whether stages can keep their work at ``store``."""
    place = store.absolute()
    existing = next(path for path in (place, *place.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return Finding(
            "disk", "missing", f"{existing} cannot be written", "work elsewhere, or give --workdir DIR"
        )
    free_bytes = shutil.disk_usage(existing).free
    return _room("disk", free_bytes, _USUAL_DISK_BYTES, f"free for {store}")


def _room(subject: str, found_bytes: int, usual_bytes: int, what: str) -> Finding:
    detail = f"{found_bytes / 2**30:.1f} GiB {what}"
    if found_bytes >= usual_bytes:
        return Finding(subject, "ok", detail)
    return Finding(
        subject,
        "warning",
        detail,
        f"make room: {usual_bytes >> 30} GiB are enough for the demo",
    )
