"""The ratchet against downgrade: a device does not go back behind what it committed.

For each signing key and each model the highest committed ``version`` is kept, the floor; a lower one is
refused. No clock and no network is asked, so it holds for a bundle on a USB stick too. Equal versions pass,
as with the rollback index of Android Verified Boot: a release that is built again keeps its number. Keys
that rotations connect share their floors; keys of different owners do not, so that none can shut out another.
Pure: no disk.
"""

from __future__ import annotations

from typing import AbstractSet, Iterable, Mapping, NamedTuple

from device_agent.errors import DowngradeError

#: By a key's fingerprint (empty: unsigned bundles) and a model's name, the highest committed version.
Floors = Mapping[str, Mapping[str, int]]


class Committed(NamedTuple):
    """A version that was committed, and the fingerprint of the key that signed it."""

    signer: str
    name: str
    version: int


def raised(floors: Floors, committed: Iterable[Committed]) -> Floors:
    """The floors after versions were committed; none ever falls."""
    changed = {signer: dict(models) for signer, models in floors.items()}
    for item in committed:
        models = changed.setdefault(item.signer, {})
        models[item.name] = max(item.version, models.get(item.name, 0))
    return changed


def floor_of(floors: Floors, lineage: AbstractSet[str], name: str) -> int:
    """The highest version of a model that a key of ``lineage`` signed and this device committed; 0: none."""
    return max((floors.get(signer, {}).get(name, 0) for signer in lineage), default=0)


def require(floor: int, name: str, version: int) -> None:
    """Refuse a version below the floor.

    Raises:
        DowngradeError: it is below.
    """
    if version < floor:
        raise DowngradeError(
            f"version {version} of {name!r} is older than what this device committed: {floor}",
            "an old release may have faults that a newer one mended, so a device does not go back by itself",
            "install a newer version; a person at the device may pass `--allow-downgrade`, or roll back",
        )
