"""Which keys count: the files in ``keys_dir``, and what they said about their successors since.

The files are the root: the agent cannot write them. Each rotation document that was taken is kept as it came
and verified again from the root every time, so that no more rests on the agent's own disk than their order.
Pure: no disk.

Keys that documents connect form a lineage. Within it serials rise, a document may retire all older keys, and
the highest version that was committed holds for all (see ``ratchet``).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import Any, Dict, Iterable, List, Mapping, Sequence, Set

from device_agent import rotation as rotation_module
from device_agent.errors import TrustError
from device_agent.keys import PublicKey
from device_agent.rotation import Rotation

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrustedKey:
    """A key that counts or counted.

    Attributes:
        public: the key.
        retired: whether it signs nothing new any more.
        added_by: fingerprint of the key that named it in a rotation document; empty: it lies in ``keys_dir``.
    """

    public: PublicKey
    retired: bool = False
    added_by: str = ""

    def describe(self) -> Dict[str, Any]:
        """A form for JSON."""
        return {
            "name": self.public.name,
            "fingerprint": self.public.fingerprint,
            "retired": self.retired,
            "added_by": self.added_by,
        }


@dataclass(frozen=True)
class KeyRing:
    """Every key that counts or counted, by fingerprint.

    Attributes:
        keys: the keys.
        lineages: for each key that a document is about, a name of its lineage.
        serials: the highest serial of each lineage.
    """

    keys: Mapping[str, TrustedKey] = field(default_factory=dict)
    lineages: Mapping[str, str] = field(default_factory=dict)
    serials: Mapping[str, int] = field(default_factory=dict)

    def known(self) -> List[PublicKey]:
        """All keys, the retired ones too."""
        return [key.public for key in self.keys.values()]

    def usable(self) -> List[PublicKey]:
        """The keys that may sign something new."""
        return [key.public for key in self.keys.values() if not key.retired]

    def is_retired(self, fingerprint: str) -> bool:
        """Whether a key counted once and signs nothing new any more."""
        key = self.keys.get(fingerprint)
        return key is not None and key.retired

    def lineage(self, fingerprint: str) -> Set[str]:
        """A key's predecessors and successors, and itself."""
        name = self.lineages.get(fingerprint)
        return {fingerprint} | {key for key, of in self.lineages.items() if name is not None and of == name}

    def accepted(self, rotation: Rotation) -> KeyRing:
        """The ring after a new rotation document.

        Raises:
            TrustError: no key that may sign it did; it is old; or its key counts already or never again.
        """
        self._verify(rotation)
        added = self.keys.get(rotation.added.fingerprint)
        if added is not None and added.retired:
            raise TrustError(
                f"the key {added.public.name!r} was retired",
                "a retired key does not come back",
                "make a new key with `edgekit keygen`",
            )
        if added is not None:
            raise TrustError(
                f"the key {added.public.name!r} is trusted already",
                "a rotation document adds a new key",
                "`edgekit-agent trust` shows the keys that count",
            )
        return self._connected(rotation)._extended(rotation)

    def replayed(self, rotation: Rotation) -> KeyRing:
        """The ring after a rotation document that was accepted earlier.

        One whose signer's file was withdrawn since adds no key, yet still connects versions.
        """
        connected = self._connected(rotation)
        try:
            self._verify(rotation)
        except TrustError as error:
            _log.warning("the rotation to %s is ignored: %s", rotation.added.name, error.what)
            return connected
        return connected._extended(rotation)

    def _verify(self, rotation: Rotation) -> None:
        signer = self.keys.get(rotation.signer)
        if signer is None:
            known = ", ".join(key.name for key in self.usable()) or "none"
            raise TrustError(
                f"the rotation document is signed with an unknown key: {rotation.signer[:16]}",
                f"trusted keys: {known}",
                "sign it with a key that this device trusts",
            )
        if not rotation.envelope.is_signed_by(signer.public):
            raise TrustError(
                "the rotation document's signature is wrong",
                f"key {signer.public.name!r} did not make it, or it was changed afterwards",
                "get the document again from whoever signed it",
            )
        if signer.retired:
            raise TrustError(
                f"the rotation document is signed with the retired key {signer.public.name!r}",
                "a key that was retired names no successor",
                "sign it with the key that took its place",
            )
        last = self.serials.get(self.lineages.get(rotation.signer, rotation.signer), 0)
        if rotation.serial <= last:
            raise TrustError(
                f"the rotation document is old: it has serial {rotation.serial}",
                f"one with serial {last} was taken before",
                "make a new one with `edgekit rotate-key`",
            )

    def _connected(self, rotation: Rotation) -> KeyRing:
        """Put signer and new key into one lineage."""
        old = self.lineages.get(rotation.signer, rotation.signer)
        joined = self.lineages.get(rotation.added.fingerprint, rotation.added.fingerprint)
        lineages = {key: old if of == joined else of for key, of in self.lineages.items()}
        lineages.update({rotation.signer: old, rotation.added.fingerprint: old})
        serials = {of: serial for of, serial in self.serials.items() if of != joined}
        serials[old] = max(self.serials.get(old, 0), self.serials.get(joined, 0))
        return replace(self, lineages=lineages, serials=serials)

    def _extended(self, rotation: Rotation) -> KeyRing:
        new = rotation.added.fingerprint
        keys = dict(self.keys)
        if rotation.retires_older:
            older = (self.lineage(rotation.signer) & set(keys)) - {new}
            keys.update({key: replace(keys[key], retired=True) for key in older})
        keys.setdefault(new, TrustedKey(rotation.added, added_by=rotation.signer))
        serials = {**self.serials, self.lineages[rotation.signer]: rotation.serial}
        return replace(self, keys=keys, serials=serials)


def replay(files: Iterable[PublicKey], documents: Sequence[bytes]) -> KeyRing:
    """The keys that count.

    Args:
        files: the keys in ``keys_dir``.
        documents: the rotation documents that were accepted, in that order.
    """
    ring = KeyRing({key.fingerprint: TrustedKey(key) for key in files})
    for data in documents:
        try:
            ring = ring.replayed(rotation_module.parse(data))
        except TrustError as error:
            _log.error("a stored rotation document is damaged and ignored: %s", error.why)
    return ring
