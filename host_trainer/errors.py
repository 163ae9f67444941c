"""What stops a training run, in three short lines: what, why, what to do.

TrainingError
├── ConfigError    a key, a file or a sample is wrong
├── MissingError   a GPU or a package is not on this machine
└── Diverged       NaN, infinity or an explosion
"""

from __future__ import annotations


class TrainingError(Exception):
    """Training cannot go on.

    Attributes:
        what: what happened.
        why: the cause, as far as it is known.
        fix: what to do about it.
    """

    #: Of the command line: 2 for what the user gave, 4 for what the machine lacks.
    exit_code = 2

    def __init__(self, what: str, why: str, fix: str) -> None:
        super().__init__(what, why, fix)
        self.what = what
        self.why = why
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.what}\n{self.why}\n{self.fix}"


class ConfigError(TrainingError):
    """A key, a file or a sample is wrong."""


class MissingError(TrainingError):
    """A GPU or a package is not on this machine."""

    exit_code = 4


class Diverged(TrainingError):
    """The loss or the gradient became NaN, infinite or far too large.

    Attributes:
        data_at_fault: the batch itself holds NaN or infinity, so that going back does not help.
    """

    def __init__(self, what: str, why: str, fix: str, data_at_fault: bool = False) -> None:
        super().__init__(what, why, fix)
        self.data_at_fault = data_at_fault
