"""Every error that a person can act on, in three short lines: what, why, what to do.

EdgekitError
├── BadInput       exit 2: bad usage, a missing or malformed file, a contradiction
├── ContractUnmet  exit 3: the best candidate was written, and it misses the contract
├── Missing        exit 4: a driver, a tool or a package is not on this machine
└── DeviceRefused  exit 5: a device refused, failed its health gate, or rolled back
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EdgekitError(Exception):
    """An error that a person can act on.

    Attributes:
        what: what happened.
        why: the cause, as far as it is known.
        fix: what to do about it.
    """

    exit_code = 1

    def __init__(self, what: str, why: str, fix: str) -> None:
        super().__init__(what, why, fix)
        self.what = what
        self.why = why
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.what}\n{self.why}\n{self.fix}"


class BadInput(EdgekitError):
    """Bad usage, a missing or malformed file, or a contradiction."""

    exit_code = 2


class NotPossible(BadInput):
    """This model cannot be made so; where it was one way among several, the others remain."""


class ContractUnmet(EdgekitError):
    """The contract was not met; the best candidate and the reason were written."""

    exit_code = 3


class Missing(EdgekitError):
    """Something needed is not on this machine."""

    exit_code = 4


class DeviceRefused(EdgekitError):
    """A device refused the bundle, failed its health gate, or rolled back."""

    exit_code = 5


def nearest(word: str, candidates: Iterable[str]) -> str:
    """Suggest the closest candidate: ``did you mean 'x'?``, or list what there is."""
    options = sorted(candidates)
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    return "choose one of: " + ", ".join(options)
