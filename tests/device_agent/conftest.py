"""Fixtures of the agent's tests; the helpers are in ``agent_testing``."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import Callable, Dict, Iterator, Sequence

import pytest

# The tests are not a package, so that the agent's own environment can run them without the repository.
sys.path.insert(0, str(Path(__file__).parent))

from activation_kit import pass_sockets
from agent_testing import AgentProcess, TestBundle, install, linear_bundle


@pytest.fixture
def start_agent(tmp_path: Path) -> Iterator[Callable[..., AgentProcess]]:
    """Start an agent that serves the given bundles; it is ended after the test."""
    agents: list[AgentProcess] = []

    def start(*bundles: TestBundle, settings: str = "", arguments: Sequence[str] = ()) -> AgentProcess:
        root = tmp_path / f"agent{len(agents)}"
        root.mkdir()
        agent = AgentProcess(root, settings, arguments)
        install(root / "state", bundles)
        agents.append(agent)
        return agent.start()

    yield start
    for agent in agents:
        agent.kill()


@pytest.fixture
def activated(tmp_path: Path) -> Iterator[Callable[..., AgentProcess]]:
    """Make an agent that has a model and is yet to be started with the given sockets."""
    agents: list[AgentProcess] = []

    def make(sockets: Dict[str, socket.socket], settings: str = "") -> AgentProcess:
        agent = AgentProcess(tmp_path, settings)
        agents.append(pass_sockets(agent, sockets) if sockets else agent)
        return agents[-1]

    install(tmp_path / "state", [linear_bundle(tmp_path / "b")])
    yield make
    for agent in agents:
        agent.kill()


@pytest.fixture
def in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory for devices whose disk is modelled or outlives the process: in memory, and never synced."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    memory = Path("/dev/shm")  # not everywhere
    with tempfile.TemporaryDirectory(
        dir=str(memory if os.access(str(memory), os.W_OK) else tmp_path)
    ) as path:
        yield Path(path)
