"""Whether the figures of a profile can be true together: peaks against clocks, bandwidth against the bus."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.errors import BadInput

if TYPE_CHECKING:
    from edgekit.profile import Profile

# A stated peak may lie below cores x clock x operations (boost clocks, power limits), hardly above it.
_PEAK_FRACTION = (0.5, 1.05)
#: A stated bandwidth is the bus's width times its transfers, give or take the rounding of a data sheet.
_BANDWIDTH_FRACTION = (0.95, 1.02)


def check(profile: Profile, path: str | Path) -> None:
    """Compute what can be computed of a profile, and compare.

    Raises:
        BadInput: a figure is out of reach of those beside it.
    """
    _check_peaks(profile, path)
    _check_bandwidth(profile, path)


def _check_peaks(profile: Profile, path: str | Path) -> None:
    chip = profile.accelerator
    lowest, highest = _PEAK_FRACTION
    for precision, peak in profile.peak.items():
        if precision not in chip.ops_per_cycle:
            continue
        computed = chip.cores * chip.clock_mhz * 1e6 * chip.ops_per_cycle[precision]
        if not lowest * computed <= peak.ops_per_second <= highest * computed:
            raise BadInput(
                f"the profile {path} is not plausible: peak.{precision}.ops_per_second",
                f"it says {peak.ops_per_second:.3g}, but {chip.cores} cores x {chip.clock_mhz:g} MHz x "
                f"{chip.ops_per_cycle[precision]:g} operations a cycle are {computed:.3g}",
                "correct the peak, accelerator.cores, clock_mhz or ops_per_cycle",
            )


def _check_bandwidth(profile: Profile, path: str | Path) -> None:
    memory = profile.memory
    if memory.bus_bits is None or memory.megatransfers_per_second is None:
        return
    computed = memory.bus_bits / 8 * memory.megatransfers_per_second * 1e6
    lowest, highest = _BANDWIDTH_FRACTION
    if not lowest * computed <= memory.bandwidth_bytes_per_second <= highest * computed:
        raise BadInput(
            f"the profile {path} is not plausible: memory.bandwidth_bytes_per_second",
            f"it says {memory.bandwidth_bytes_per_second:.3g}, but {memory.bus_bits} bits x "
            f"{memory.megatransfers_per_second:g} MT/s are {computed:.3g}",
            "correct the bandwidth, memory.bus_bits or megatransfers_per_second",
        )
