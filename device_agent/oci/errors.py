"""What can go wrong with a registry."""

from __future__ import annotations

from device_agent.errors import AgentError


class RegistryError(AgentError):
    """The registry cannot be reached, fails, or sends something else than was asked for; it may pass.

    Attributes:
        retry_after_s: how long the registry asks to be left alone; 0: it did not say.
    """

    exit_code = 4

    def __init__(self, what: str, why: str, fix: str, retry_after_s: float = 0.0) -> None:
        super().__init__(what, why, fix)
        self.retry_after_s = retry_after_s


class NotThere(RegistryError):
    """The registry has no such tag, manifest or blob."""

    exit_code = 2


class Denied(RegistryError):
    """The registry wants credentials, or other ones."""

    exit_code = 2
