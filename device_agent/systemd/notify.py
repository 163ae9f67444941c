"""What the service is told to the manager that started it: the protocol of sd_notify(3).

Datagrams of ``NAME=value`` lines go to the socket in ``NOTIFY_SOCKET``. Without one, as on a terminal,
everything here does nothing.
"""

from __future__ import annotations

import logging
import os
import socket
from typing import Mapping, MutableMapping, Optional

_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
_SEND_TIMEOUT_S = 1.0  # a manager that does not read must not stop the service

_log = logging.getLogger(__name__)


class ServiceManager:
    """The service manager; may be called from any thread.

    Attributes:
        watchdog_s: within which the manager expects to hear :meth:`alive` again; None: it does not watch.
    """

    def __init__(self, address: str = "", watchdog_s: Optional[float] = None) -> None:
        """Speak to the socket ``address``, ``@`` before an abstract one; empty: to nobody."""
        self.watchdog_s = watchdog_s if address else None
        self._address = "\0" + address[1:] if address.startswith("@") else address

    @classmethod
    def take(cls, environment: MutableMapping[str, str]) -> ServiceManager:
        """Take what the manager left out of the environment: child processes are not the service."""
        manager = cls(environment.get("NOTIFY_SOCKET", ""), _watchdog_s(environment))
        for name in _VARIABLES:
            environment.pop(name, None)
        return manager

    def ready(self) -> None:
        """The service is up."""
        self._send("READY=1")

    def stopping(self) -> None:
        """The service has begun to stop."""
        self._send("STOPPING=1")

    def status(self, text: str) -> None:
        """Say in words what goes on; ``systemctl status`` shows it."""
        self._send("STATUS=" + " ".join(text.split()))

    def alive(self) -> None:
        """All is well; a service that is watched and does not say so in time is ended and started again."""
        self._send("WATCHDOG=1")

    def extend(self, seconds: float) -> None:
        """Start or stop may take so much longer from now on."""
        self._send(f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}")

    def _send(self, state: str) -> None:
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.settimeout(_SEND_TIMEOUT_S)
            try:
                sender.sendto(state.encode(), self._address)
            except OSError as error:
                _log.warning("the service manager cannot be told %s: %s", state, error)


def _watchdog_s(environment: Mapping[str, str]) -> Optional[float]:
    """The interval, where it is meant for this process (sd_watchdog_enabled(3))."""
    if environment.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    try:
        microseconds = int(environment.get("WATCHDOG_USEC", "0"))
    except ValueError:
        _log.warning("WATCHDOG_USEC is not a number; nothing is told to the watchdog")
        return None
    return microseconds / 1e6 if microseconds > 0 else None
