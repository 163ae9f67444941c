"""Deployment to a real agent on this machine."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from bundle_kit import graph, pack
from onnx import TensorProto, helper

from edgekit import bundle, sign
from edgekit.deploy import local
from edgekit.errors import BadInput, DeviceRefused, Missing


def make_bundle(
    root: Path, factor: float, wrong: bool = False, version: int = 1, architecture: str = "x86_64"
) -> bundle.Bundle:
    """A bundle whose model multiplies by ``factor``; a wrong one has other golden outputs."""
    constant = helper.make_tensor("k", TensorProto.FLOAT, [1], [factor])
    model = graph("scale", (3, 3), [helper.make_node("Mul", ["x", "k"], ["y"])], [constant])
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    golden = (x, x * factor + wrong)
    return pack(root, f"{factor}-{wrong}", model, golden, version=version, architecture=architecture)


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[str]:
    """The address of a running agent that trusts ``release.pub``."""
    _, public = sign.keygen(tmp_path / "release")
    (tmp_path / "keys").mkdir()
    shutil.copy(public, tmp_path / "keys")
    control = tmp_path / "control.sock"
    (tmp_path / "agent.toml").write_text(
        f'state_dir = "{tmp_path / "state"}"\nkeys_dir = "{tmp_path / "keys"}"\n'
        f'control_socket = "{control}"\nthreads = 1\n'
        "[http]\nport = 0\n[metrics]\nport = 0\n[probation]\nduration_s = 0.1\n"
    )
    command = [sys.executable, "-m", "device_agent.cli", "serve", "--config", str(tmp_path / "agent.toml")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline_s = time.monotonic() + 30
        while not control.exists() and process.poll() is None and time.monotonic() < deadline_s:
            time.sleep(0.02)
        yield f"unix://{control}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def test_a_signed_bundle_is_deployed(tmp_path: Path, agent: str) -> None:
    """Both forms deploy; the device reports each state and which key it trusted."""
    first, second = make_bundle(tmp_path, 2.0), make_bundle(tmp_path, 3.0, version=2)
    sign.sign(first.directory, tmp_path / "release.key")
    sign.sign(second.archive, tmp_path / "release.key")
    states: list[str] = []
    deployed = local.deploy(first.directory, agent, states.append)
    assert (deployed.address, deployed.name, deployed.digest) == (agent, "scale", first.digest)
    assert (deployed.state, deployed.signer, deployed.previous) == ("committed", "release", None)
    assert states == [
        "received",
        "verified",
        "staged",
        "prepared",
        "selftested",
        "switched",
        "probation",
        "committed",
    ]
    assert local.deploy(second.archive, agent, states.append).previous == first.digest


def test_what_the_device_refuses_is_exit_code_5(tmp_path: Path, agent: str) -> None:
    """An unsigned bundle, and one that does not reproduce its golden outputs, are refused by the device."""
    wrong = make_bundle(tmp_path, 2.0, wrong=True)
    with pytest.raises(DeviceRefused, match="is not signed") as caught:
        local.deploy(wrong.archive, agent, lambda state: None)
    assert caught.value.exit_code == 5
    sign.sign(wrong.archive, tmp_path / "release.key")
    with pytest.raises(DeviceRefused, match="golden"):
        local.deploy(wrong.archive, agent, lambda state: None)


def test_a_damaged_bundle_does_not_travel(tmp_path: Path) -> None:
    """A bundle that is damaged here is bad input, whether or not an agent is there."""
    packed = make_bundle(tmp_path, 2.0)
    (packed.directory / "model.onnx").write_bytes(b"x")
    with pytest.raises(BadInput, match="was changed"):
        local.deploy(packed.directory, f"unix://{tmp_path}/none.sock", lambda state: None)


def test_no_agent_is_exit_code_4(tmp_path: Path) -> None:
    """Without an agent the error says how to start one."""
    packed = make_bundle(tmp_path, 2.0)
    with pytest.raises(Missing, match="edgekit-agent serve") as caught:
        local.deploy(packed.archive, f"unix://{tmp_path}/none.sock", lambda state: None)
    assert caught.value.exit_code == 4


def test_an_agent_that_dies_is_a_failed_deployment(tmp_path: Path) -> None:
    """If the agent goes away in the middle, the deployment has not succeeded."""
    packed = make_bundle(tmp_path, 2.0)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(tmp_path / "dying.sock"))
    listener.listen()

    def die() -> None:
        client, _ = listener.accept()
        with client:
            client.recv(65536)
            client.sendall(b'{"state": "verified"}\n')

    thread = threading.Thread(target=die)
    thread.start()
    states: list[str] = []
    with pytest.raises(DeviceRefused, match="went away"):
        local.deploy(packed.archive, f"unix://{tmp_path}/dying.sock", states.append)
    thread.join(10)
    listener.close()
    assert states == ["verified"]


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("http://host:8000", "is not an address"),
        ("unix://relative.sock", "is not an address"),
        ("unix:relative.sock", "is not an address"),
        ("", "is not an address"),
    ],
)
def test_other_addresses_are_bad_input(tmp_path: Path, address: str, reason: str) -> None:
    """An address that cannot be used says what can."""
    with pytest.raises(BadInput, match=reason):
        local.deploy(tmp_path, address, lambda state: None)
    assert local.socket_path("local") == local.DEFAULT_SOCKET


def test_deploying_changes_nothing_in_the_bundle(tmp_path: Path, agent: str) -> None:
    """The bundle on the host is the same before and after."""
    packed = make_bundle(tmp_path, 2.0)
    sign.sign(packed.archive, tmp_path / "release.key")
    before = hashlib.sha256(packed.archive.read_bytes()).hexdigest()
    local.deploy(packed.archive, agent, lambda state: None)
    assert hashlib.sha256(packed.archive.read_bytes()).hexdigest() == before
