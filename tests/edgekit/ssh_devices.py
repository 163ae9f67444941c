"""Devices that are reached over a real sshd, each on a loopback port of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
WHY_SKIPPED = "there is no sshd (Debian: apt-get install openssh-server)"


@dataclass
class SshDevices:
    """Devices, with an ssh configuration in which each has a ``Host``."""

    root: Path
    port_of: dict[str, int] = field(default_factory=dict)
    _processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _agents: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("host_key", "user_key"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.root / name))
        self.config = self.root / "ssh_config"
        self.config.write_text("")
        (self.root / "known_hosts").write_text("")

    def add(self, name: str, *, agent: bool = True, command: str | None = None) -> Path:
        """Start a device that trusts ``release.pub``; gives its directory."""
        home = self.root / name
        home.mkdir()
        (home / "agent.toml").write_text(
            f'state_dir = "{home / "state"}"\nkeys_dir = "{self.root / "keys"}"\n'
            f'control_socket = "{home / "control.sock"}"\nthreads = 1\n'
            "[probation]\nduration_s = 0\n[http]\nport = 0\n[metrics]\nport = 0\n"
        )
        agent_command = f"{sys.executable} -m device_agent.cli"
        config = f"--config {home / 'agent.toml'}"
        self._start_sshd(name, home, command or f"{agent_command} connect {config}")
        if agent:
            self.start_agent(name)
        return home

    def start_agent(self, name: str) -> None:
        """Start a device's agent."""
        home = self.root / name
        command = [sys.executable, "-m", "device_agent.cli", "serve", "--config", str(home / "agent.toml")]
        with (home / "agent.log").open("wb") as log:
            self._agents[name] = subprocess.Popen(command, stderr=log, env=_environment())
        _until(lambda: "listening http=" in (home / "agent.log").read_text(), home / "agent.log")

    def stop_agent(self, name: str) -> None:
        """Stop a device's agent."""
        process = self._agents.pop(name)
        process.send_signal(signal.SIGTERM)
        process.wait(30)

    def close(self) -> None:
        """End everything."""
        for process in [*self._agents.values(), *self._processes]:
            process.terminate()
            process.wait(30)

    def _start_sshd(self, name: str, home: Path, command: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.port_of[name] = port
        environment = "env " + " ".join(f"{k}={v}" for k, v in _ADDED.items())
        (home / "sshd_config").write_text(
            f"Port {port}\nListenAddress 127.0.0.1\nHostKey {self.root / 'host_key'}\n"
            f"AuthorizedKeysFile {self.root / 'user_key.pub'}\nStrictModes no\nUsePAM no\n"
            f"PasswordAuthentication no\nPidFile none\nForceCommand {environment} {command}\n"
        )
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        log = home / "sshd.log"
        assert SSHD is not None
        self._processes.append(
            subprocess.Popen([SSHD, "-D", "-E", str(log), "-f", str(home / "sshd_config")])
        )
        _until(lambda: log.exists() and "listening" in log.read_text(), log)
        key = (self.root / "host_key.pub").read_text()
        with (self.root / "known_hosts").open("a") as stream:
            stream.write(f"[127.0.0.1]:{port} {key}")
        with self.config.open("a") as stream:
            stream.write(
                f"Host {name}\n  HostName 127.0.0.1\n  Port {port}\n  IdentitiesOnly yes\n"
                f"  IdentityFile {self.root / 'user_key'}\n"
                f"  UserKnownHostsFile {self.root / 'known_hosts'}\n  StrictHostKeyChecking yes\n"
            )


_ADDED = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def _environment() -> dict[str, str]:
    return {**os.environ, **_ADDED}


def _run(*argv: str) -> None:
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)


def _until(holds: object, log: Path) -> None:
    deadline_s = time.monotonic() + 30
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < deadline_s, log.read_text() if log.exists() else "no log"
        time.sleep(0.02)
