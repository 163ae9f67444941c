"""Listening sockets that systemd opened before the agent started: the protocol of sd_listen_fds(3).

They outlive the agent. While it is upgraded or starts again, clients that connect wait in the kernel, and the
next agent answers them.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from typing import Dict, Mapping, MutableMapping

from device_agent.errors import BadInput

_FIRST_DESCRIPTOR = 3
_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
_TCP = (socket.AF_INET, socket.AF_INET6)

#: The door that a socket opens, by the socket unit's FileDescriptorName and whether it is a Unix socket.
_DOORS = {
    ("http", False): "http",
    ("http", True): "unix",
    ("grpc", False): "grpc",
    ("metrics", False): "metrics",
    ("control", True): "control",
}

#: A socket for each door that is open already: ``http``, ``unix`` (HTTP too), ``grpc``, ``metrics``,
#: ``control``.
Passed = Dict[str, socket.socket]


def take(environment: MutableMapping[str, str]) -> Passed:
    """Take the sockets that were passed to this process, and their variables out of the environment.

    Raises:
        BadInput: one that the agent has no use for.
    """
    count = _count(environment)
    names = environment.get("LISTEN_FDNAMES", "").split(":")
    for variable in _VARIABLES:
        environment.pop(variable, None)
    passed: Passed = {}
    for number in range(count):
        listener = _open(_FIRST_DESCRIPTOR + number)
        door = _door_of(listener, names[number] if number < len(names) else "")
        if door in passed:
            raise _refused(f"two sockets were passed for {door}", "name one of them otherwise, or drop it")
        passed[door] = listener
    return passed


def refuse_remote(passed: Passed) -> None:
    """Let nobody in from the network where there is no TLS: the rule of agent.toml for passed sockets too.

    Raises:
        BadInput: a TCP socket is bound to an address that is not loopback.
    """
    for door, listener in passed.items():
        if listener.family in _TCP and not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
            raise _refused(
                f"the one for {door} is bound to {describe(listener)}: without TLS and a token anyone on the"
                " network could use it",
                "bind to 127.0.0.1 or [::1], or give [tls] in agent.toml a certificate and a token file",
            )


def describe(listener: socket.socket) -> str:
    """The address as a person writes it: ``host:port``, or a path."""
    address = listener.getsockname()
    if listener.family not in _TCP:
        return os.fsdecode(address)
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _count(environment: Mapping[str, str]) -> int:
    if environment.get("LISTEN_PID") != str(os.getpid()):
        return 0  # none were passed, or to the process that started this one
    try:
        return int(environment.get("LISTEN_FDS", ""))
    except ValueError as error:
        raise _refused("LISTEN_FDS is not a number", "start the agent through systemd") from error


def _open(descriptor: int) -> socket.socket:
    try:
        listener = socket.socket(fileno=descriptor)
    except OSError as error:
        raise _refused(f"descriptor {descriptor} is no socket", "pass only what listens") from error
    listener.set_inheritable(False)
    listener.setblocking(False)
    return listener


def _door_of(listener: socket.socket, name: str) -> str:
    if listener.type != socket.SOCK_STREAM or not listener.getsockopt(
        socket.SOL_SOCKET, socket.SO_ACCEPTCONN
    ):
        raise _refused(f"{name!r} does not listen for streams", "use ListenStream= and Accept=no")
    door = _DOORS.get((name, listener.family == socket.AF_UNIX))
    if door is None:
        kind = "Unix" if listener.family == socket.AF_UNIX else "TCP"
        raise _refused(
            f"nothing is served on a {kind} socket named {name!r}",
            "set FileDescriptorName=http (TCP, Unix), grpc, metrics (TCP) or control (Unix) in its unit",
        )
    return door


def _refused(why: str, fix: str) -> BadInput:
    return BadInput("the sockets that the service manager passed cannot be used", why, fix)
