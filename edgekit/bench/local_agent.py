"""An agent on this machine for the length of a ``with`` block, started as a user would start it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgekit.errors import Missing

_READY = re.compile(r"listening http=([\d.]+):(\d+)")
_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class LocalAgent:
    """Where the agent listens."""

    host: str
    port: int
    control: str


@contextmanager
def running(home: Path, keys_dir: Path) -> Iterator[LocalAgent]:
    """Start ``edgekit-agent serve`` with its state below ``home``; stop it with SIGTERM.

    If this process is killed, the agent ends too.

    Args:
        home: short enough for a Unix socket's path (about 100 characters).
        keys_dir: the public keys that it trusts.

    Raises:
        Missing: it did not start; the message holds its last words.
    """
    socket = home / "control.sock"
    config = home / "agent.toml"
    config.write_text(
        f"state_dir = {json.dumps(str(home / 'state'))}\n"
        f"keys_dir = {json.dumps(str(keys_dir))}\n"
        f"control_socket = {json.dumps(str(socket))}\n"
        "[http]\nport = 0\n[metrics]\nport = 0\n"
        "[probation]\nduration_s = 0.5\n"  # nobody asks while it lasts, so golden rows decide at once
    )
    command = [sys.executable, "-m", "edgekit.bench.tied", str(os.getpid()), "serve", "--config", str(config)]
    log = home / "agent.log"
    with log.open("w") as sink, subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT) as process:
        try:
            host, port = _wait_until_ready(process, log)
            yield LocalAgent(host, port, f"unix://{socket}")
        finally:
            process.terminate()
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> tuple[str, int]:
    pause = threading.Event()
    for _ in range(int(_START_TIMEOUT_S / 0.05)):
        found = _READY.search(log.read_text(errors="replace"))
        if found:
            return found[1], int(found[2])
        if process.poll() is not None:
            break
        pause.wait(0.05)
    words = log.read_text(errors="replace").strip().splitlines()
    raise Missing(
        "the local agent did not start",
        words[-1] if words else "it said nothing",
        f"run it by hand: edgekit-agent serve --config {log.with_name('agent.toml')}",
    )
