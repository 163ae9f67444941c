"""Reach an agent through the user's own OpenSSH.

``ssh HOST edgekit-agent connect`` is started as a child, so that its configuration, keys, agents, jump hosts
and known hosts all count; edgekit opens no port and keeps no key.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from edgekit.deploy.connection import Connection, LinkLost
from edgekit.errors import BadInput, EdgekitError, Missing

_REMOTE_COMMAND = ("edgekit-agent", "connect")
_NAME = re.compile(r"[A-Za-z0-9_.:%][A-Za-z0-9_.:%@-]*")  # nothing that ssh could take for an option
_KEEP_STDERR_BYTES = 4096
_END_TIMEOUT_S = 5.0
_FAILED, _NOT_FOUND = 255, 127


@dataclass(frozen=True)
class SshAddress:
    """A device, as ssh knows it.

    Attributes:
        host: a name, an address, or a ``Host`` of the user's ssh configuration.
        user: empty: what ssh chooses.
        port: 0: what ssh chooses.
        identity: a private key file; empty: what ssh chooses.
    """

    host: str
    user: str = ""
    port: int = 0
    identity: str = ""

    def __str__(self) -> str:
        user = f"{self.user}@" if self.user else ""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"ssh://{user}{host}" + (f":{self.port}" if self.port else "")


@dataclass(frozen=True)
class SshOptions:
    """How ssh is started.

    Attributes:
        config: a configuration file in the place of the user's; None: the user's.
        batch: never ask for a password or a confirmation, and do not hear Ctrl-C: where several devices are
            reached at once, or nobody sits at the terminal.
    """

    config: Path | None = None
    batch: bool = True


def parse(address: str) -> SshAddress:
    """Read ``ssh://[user@]host[:port]``.

    Raises:
        BadInput: it is no such address.
    """
    try:
        parts = urlsplit(address)
        host, port = parts.hostname or "", parts.port or 0
    except ValueError as error:
        raise _bad_address(address, str(error)) from error
    if parts.scheme != "ssh" or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise _bad_address(address, "it is not of the form ssh://[user@]host[:port]")
    if parts.password is not None:
        raise _bad_address(address, "a password in it would be visible to everyone on this machine")
    # urlsplit lowers the case, in which a Host of the ssh configuration may be written
    start = parts.netloc.lower().rfind(host)
    return checked(SshAddress(parts.netloc[start : start + len(host)], parts.username or "", port))


def checked(address: SshAddress) -> SshAddress:
    """Return an address whose parts ssh takes for nothing else.

    Raises:
        BadInput: a part is empty or malformed.
    """
    for part in (address.host, *([address.user] if address.user else [])):
        if not _NAME.fullmatch(part):
            raise _bad_address(str(address), f"{part!r} is not a name of a host or a user")
    if not 0 <= address.port <= 65535:
        raise _bad_address(str(address), f"{address.port} is not a port")
    return address


def command(address: SshAddress, options: SshOptions, remote: tuple[str, ...] = _REMOTE_COMMAND) -> list[str]:
    """The argument vector that starts ``remote`` there."""
    argv = ["ssh", "-T", "-o", "ServerAliveInterval=15", "-o", "ConnectTimeout=30"]
    if options.config is not None:
        argv += ["-F", str(options.config)]
    if options.batch:
        argv += ["-o", "BatchMode=yes"]
    if address.port:
        argv += ["-p", str(address.port)]
    if address.user:
        argv += ["-l", address.user]
    if address.identity:
        argv += ["-i", address.identity]
    return [*argv, "--", address.host, *remote]


def no_ssh() -> Missing:
    """The error where this machine has no ssh."""
    return Missing(
        "there is no ssh on this machine",
        "devices are reached through OpenSSH",
        "install it (Debian: openssh-client)",
    )


def batch_needed(devices: int) -> bool:
    """Whether nobody could answer what ssh asks."""
    return devices > 1 or not sys.stdin.isatty()


@contextmanager
def connect(address: SshAddress, options: SshOptions) -> Iterator[Connection]:
    """A connection to the device's agent, for the length of a ``with`` block.

    Raises:
        Missing: there is no ssh here, the device cannot be reached, or has no agent.
        DeviceRefused: the agent there cannot be asked.
    """
    try:
        process = subprocess.Popen(
            command(address, options),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=options.batch,  # Ctrl-C is for edgekit, which lets the devices finish
        )
    except FileNotFoundError as error:
        raise no_ssh() from error
    with process:
        link = _Link(address, process)
        try:
            yield link.connection()
        finally:
            link.end()


class _Link:
    """A running ssh."""

    def __init__(self, address: SshAddress, process: subprocess.Popen[bytes]) -> None:
        self._address = address
        self._process = process
        self._said = b""
        self._greeted = False
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def connection(self) -> Connection:
        """Read the greeting, and return what can be asked from then on."""
        if self._process.stdout is None or self._process.stdin is None:
            raise ValueError("ssh was started without pipes")
        connection = Connection(self._process.stdout, self._process.stdin, self._why_lost)
        connection.greeting()
        self._greeted = True
        return connection

    def end(self) -> None:
        """Close the connection, and see that ssh ends."""
        with suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        try:
            self._process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.wait()
        self._listener.join(_END_TIMEOUT_S)

    def _listen(self) -> None:
        if self._process.stderr is not None:
            for line in self._process.stderr:
                self._said = (self._said + line)[-_KEEP_STDERR_BYTES:]

    def _why_lost(self) -> EdgekitError:
        try:
            code = self._process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            code = None
        self._listener.join(_END_TIMEOUT_S)
        lines = self._said.decode(errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), f"ssh ended with code {code}")
        if self._greeted:
            return LinkLost(
                f"the connection to {self._address} broke",
                said,
                "deploy again: what the device received is kept, and what it began it finishes",
            )
        if code == _FAILED:
            return Missing(
                f"{self._address} cannot be reached",
                said,
                f"see that `ssh {self._address.host}` works by itself",
            )
        if code == _NOT_FOUND:
            return Missing(
                f"there is no edgekit-agent on {self._address}",
                said,
                "install it there, and see that `ssh HOST edgekit-agent --version` finds it",
            )
        return Missing(
            f"no agent answers on {self._address}",
            said,
            "run `edgekit-agent connect` there: it prints one line, or says what is wrong",
        )


def _bad_address(address: str, why: str) -> BadInput:
    return BadInput(f"cannot deploy to {address!r}", why, "use ssh://[user@]host[:port]")
