"""A real agent that serves a model repository, for the host's tests."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def agent_on(repository: Path, root: Path, *arguments: str) -> Iterator[str]:
    """Run the agent with its state and its log under ``root``; gives its HTTP address.

    Raises:
        AssertionError: it does not come up, ends by itself, or logs a traceback.
    """
    settings = root / "agent.toml"
    settings.write_text(
        f'state_dir = "{root / "state"}"\nkeys_dir = "{root / "keys"}"\n'
        f'control_socket = "{root / "c.sock"}"\nthreads = 1\n'
        "[http]\nport = 0\n[grpc]\nenabled = false\n[metrics]\nport = 0\n"
    )
    log = root / "agent.log"
    command = [sys.executable, "-m", "device_agent.cli", "serve", "--config", str(settings)]
    command += ["--model-repository", str(repository), *arguments]
    with log.open("wb") as stream:
        agent = subprocess.Popen(command, stderr=stream)
    try:
        deadline_s = time.monotonic() + 30
        while not (match := re.search(r"listening http=(\S+)", log.read_text())):
            assert agent.poll() is None, log.read_text()
            assert time.monotonic() < deadline_s, log.read_text()
            time.sleep(0.02)
        yield match.group(1)
        assert agent.poll() is None, log.read_text()
        assert "Traceback" not in log.read_text()
    finally:
        agent.terminate()
        agent.wait(timeout=30)
