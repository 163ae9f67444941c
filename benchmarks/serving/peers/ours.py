"""The agent, in an environment with its own dependencies and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from serving import wire
from serving.bundles import write_bundle
from serving.models import Array, Model
from serving.peers.base import Peer
from serving.server import Launch, free_port
from serving.venvs import HOME, ROOT, Environment, agent_requirements

ENVIRONMENT = Environment("agent", agent_requirements())
WITH_UVLOOP = Environment("agent-uvloop", (*agent_requirements(), "uvloop==0.23.0"))

_MAIN = "import sys; from device_agent.cli import main; sys.exit(main())"


@dataclass(frozen=True)
class Site:
    """An agent's files.

    Attributes:
        config: its configuration.
        control: its control socket.
        port: where it will answer HTTP.
    """

    config: Path
    control: Path
    port: int


def make_site(work: Path, settings: str = "") -> Site:
    """Write a configuration: the defaults, but unsigned bundles, one thread, free ports and ``settings``."""
    site = Site(work / "agent.toml", work / "control.sock", free_port())
    (work / "keys").mkdir(exist_ok=True)
    site.config.write_text(
        f"state_dir = {json.dumps(str(work / 'state'))}\n"
        f"keys_dir = {json.dumps(str(work / 'keys'))}\n"
        f"control_socket = {json.dumps(str(site.control))}\n"
        "allow_unsigned = true\nthreads = 1\n"
        f"[http]\nport = {site.port}\n[metrics]\nport = 0\n{settings}"
    )
    return site


def agent_command(environment: Environment, site: Site, *arguments: str) -> list[str | Path]:
    """The command line of ``edgekit-agent`` with these arguments."""
    return [environment.python, "-c", _MAIN, *arguments, "--config", site.config]


def agent_variables() -> dict[str, str]:
    """Environment variables under which the environment finds this checkout's agent.

    With its bytecode kept, as that of every installed package is: the peers' and, on a device, ours.
    """
    kept = {"PYTHONPYCACHEPREFIX": str(HOME / "bytecode"), "PYTHONDONTWRITEBYTECODE": ""}
    return {"PYTHONPATH": str(ROOT), **kept}


def install(environment: Environment, site: Site, bundle: Path) -> str:
    """Install a bundle through the command line; return its digest."""
    done = subprocess.run(
        [str(part) for part in agent_command(environment, site, "install", str(bundle), "--json")],
        check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env={**os.environ, **agent_variables()},
    )  # fmt: skip
    return str(json.loads(done.stdout)["digest"])


def launch_of(environment: Environment, site: Site) -> Launch:
    """Start the agent that serves what was installed."""
    return Launch(agent_command(environment, site, "serve"), site.port, agent_variables())


def _peer(name: str, environment: Environment, settings: str = "") -> Peer:
    def launch(work: Path, models: Sequence[Model]) -> Launch:
        site = make_site(work, settings)
        for model in models:
            install(environment, site, write_bundle(work, model).directory)
        return launch_of(environment, site)

    return Peer(name, environment, "onnxruntime", launch, _request, _decode, speaks_oip=True)


def _request(model: Model) -> bytes:
    return wire.oip_infer(model.name, model.row)


def _decode(answer: wire.Answer, model: Model) -> Array:
    return wire.oip_decode(answer)


SLO_MS = 50.0
_OBJECTIVE = f"[models.cnn]\nslo_ms = {SLO_MS}\n"
_LEVELS = "[models.cnn.batching]\npriority_levels = 3\ndefault_priority_level = 2\n"

OURS = _peer("ours", ENVIRONMENT)
OURS_SLO = _peer("ours-slo", ENVIRONMENT, _OBJECTIVE)
OURS_LEVELS = _peer("ours-levels", ENVIRONMENT, _OBJECTIVE + _LEVELS)
OURS_UVLOOP = _peer("ours-uvloop", WITH_UVLOOP)
