"""What can go wrong on a device, in three short lines each.

AgentError
├── BadInput          exit 2: a file, request or setting is wrong
│   ├── ManifestError the manifest is malformed, or newer than this agent
│   └── TrustError    the signature is missing, wrong, or from an unknown key
├── Missing           exit 4: a runtime, driver or tool is not on this device
└── Refused           exit 5: the device will not run this (self-test, memory, health gate)
    └── DowngradeError exit 5: it is older than what was committed here
"""

from __future__ import annotations


class AgentError(Exception):
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


class BadInput(AgentError):
    """A file, a request or a setting is wrong."""

    exit_code = 2


class ManifestError(BadInput):
    """The manifest is malformed, or newer than this agent understands."""


class TrustError(BadInput):
    """The signature is missing, wrong, or made with a key that this device does not trust."""


class Missing(AgentError):
    """Something needed is not on this device: a runtime, a driver, a tool."""

    exit_code = 4


class Refused(AgentError):
    """The device refuses to serve this: it failed its self-test, its limits or its health gate."""

    exit_code = 5


class DowngradeError(Refused):
    """The version is older than one that this device committed; a person may allow it (see ``ratchet``)."""
