"""What this machine's processor means for INT8."""

from __future__ import annotations

import platform
from pathlib import Path

from edgekit.profile import Profile

#: Instructions that add products of 8-bit integers in 32 bits, as Linux names them.
EXACT_ON_X86 = ("avx512_vnni", "avx_vnni", "amx_int8")
X86 = ("x86_64", "AMD64")
_CPUINFO = Path("/proc/cpuinfo")


def flags() -> frozenset[str]:
    """The instructions that the processor has, as Linux names them; empty where it is not known."""
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()  # not Linux
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def lacks_vnni() -> bool:
    """Whether this is an x86 processor that adds two 8-bit products in 16 bits."""
    found = flags()
    return platform.machine() in X86 and bool(found) and found.isdisjoint(EXACT_ON_X86)


def unlike(profile: Profile) -> str | None:
    """Why INT8 for a profile is slower here than on its devices; None: nothing is known to be.

    Weights of eight bits would saturate here, so ONNX Runtime takes slower kernels; those of seven
    bits, which a profile with ``saturating_int8`` has, do not.
    """
    counts = profile.runtime.name == "onnxruntime" and profile.architecture in X86
    if not counts or profile.accelerator.saturating_int8 or not lacks_vnni():
        return None
    return f"this processor has no VNNI, which {profile.name} counts on; x86-cpu-avx2 is for such ones"
