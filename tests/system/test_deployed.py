"""`edgekit deploy` from this machine to devices, over real SSH."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bundles import MODEL, Release, request
from device import Device, MakeDevice, edgekit

QUICK = "[probation]\nduration_s = 0.5\nmin_requests = 5\n"


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """Signed bundles."""
    return Release(tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def fleet(make_device: MakeDevice, agent_package: Path, release: Release) -> list[Device]:
    """Three devices with the agent and nothing to serve."""
    devices = [make_device(f"gate-{number}") for number in range(3)]
    for device in devices:
        device.boot()
        device.install_agent(agent_package)
        device.trust(release.public)
        device.configure(QUICK)
    return devices


@pytest.fixture(scope="module")
def ssh_config(fleet: list[Device], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One SSH configuration for all of them."""
    path = tmp_path_factory.mktemp("ssh") / "config"
    path.write_text("\n".join(device.ssh_config.read_text() for device in fleet))
    return path


def test_a_bundle_is_deployed_to_one_device(fleet: list[Device], ssh_config: Path, release: Release) -> None:
    """Success means that the device committed, and it answers with the new model."""
    done = edgekit("deploy", release.good(2.0).archive, "--to", "ssh://gate-0", "--ssh-config", ssh_config)
    assert done.returncode == 0, done.stderr
    assert fleet[0].infer(MODEL, request(1.0))[0] == 2.0


def test_a_rollback_on_the_device_is_exit_5(fleet: list[Device], ssh_config: Path, release: Release) -> None:
    """A bundle that fails its self-test there ends with 5 and the device's reason, and the old one serves."""
    done = edgekit("deploy", release.wrong(5.0).archive, "--to", "ssh://gate-0", "--ssh-config", ssh_config)
    assert done.returncode == 5
    assert len(done.stderr.strip().splitlines()[-3:]) == 3
    assert fleet[0].infer(MODEL, request(1.0))[0] == 2.0


def test_a_fleet_is_updated_in_waves(
    fleet: list[Device], ssh_config: Path, release: Release, tmp_path: Path
) -> None:
    """One device, then the rest: all have the version, and `fleet status` says so."""
    inventory = tmp_path / "fleet.ini"
    inventory.write_text("[gates]\n" + "".join(f"{device.name}\n" for device in fleet))
    good = release.good(3.0)
    record = tmp_path / "record.json"
    done = edgekit(
        *("deploy", good.archive, "--inventory", inventory, "--waves", "1,100%", "--record", record),
        "--ssh-config",
        ssh_config,
    )
    assert done.returncode == 0, done.stderr
    assert [device.infer(MODEL, request(1.0))[0] for device in fleet] == [3.0] * 3
    status = edgekit("fleet", "status", "--inventory", inventory, "--json", "--ssh-config", ssh_config)
    assert status.returncode == 0, status.stderr
    assert json.dumps(json.loads(status.stdout)).count(good.digest) >= 3


def test_a_bad_wave_stops_the_rollout(
    fleet: list[Device], ssh_config: Path, release: Release, tmp_path: Path
) -> None:
    """When the first device rolls back, no other one is touched, and the exit code is 5."""
    inventory = tmp_path / "fleet.ini"
    inventory.write_text("".join(f"{device.name}\n" for device in fleet))
    done = edgekit(
        *("deploy", release.wrong(9.0).archive, "--inventory", inventory, "--waves", "1,100%"),
        *("--record", tmp_path / "record.json"),
        "--ssh-config",
        ssh_config,
    )
    assert done.returncode == 5
    assert [device.infer(MODEL, request(1.0))[0] for device in fleet] == [3.0] * 3
    touched = [device.status()["last_operation"]["failure"] is not None for device in fleet]
    assert sorted(touched) == [False, False, True]
