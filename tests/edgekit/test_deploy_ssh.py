"""Deployment over a real sshd to real agents."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundle_kit import graph, pack
from onnx import helper, numpy_helper
from ssh_devices import ROOT, SSHD, WHY_SKIPPED, SshDevices

from edgekit import sign
from edgekit.deploy import connection, fleet, inventory, payload, record, remote, rollout
from edgekit.deploy.ssh import SshAddress, SshOptions
from edgekit.errors import DeviceRefused, Missing

pytestmark = pytest.mark.skipif(SSHD is None, reason=WHY_SKIPPED)


def make_bundle(home: Path, version: int, *, wrong: bool = False, rows: int = 100) -> Path:
    """A signed bundle of a body that every version shares, and a head of its own."""
    body = np.random.default_rng(0).standard_normal((3, rows * 1000)).astype(np.float32)
    head = np.random.default_rng(version).standard_normal((rows * 1000, 2)).astype(np.float32)[:, :1]
    head[100:] = 0
    model = graph(
        "net",
        (3, 1),
        [helper.make_node("MatMul", ["x", "body"], ["h"]), helper.make_node("MatMul", ["h", "head"], ["y"])],
        [numpy_helper.from_array(body, "body"), numpy_helper.from_array(head, "head")],
    )
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    golden = (x, x @ body @ head + wrong * 1000)
    packed = pack(home, str(version), model, golden, version=version, tolerance=5e-2)
    sign.sign(packed.archive, home / "release.key")
    return packed.archive


@pytest.fixture
def devices(tmp_path: Path) -> Iterator[SshDevices]:
    """No device yet; those that are added trust ``release.key``."""
    _, public = sign.keygen(tmp_path / "release")
    (tmp_path / "keys").mkdir()
    shutil.copy(public, tmp_path / "keys")
    started = SshDevices(tmp_path)
    yield started
    started.close()


def deploy(devices: SshDevices, archive: Path, name: str, said: list[str]) -> Any:
    """Deploy to one device by its name in the ssh configuration."""
    with payload.prepared(archive) as prepared:
        return remote.deploy(prepared, SshAddress(name), SshOptions(devices.config), said.append)


def command(devices: SshDevices, *argv: object) -> list[str]:
    """An ``edgekit`` command that uses the devices' ssh configuration."""
    more = ["--ssh-config", str(devices.config)]
    return [sys.executable, "-m", "edgekit.cli", *map(str, argv), *more]


def edgekit(devices: SshDevices, *argv: object) -> subprocess.CompletedProcess[str]:
    """Run the command."""
    return subprocess.run(
        command(devices, *argv),
        cwd=devices.root,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )


def sent_bytes(said: list[str]) -> float:
    """How much a deployment said that it sends."""
    (line,) = (text for text in said if text.startswith("sending "))
    number, unit = line.split()[1:3]
    return float(number) * {"MB": 1e6, "kB": 1e3}[unit]


def test_a_bundle_is_deployed_over_ssh(devices: SshDevices) -> None:
    """States come as on the device; the next version sends its head alone; the same again sends nothing."""
    devices.add("gate")
    first, second = make_bundle(devices.root, 1), make_bundle(devices.root, 2)
    said: list[str] = []
    deployed = deploy(devices, first, "gate", said)
    assert (deployed.state, deployed.signer, deployed.unchanged) == ("committed", "release", False)
    assert [s for s in said if s in ("verified", "selftested", "committed")] == [
        "verified",
        "selftested",
        "committed",
    ]
    said.clear()
    assert deploy(devices, second, "gate", said).previous == deployed.digest
    assert sent_bytes(said) <= 0.15 * (first.stat().st_size)
    assert deploy(devices, second, "gate", []).unchanged
    (status,) = fleet.status((inventory.Device("gate", SshAddress("gate")),), SshOptions(devices.config), 1)
    assert (status.healthy, status.models[0]["version"]) == (True, 2)


def test_a_device_without_a_running_agent_is_given_its_first_bundle(devices: SshDevices) -> None:
    """Where no agent runs, the bundle is installed all the same, and served once it starts."""
    devices.add("bare", agent=False)
    deployed = deploy(devices, make_bundle(devices.root, 1), "bare", [])
    gate = (inventory.Device("bare", SshAddress("bare")),)
    assert [s.healthy for s in fleet.status(gate, SshOptions(devices.config), 1)] == [False]
    devices.start_agent("bare")
    (status,) = fleet.status(gate, SshOptions(devices.config), 1)
    assert (status.healthy, status.models[0]["digest"]) == (True, deployed.digest)


def test_a_transfer_that_is_cut_goes_on(devices: SshDevices, monkeypatch: pytest.MonkeyPatch) -> None:
    """When ssh is killed in the middle, the link is made again; at most a hundredth is sent twice."""
    devices.add("gate")
    archive = make_bundle(devices.root, 1, rows=400)
    killed: list[int] = []
    counted: list[int] = []
    original = connection.Connection.stream

    def stream(self: Any, message: Any, parts: Any, size_bytes: int, report: Any) -> Any:
        def count() -> Iterator[bytes]:
            for part in parts:
                counted.append(len(part))
                yield part

        def watch(line: Any) -> None:
            report(line)
            if not killed and line["received_bytes"] > 2_000_000:
                process = remote_ssh(devices)
                killed.append(process)
                os.kill(process, signal.SIGKILL)

        return original(self, message, count(), size_bytes, watch)

    monkeypatch.setattr(connection.Connection, "stream", stream)
    said: list[str] = []
    assert deploy(devices, archive, "gate", said).state == "committed"
    assert len(killed) == 1
    assert sum("trying again" in text for text in said) == 1
    with payload.prepared(archive) as prepared:
        total = sum(entry.size_bytes for entry in prepared.manifest.files)
    assert sum(counted) <= 1.01 * total


def remote_ssh(devices: SshDevices) -> int:
    """The process of the ssh client that this process started."""
    children = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    pids = [int(pid) for path in children for pid in path.read_text().split()]
    return next(p for p in pids if Path(f"/proc/{p}/comm").read_text().strip() == "ssh")


def test_what_a_device_refuses_is_said_with_its_reason(devices: SshDevices) -> None:
    """A bundle that is wrong on the device is exit code 5, and the old version serves on."""
    devices.add("gate")
    good, wrong = make_bundle(devices.root, 1), make_bundle(devices.root, 2, wrong=True)
    deployed = deploy(devices, good, "gate", [])
    with pytest.raises(DeviceRefused, match="golden") as caught:
        deploy(devices, wrong, "gate", [])
    assert caught.value.exit_code == 5
    (status,) = fleet.status((inventory.Device("gate", SshAddress("gate")),), SshOptions(devices.config), 1)
    assert (status.healthy, status.models[0]["digest"]) == (True, deployed.digest)
    assert "failed its self-test" in status.models[0]["failure"]["what"]


def test_what_is_missing_is_named(devices: SshDevices, monkeypatch: pytest.MonkeyPatch) -> None:
    """No such host, no agent there, and no ssh here are exit code 4, each with its own advice."""
    archive = make_bundle(devices.root, 1)
    devices.add("naked", agent=False, command="edgekit-agent-that-is-not-there")
    devices.add("chatty", agent=False, command="echo hello")
    with devices.config.open("a") as stream:
        stream.write("Host closed\n  HostName 127.0.0.1\n  Port 1\n")
    for name, reason in {
        "closed": "cannot be reached",
        "naked": "there is no edgekit-agent",
        "chatty": "no agent answers",
    }.items():
        with pytest.raises(Missing, match=reason):
            deploy(devices, archive, name, [])
    monkeypatch.setenv("PATH", str(devices.root))
    with pytest.raises(Missing, match="no ssh on this machine"):
        deploy(devices, archive, "closed", [])


def run_rollout(devices: SshDevices, archive: Path, names: str, **changes: Any) -> tuple[Any, list[str]]:
    """Roll out to the devices whose names are letters of ``names``."""
    said: list[str] = []
    chosen = tuple(inventory.Device(name, SshAddress(name)) for name in names)
    with (
        payload.prepared(archive) as prepared,
        record.opened(devices.root / "record.json", prepared.digest) as opened,
    ):
        plan = rollout.Plan(chosen, **changes)
        return rollout.run(prepared, plan, opened, SshOptions(devices.config), said.append), said


def test_a_rollout_stops_at_a_wave_that_fails_and_goes_on_later(devices: SshDevices) -> None:
    """No device of the second wave is touched until the first succeeded; what is done stays done."""
    for name in "bc":
        devices.add(name, agent=False)
    with devices.config.open("a") as stream:
        stream.write("Host a\n  HostName 127.0.0.1\n  Port 1\n")
    archive = make_bundle(devices.root, 1)
    result, _ = run_rollout(devices, archive, "bac", waves="2,100%")
    states = {name: outcome and outcome.state for name, outcome in result.devices.items()}
    assert (result.complete, states) == (False, {"b": "committed", "a": "unreachable", "c": None})
    result, said = run_rollout(devices, archive, "bac", waves="2,100%", max_failures=1)
    states = {name: outcome and outcome.state for name, outcome in result.devices.items()}
    assert (result.complete, states) == (False, {"b": "committed", "a": "unreachable", "c": "committed"})
    assert not any(text.startswith("b:") for text in said)
    assert (
        json.loads((devices.root / "record.json").read_text())["devices"]["ssh://c"]["state"] == "committed"
    )


def test_a_device_that_refused_has_another_turn_only_when_asked(devices: SshDevices) -> None:
    """A bundle that was rolled back is not tried again by itself."""
    home = devices.add("a", agent=False)
    archive = make_bundle(devices.root, 1)
    config = (home / "agent.toml").read_text()
    (home / "agent.toml").write_text(config.replace(str(devices.root / "keys"), str(devices.root / "none")))
    assert run_rollout(devices, archive, "a")[0].devices["a"].state == "failed"
    (home / "agent.toml").write_text(config)
    assert run_rollout(devices, archive, "a")[0].devices["a"].state == "failed"
    assert run_rollout(devices, archive, "a", retry_failed=True)[0].complete


def test_the_command_rolls_out_and_shows_the_fleet(devices: SshDevices) -> None:
    """``deploy --inventory`` and ``fleet status`` print one document and end with the promised codes."""
    devices.add("a", agent=False)
    archive = make_bundle(devices.root, 1)
    (devices.root / "inventory.toml").write_text('[devices.a]\n[devices.off]\ngroups = ["later"]\n')
    with devices.config.open("a") as stream:
        stream.write("Host off\n  HostName 127.0.0.1\n  Port 1\n")
    done = edgekit(devices, "deploy", archive, "--inventory", "inventory.toml", "--group", "a", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["devices"]["a"]["state"] == "committed"
    done = edgekit(devices, "deploy", archive, "--inventory", "inventory.toml")
    assert done.returncode == 5
    assert "off (unreachable" in done.stderr
    done = edgekit(devices, "fleet", "status", "--json")
    assert done.returncode == 5
    assert [d["reachable"] for d in json.loads(done.stdout)["devices"]] == [True, False]


def test_ctrl_c_leaves_the_record_right(devices: SshDevices, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted, devices that are being installed finish, no other begins, and the next run goes on."""
    for name in "ab":
        devices.add(name, agent=False)
    archive = make_bundle(devices.root, 1)
    original = remote._Delivery._transfer

    def interrupting(self: Any, link: Any) -> None:
        original(self, link)
        self._installing = True
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(remote._Delivery, "_transfer", interrupting)
    assert threading.current_thread() is threading.main_thread()
    result, _ = run_rollout(devices, archive, "ab", parallel=1)
    assert result.interrupted
    assert result.devices["a"].state == "committed"
    assert result.devices["b"] is None
    monkeypatch.setattr(remote._Delivery, "_transfer", original)
    assert run_rollout(devices, archive, "ab")[0].complete
