"""A device that nobody can reach follows a tag in a real registry: rolled out, rolled back, offline."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bundles import MODEL, Release, request
from device import Device, MakeDevice, edgekit
from network import Network, private_network
from registry_kit import Registry, needs_registry

pytestmark = needs_registry

_CONFIG = """
[probation]
duration_s = 0.5
min_requests = 5
[follow.{model}]
reference = "{reference}"
interval_s = 2
plain_http = true
"""
_PATIENCE_S = 180.0  # the wait after failures doubles while the device is offline


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    """The device's only link."""
    with private_network("remote") as made:
        yield made


@pytest.fixture(scope="module")
def registry(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry on this machine, at its end of the link."""
    started = Registry(tmp_path_factory.mktemp("registry") / "files", address=network.here)
    yield started
    started.stop()


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """Signed bundles."""
    return Release(tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def device(
    make_device: MakeDevice, agent_package: Path, release: Release, registry: Registry, network: Network
) -> Device:
    """A device that follows ``models/scale:stable``, where there is nothing yet."""
    device = make_device("remote", namespace=network.namespace)
    device.boot()
    device.install_agent(agent_package)
    device.trust(release.public)
    device.configure(_CONFIG.format(model=MODEL, reference=reference(registry)))
    return device


def reference(registry: Registry) -> str:
    """The tag that is followed."""
    return f"oci://{registry.host}/models/{MODEL}:stable"


def push(registry: Registry, archive: Path) -> None:
    """Move the tag, as its owner does."""
    done = edgekit("push", archive, reference(registry), "--plain-http")
    assert done.returncode == 0, done.stderr


def wait_for_factor(device: Device, factor: float) -> float:
    """Wait until the device multiplies by ``factor``; return the seconds that it took."""
    began_s = time.monotonic()
    while device.wait_for_answer(MODEL, request(1.0), _PATIENCE_S)[0] != factor:
        assert time.monotonic() < began_s + _PATIENCE_S, device.status()
        time.sleep(0.2)
    return time.monotonic() - began_s


def wait_for_follower(device: Device, key: str, value: object) -> dict[str, Any]:
    """Wait until the follower's state is so; return it."""
    deadline_s = time.monotonic() + _PATIENCE_S
    while (follower := dict(device.status()["follow"]))[key] != value:
        assert time.monotonic() < deadline_s, follower
        time.sleep(0.2)
    return follower


def test_what_is_pushed_to_the_tag_is_rolled_out(
    device: Device, registry: Registry, release: Release
) -> None:
    """The first bundle and the next one come by themselves, and are committed."""
    for factor in (2.0, 3.0):
        pushed = release.good(factor)
        push(registry, pushed.archive)
        took_s = wait_for_factor(device, factor)
        device.wait_for_commit(pushed.digest)
        print(f"served {took_s:.1f} s after the push")
    assert wait_for_follower(device, "outcome", "installed")["bundle"] == pushed.digest


def test_a_bad_bundle_is_rolled_back_and_not_tried_again(
    device: Device, registry: Registry, release: Release
) -> None:
    """The old version serves, `status` has the reason, and the device waits for the tag to move."""
    push(registry, release.wrong(9.0).archive)
    follower = wait_for_follower(device, "outcome", "refused")
    assert "golden" in follower["why"]
    tried = device.status()["last_operation"]
    time.sleep(6.0)  # three looks
    assert device.status()["last_operation"] == tried
    assert device.infer(MODEL, request(1.0))[0] == 3.0
    push(registry, release.good(4.0).archive)
    wait_for_factor(device, 4.0)


def test_a_device_that_was_offline_catches_up(
    device: Device, registry: Registry, release: Release, network: Network
) -> None:
    """Without a network it serves on, after a reboot too; then it takes what was pushed meanwhile."""
    network.unplug()
    try:
        for factor in (5.0, 6.0):
            push(registry, release.good(factor).archive)
        deadline_s = time.monotonic() + _PATIENCE_S
        while device.status()["follow"]["failures"] < 2:
            assert time.monotonic() < deadline_s
            time.sleep(0.5)
        assert device.infer(MODEL, request(1.0))[0] == 4.0
        device.reboot()
        assert device.wait_for_answer(MODEL, request(1.0))[0] == 4.0
    finally:
        network.plug()
    print(f"caught up {wait_for_factor(device, 6.0):.1f} s after the link was back")
