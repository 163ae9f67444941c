"""Weighted fair use of the processor by the engines of several models.

Start-time fair queueing (Goyal, Vin, Cheng 1996): each model has a virtual time, which a run moves on by its
duration over the model's weight, and the model that is furthest behind runs next. A model that was idle
starts at the virtual time of those who ran meanwhile, so that it saves up nothing. A hot model thus gets all
that the others leave, and no more.

Runs are not interrupted. So that a light model need not wait for a heavy one's run, a run that is much
shorter than every one under way may start beside them, as long as its model has had less than theirs will
have had.
"""

from __future__ import annotations

from typing import Callable, List, Optional

_LIGHT_FRACTION = 0.25


class Tenant:
    """A model's account.

    Attributes:
        weight: its share, relative to the others'.
        virtual_s: seconds that it has used, over its weight.
        has_turn: whether a place is kept for it.
        running_s: how long the run that is under way should take; None: it runs nothing.
    """

    def __init__(self, weight: float, on_turn: Callable[[], None]) -> None:
        """Open an account.

        Args:
            weight: above zero.
            on_turn: called when a place has become free for a tenant that was refused one; it must then
                either :meth:`EngineShare.acquire` or :meth:`EngineShare.decline` it.
        """
        self.weight = weight
        self.virtual_s = 0.0
        self.has_turn = False
        self.running_s: Optional[float] = None
        self.on_turn = on_turn


class EngineShare:
    """Places for runs, given out fairly. Not thread-safe."""

    def __init__(self, places: int = 1) -> None:
        """Let ``places`` runs go on at the same time."""
        self._free = places
        self._virtual_s = 0.0  # of the last run that was started
        self._waiting: List[Tenant] = []
        self._running: List[Tenant] = []

    def acquire(self, tenant: Tenant, run_s: Optional[float] = None) -> bool:
        """Take a place for a run that should last ``run_s``.

        Returns:
            False: not now; ``on_turn`` will be called.
        """
        if tenant.has_turn:
            tenant.has_turn = False
        elif self._free > 0:
            self._free -= 1
        elif self._is_light(tenant, run_s):
            self._free -= 1  # below zero: one more run must end before another is offered a place
            self._begin(tenant, run_s)
            return True
        else:
            if tenant not in self._waiting:
                self._waiting.append(tenant)
            return False
        self._begin(tenant, run_s)
        self._virtual_s = tenant.virtual_s
        return True

    def _begin(self, tenant: Tenant, run_s: Optional[float]) -> None:
        if tenant in self._waiting:
            self._waiting.remove(tenant)
        tenant.virtual_s = max(tenant.virtual_s, self._virtual_s)
        tenant.running_s = run_s or 0.0
        self._running.append(tenant)

    def release(self, tenant: Tenant, used_s: float, again: bool = False) -> None:
        """End a run that took ``used_s``; ``again`` asks for the next place at the same time.

        Where the tenant itself is next, it ``has_turn`` and ``on_turn`` is not called.
        """
        tenant.virtual_s += used_s / tenant.weight
        tenant.running_s = None
        self._running.remove(tenant)
        self._free += 1
        if again:
            self._waiting.append(tenant)
        self._offer(tenant)

    def decline(self, tenant: Tenant) -> None:
        """Give back a turn unused."""
        if tenant.has_turn:
            tenant.has_turn = False
            self._free += 1
            self._offer(None)

    def leave(self, tenant: Tenant) -> None:
        """Ask for no more places."""
        if tenant in self._waiting:
            self._waiting.remove(tenant)
        self.decline(tenant)

    def _offer(self, caller: Optional[Tenant]) -> None:
        while self._free > 0 and self._waiting:
            tenant = min(self._waiting, key=lambda waiting: waiting.virtual_s)
            self._waiting.remove(tenant)
            self._free -= 1
            tenant.has_turn = True
            if tenant is not caller:
                tenant.on_turn()

    def _is_light(self, tenant: Tenant, run_s: Optional[float]) -> bool:
        if run_s is None:
            return False
        end_s = max(tenant.virtual_s, self._virtual_s) + run_s / tenant.weight
        return all(
            run_s <= _LIGHT_FRACTION * (other.running_s or 0.0)
            and end_s <= other.virtual_s + (other.running_s or 0.0) / other.weight
            for other in self._running
        )
