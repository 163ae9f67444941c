"""Who may come in: signatures, keys and their rotation, and the ratchet, for one store.

What was committed goes on serving whatever happens to its key's standing, with a warning; what is new has to
be signed with a key that counts now, and be no older than what was committed (see ``ratchet``).
"""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Dict, Iterator, List, Tuple

from device_agent import archive, ratchet, rotation
from device_agent import manifest as manifest_module
from device_agent.errors import AgentError
from device_agent.manifest import Manifest
from device_agent.ratchet import Committed, Floors
from device_agent.signature import Signer, Trust, key_hint
from device_agent.store import Store
from device_agent.trust_store import TrustStore

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rotated:
    """What a rotation document did.

    Attributes:
        name: of the key that it is about.
        fingerprint: of that key.
        serial: of the document.
        retired: names of the keys that sign nothing new any more.
        changed: False if the document had been taken before.
    """

    name: str
    fingerprint: str
    serial: int
    retired: Tuple[str, ...]
    changed: bool


class Admission:
    """Decides about the bundles of one store; whoever holds the store's lock may use it."""

    def __init__(self, store: Store, trust: Trust) -> None:
        self._store = store
        self._learned = TrustStore(store.trust_dir)
        self._trust = replace(trust, rotations=self._learned.rotations)

    # Bundles

    def admit(self, head: archive.Head, allow_downgrade: bool = False) -> Signer:
        """Decide about a bundle before any of it is stored.

        Args:
            head: what was read of it.
            allow_downgrade: a person at the device wants it though it may be old.

        Raises:
            TrustError: not signed, or not with a key that counts.
            DowngradeError: older than what was committed here.
        """
        signer = self._trust.authenticate(head)
        _warn(head.manifest, signer)
        name, is_active = head.manifest.name, head.digest == self._store.active(head.manifest.name)
        if not allow_downgrade and not is_active:
            ratchet.require(self.floor(name, signer), name, head.manifest.version)
        return signer

    def check(self, name: str, digest: str) -> Tuple[Manifest, Signer]:
        """Check an installed version again: its files may have decayed, its key may be withdrawn.

        Raises:
            TrustError: a file changed, or no key that counts or counted signed it.
        """
        directory = self._store.directory(name, digest)
        manifest, _ = manifest_module.read(directory)
        signer = self._trust.check(directory, manifest, digest)
        _warn(manifest, signer)
        return manifest, signer

    def readmit(self, name: str, digest: str) -> Tuple[Manifest, Signer]:
        """Check an installed version before it is activated; one that was committed may always come back.

        Raises:
            TrustError: as ``check``; or it was never committed, and its key is retired by now.
            DowngradeError: it was never committed, and a newer one was.
        """
        manifest, signer = self.check(name, digest)
        if digest not in self._store.state(name).committed:
            self.admit(archive.read_head(self._store.directory(name, digest)))
        return manifest, signer

    # The ratchet

    def floor(self, name: str, signer: Signer) -> int:
        """The lowest version of a model that ``signer`` may still bring; 0: any."""
        floors = ratchet.raised(self._learned.floors(), self._committed(name))
        return ratchet.floor_of(floors, self._trust.keyring().lineage(signer.fingerprint), name)

    def settle(self, name: str) -> None:
        """Write down the versions that were committed, so that removing them does not forget them.

        Raises:
            Refused: the disk failed; what is installed still counts.
        """
        before = self._learned.floors()
        after: Floors = ratchet.raised(before, self._committed(name))
        if after != before:
            self._learned.set_floors(after)

    def settle_all(self) -> None:
        """Write down the committed versions of every model; a disk that fails is only logged."""
        for name in self._store.names():
            try:
                self.settle(name)
            except AgentError as error:
                _log.error("%s: %s: %s", name, error.what, error.why)

    def _committed(self, name: str) -> Iterator[Committed]:
        for version in self._store.versions(name):
            if version.committed:
                with suppress(AgentError, OSError):  # a damaged version says nothing
                    head = archive.read_head(version.directory)
                    signer = "" if head.signature is None else key_hint(head.signature)
                    yield Committed(signer, name, head.manifest.version)

    # Keys

    def rotate(self, document: bytes) -> Rotated:
        """Take a rotation document: its key counts from now on, and older ones may be retired.

        Taking the newest document once more changes nothing and is no error.

        Raises:
            TrustError: it is malformed, old, or not signed with a key that counts.
            Refused: the disk failed; the keys are those of before.
        """
        parsed = rotation.parse(document)
        before = self._trust.keyring()
        known = self._learned.rotations()
        repeated = known[-1:] == [document]
        if not repeated:
            after = before.accepted(parsed)
            self._learned.add_rotation(document)
        else:
            after = before
        retired = tuple(key.public.name for key in after.keys.values() if key.retired)
        _log.warning("the key %s (%s) is trusted", parsed.added.name, parsed.added.fingerprint[:16])
        return Rotated(parsed.added.name, parsed.added.fingerprint, parsed.serial, retired, not repeated)

    def keys(self) -> List[Dict[str, Any]]:
        """Describe every key that counts or counted."""
        return [key.describe() for key in self._trust.keyring().keys.values()]


def _warn(manifest: Manifest, signer: Signer) -> None:
    if not signer.signed:
        _log.warning(
            "%s version %d is not signed; allow_unsigned lets it in", manifest.name, manifest.version
        )
    if signer.retired:
        _log.warning(
            "%s version %d is signed with the retired key %s; it serves on, a newer one needs the new key",
            manifest.name,
            manifest.version,
            signer.name,
        )
