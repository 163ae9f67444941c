"""Which versions of a model matter, and how operations change that. Pure: no disk."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Mapping, Optional, Tuple


@dataclass(frozen=True)
class ModelState:
    """Which versions of a model matter.

    Attributes:
        active: digest of the version that is served; None before the first activation.
        fallback: digest of the version to return to; None if there is none.
        committed: digests of the versions that have proven themselves on this device, oldest first.
    """

    active: Optional[str] = None
    fallback: Optional[str] = None
    committed: Tuple[str, ...] = ()

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Optional[ModelState]:
        """Read what ``dataclasses.asdict`` gave; None if it is damaged."""
        active, fallback, committed = raw.get("active"), raw.get("fallback"), raw.get("committed", [])
        named = [digest for digest in (active, fallback) if digest is not None]
        if not isinstance(committed, list) or not all(isinstance(item, str) for item in [*named, *committed]):
            return None
        return cls(active, fallback, tuple(committed))

    def activated(self, digest: str) -> ModelState:
        """Make ``digest`` active; what was active and proven becomes the fallback."""
        if digest == self.active:
            return self
        proven = self.active is not None and self.active in self.committed
        fallback = self.active if proven else self.fallback
        return replace(self, active=digest, fallback=None if fallback == digest else fallback)

    def with_commit(self) -> ModelState:
        """Record that the active version has proven itself."""
        if self.active is None or self.active in self.committed:
            return self
        return replace(self, committed=(*self.committed, self.active))

    def rolled_back(self) -> ModelState:
        """Swap the active version and the fallback."""
        return replace(self, active=self.fallback, fallback=self.active)

    def given_up(self) -> ModelState:
        """Return to the fallback for good."""
        return replace(self, active=self.fallback, fallback=None)

    def without_fallback(self) -> ModelState:
        """Have no version to return to."""
        return replace(self, fallback=None)

    def without(self, digest: str) -> ModelState:
        """Forget a version that is not active."""
        kept = tuple(item for item in self.committed if item != digest)
        return replace(self, fallback=None if self.fallback == digest else self.fallback, committed=kept)
