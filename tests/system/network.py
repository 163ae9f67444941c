"""A network between this machine and one device, whose cable can be pulled."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

_HERE, _THERE = "10.213.7.1", "10.213.7.2"


@dataclass(frozen=True)
class Network:
    """A network namespace with one link to this machine.

    Attributes:
        namespace: its name.
        here: this machine's address on the link.
    """

    namespace: str
    here: str = _HERE

    def unplug(self) -> None:
        """The device reaches nobody any more, and nobody hears of it."""
        _ip("link", "set", _link(self.namespace), "down")

    def plug(self) -> None:
        """The link is there again."""
        _ip("link", "set", _link(self.namespace), "up")


@contextmanager
def private_network(name: str) -> Iterator[Network]:
    """A network for the length of a ``with`` block; may skip.

    Args:
        name: at most 10 letters.
    """
    if shutil.which("ip") is None:
        pytest.skip("ip is not on this machine: apt install iproute2")
    if os.geteuid() != 0:
        pytest.skip("a network needs root: run `sudo make test-system`")
    _ip("netns", "add", name)
    try:
        _ip("link", "add", _link(name), "type", "veth", "peer", "name", "uplink", "netns", name)
        _ip("address", "add", f"{_HERE}/30", "dev", _link(name))
        _ip("link", "set", _link(name), "up")
        for command in (
            ("address", "add", f"{_THERE}/30", "dev", "uplink"),
            ("link", "set", "uplink", "up"),
            ("link", "set", "lo", "up"),
        ):
            _ip("-netns", name, *command)
        yield Network(name)
    finally:
        _ip("netns", "delete", name)


def _link(name: str) -> str:
    return f"to-{name}"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
