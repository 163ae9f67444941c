"""What tests of socket activation share: the service manager's part in it."""

from __future__ import annotations

import socket
import sys
from typing import Any, Dict

from agent_testing import AgentProcess

# Does what systemd does: the sockets from descriptor 3 on, and the variables; then becomes the service.
_LAUNCHER = """
import os, sys
numbers = [int(number) for number in sys.argv[1].split(",")]
for place, number in enumerate(numbers):
    os.dup2(number, 100 + place)
for place in range(len(numbers)):
    os.dup2(100 + place, 3 + place)
    os.close(100 + place)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(numbers)), LISTEN_FDNAMES=sys.argv[2])
os.execv(sys.argv[3], sys.argv[3:])
"""


def pass_sockets(agent: AgentProcess, sockets: Dict[str, socket.socket]) -> AgentProcess:
    """Let an agent be started with these sockets, by name; a name may end in ``+`` to be another's double."""
    agent.passed = [listener.fileno() for listener in sockets.values()]
    numbers, names = ",".join(map(str, agent.passed)), ":".join(name.rstrip("+") for name in sockets)
    agent.launcher = [sys.executable, "-c", _LAUNCHER, numbers, names]
    return agent


def listen(address: Any = ("127.0.0.1", 0)) -> socket.socket:
    """A socket as systemd makes it; ``address`` is a path, or a host and a port."""
    unix = isinstance(address, str)
    listener = socket.socket(socket.AF_UNIX if unix else socket.AF_INET, socket.SOCK_STREAM)
    listener.bind(address)
    listener.listen(128)
    return listener
