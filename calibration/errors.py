"""What can go wrong in calibration, in three short lines."""

from __future__ import annotations


class CalibrationError(Exception):
    """A model, a sample or a setting that calibration cannot work with.

    Attributes:
        what: what happened.
        why: the cause, as far as it is known.
        fix: what to do about it.
    """

    def __init__(self, what: str, why: str, fix: str) -> None:
        super().__init__(what, why, fix)
        self.what = what
        self.why = why
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.what}\n{self.why}\n{self.fix}"


class NothingToQuantize(CalibrationError):
    """The model has no operator that could be computed in integers."""
