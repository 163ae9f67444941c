"""A device that really boots: a Debian root file system under systemd-nspawn, administered over SSH.

It shares the network of this machine, so that everything listens on loopback under ports of its own, or has
a network to itself (``network.py``). The power can be cut, which ends every process of the device at once;
what a real disk would lose then is the subject of the crash harness (``tests/device_agent/test_crash.py``),
since here the kernel lives on.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from registry_kit import free_port

_BOOT_TIMEOUT_S = 120.0
_POLL_S = 0.1
_NO_ANSWER = 255  # ssh's own exit code
_POST = (
    "import sys, urllib.request as r; "
    "sys.stdout.buffer.write(r.urlopen(sys.argv[1], sys.stdin.buffer.read(), timeout=60).read())"
)


class Device:
    """A root file system that can be switched on.

    Args:
        root: its root file system, which belongs to this device alone.
        key: private key of its administrator, who logs in as root.
        workdir: where the files of its SSH client go.
        namespace: the network namespace that it has to itself; empty: it shares this machine's.
    """

    def __init__(self, root: Path, key: Path, workdir: Path, namespace: str = "") -> None:
        self.root = root
        self.name = root.name
        self.ssh_port = free_port()
        self.http_port = free_port()
        self.grpc_port = free_port()
        self.ssh_config = workdir / f"{self.name}.ssh-config"
        self._log = workdir / f"{self.name}.console"
        self._container: subprocess.Popen[bytes] | None = None
        self._network = [f"--network-namespace-path=/run/netns/{namespace}"] if namespace else []
        #: What runs a command of this machine's in the device's network.
        self._nearby = ["ip", "netns", "exec", namespace] if namespace else []
        self._admit(key, workdir / f"{self.name}.known-hosts")

    def boot(self) -> None:
        """Switch it on and wait until systemd has come up."""
        with self._log.open("ab") as console:
            self._container = subprocess.Popen(
                [
                    *(
                        "systemd-nspawn",
                        "--quiet",
                        "--boot",
                        "--register=no",
                        "--keep-unit",
                        "--console=pipe",
                    ),
                    *("--machine", self.name, "--directory", str(self.root), *self._network),
                ],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
            )
        deadline_s = time.monotonic() + _BOOT_TIMEOUT_S
        while time.monotonic() < deadline_s:
            if self.run("systemctl is-system-running --wait", check=False).returncode != _NO_ANSWER:
                return
            time.sleep(_POLL_S)
        raise AssertionError(f"{self.name} did not boot; its console said:\n{self._log.read_text()[-3000:]}")

    def reboot(self) -> None:
        """Reboot it as an administrator would, and wait until it is back."""
        self.run("systemctl reboot", check=False)
        assert self._container is not None
        self._container.wait(timeout=_BOOT_TIMEOUT_S)
        self.boot()

    def cut_power(self) -> None:
        """End all of its processes at once."""
        if self._container is None:
            return
        for child in _children(self._container.pid):
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        self._container.wait(timeout=30)
        self._container = None

    def run(
        self, command: str, check: bool = True, timeout_s: float = 300.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell command on it, as root.

        Raises:
            CalledProcessError: it failed and ``check`` is set; 255 where the device does not answer.
        """
        done = subprocess.run(
            [*self._nearby, "ssh", "-F", str(self.ssh_config), self.name, command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        if check and done.returncode != 0:
            raise DeviceCommandError(done.returncode, command, done.stdout, done.stderr)
        return done

    def argv(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command given as words; it has to succeed."""
        return self.run(shlex.join(arguments))

    def install_agent(self, package: Path) -> None:
        """Install the agent's Debian package, with the listeners on ports of this device's own."""
        self.set_ports()
        self.put(package, "/root/agent.deb")
        self.run("dpkg --install /root/agent.deb")

    def set_ports(self) -> None:
        """Move the listeners to ports of this device's own, as an administrator does: with a drop-in."""
        for unit, port in {
            "edgekit-agent": self.http_port,
            "edgekit-agent-grpc": self.grpc_port,
            "edgekit-agent-metrics": free_port(),
        }.items():
            drop_in = self.path(f"/etc/systemd/system/{unit}.socket.d/port.conf")
            drop_in.parent.mkdir(parents=True, exist_ok=True)
            unix = "ListenStream=/run/edgekit-agent/http.sock\n" if unit == "edgekit-agent" else ""
            drop_in.write_text(f"[Socket]\nListenStream=\nListenStream=127.0.0.1:{port}\n{unix}")

    def trust(self, public_key: Path) -> None:
        """Let the device trust a key."""
        self.put(public_key, f"/etc/edgekit/keys/{public_key.name}")

    def configure(self, text: str) -> None:
        """Replace the agent's configuration and start it again."""
        self.path("/etc/edgekit/agent.toml").write_text("control_socket_mode = 0o660\n" + text)
        self.run("systemctl restart edgekit-agent")

    def agent_pid(self) -> int:
        """The agent's main process, as the device numbers it."""
        return int(self.run("systemctl show --property=MainPID --value edgekit-agent").stdout)

    def status(self) -> dict[str, Any]:
        """What `edgekit-agent status` says of the one model."""
        document = json.loads(self.run("edgekit-agent status --json").stdout)
        model: dict[str, Any] = (document["models"] if isinstance(document, dict) else document)[0]
        return model

    def wait_for_commit(self, digest: str, timeout_s: float = 120.0) -> None:
        """Wait until a version has proven itself."""
        deadline_s = time.monotonic() + timeout_s
        while digest not in self.status()["committed"]:
            assert time.monotonic() < deadline_s, f"{digest} was not committed: {self.status()}"
            time.sleep(5 * _POLL_S)

    def infer(self, model: str, body: dict[str, Any]) -> list[float]:
        """The first output of an inference; raises OSError where the device does not answer right."""
        url = f"http://127.0.0.1:{self.http_port}/v2/models/{model}/infer"
        data = json.dumps(body).encode()
        if self._nearby:
            answer = self._post_nearby(url, data)
        else:
            with urllib.request.urlopen(url, data, timeout=60) as response:
                answer = response.read()
        values: list[float] = json.loads(answer)["outputs"][0]["data"]
        return values

    def wait_for_answer(self, model: str, body: dict[str, Any], timeout_s: float = 60.0) -> list[float]:
        """The first output of an inference, as soon as the model is served."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                return self.infer(model, body)
            except OSError:
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(_POLL_S)

    def path(self, path: str) -> Path:
        """Where a file of the device lies on this machine."""
        return self.root / path.lstrip("/")

    def put(self, source: Path, path: str) -> None:
        """Copy a file or a directory onto it, as from a USB stick."""
        target = self.path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            shutil.copy(source, target)

    def _post_nearby(self, url: str, data: bytes) -> bytes:
        """As urlopen, by a process in the device's network."""
        argv = [*self._nearby, sys.executable, "-c", _POST, url]
        done = subprocess.run(argv, input=data, capture_output=True, timeout=90)
        if done.returncode != 0:
            raise OSError(done.stderr.decode().strip().rpartition("\n")[2])
        return done.stdout

    def _admit(self, key: Path, known_hosts: Path) -> None:
        """Let the administrator's key in, and make the host key known."""
        home = self.path("/root/.ssh")
        home.mkdir(mode=0o700, exist_ok=True)
        shutil.copy(key.with_suffix(".pub"), home / "authorized_keys")
        self.path("/etc/ssh/sshd_config.d/port.conf").write_text(
            f"Port {self.ssh_port}\nListenAddress 127.0.0.1\n"
        )
        host_key = self.path("/etc/ssh/ssh_host_ed25519_key.pub").read_text().split()
        known_hosts.write_text(f"[127.0.0.1]:{self.ssh_port} {host_key[0]} {host_key[1]}\n")
        self.ssh_config.write_text(
            f"Host {self.name}\n"
            f"  HostName 127.0.0.1\n  Port {self.ssh_port}\n  User root\n  IdentityFile {key}\n"
            f"  IdentitiesOnly yes\n  UserKnownHostsFile {known_hosts}\n  StrictHostKeyChecking yes\n"
            "  BatchMode yes\n  ConnectTimeout 5\n  LogLevel ERROR\n"
        )


MakeDevice = Callable[..., Device]


class DeviceCommandError(subprocess.CalledProcessError):
    """A command failed on a device; its text says what it printed."""

    def __str__(self) -> str:
        return f"{self.cmd!r} ended with {self.returncode}\n{self.stdout}\n{self.stderr}"


def edgekit(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the host's command as its user would."""
    argv = [str(Path(sys.executable).parent / "edgekit"), *map(str, arguments)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)


def copy_root(base: Path, target: Path) -> None:
    """Copy a root file system with owners, devices and links as they are."""
    subprocess.run(["cp", "--archive", "--reflink=auto", str(base), str(target)], check=True)


def run_in(root: Path, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a command inside a root file system that is not booted."""
    argv = ["systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--pipe", "--directory", str(root)]
    return subprocess.run([*argv, *command], check=True, capture_output=True, text=True, timeout=600)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
