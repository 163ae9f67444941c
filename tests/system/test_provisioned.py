"""A root file system that was provisioned offline comes up serving, on this architecture and on another."""

from __future__ import annotations

from pathlib import Path

import pytest
from bundles import MODEL, Release, request
from conftest import make_package
from device import MakeDevice

from edgekit.deploy.provision import provision

PROCESSORS = {"amd64": "x86_64", "arm64": "aarch64"}


@pytest.mark.parametrize("architecture", PROCESSORS)
def test_a_provisioned_device_comes_up_serving(
    make_device: MakeDevice, tmp_path: Path, architecture: str
) -> None:
    """The device answers after its very first boot, has committed the bundle, and needs no other step.

    An aarch64 root is provisioned from outside, and then runs under emulation.
    """
    device = make_device(f"flashed-{architecture}", architecture)
    release = Release(tmp_path, PROCESSORS[architecture])
    bundle = release.good(2.0)
    package = make_package(architecture)
    provision(device.root, bundle.archive, [release.public], package, None, lambda step: None)
    device.set_ports()
    device.boot()
    assert device.wait_for_answer(MODEL, request(3.0), timeout_s=200)[0] == 6.0
    assert (
        device.run("dpkg-query --show --showformat='${Status}' edgekit-agent").stdout
        == "install ok installed"
    )
    device.wait_for_commit(bundle.digest)
    assert not list(device.path("/var/lib/edgekit-agent/provisioned").iterdir())
    assert device.run("uname -m").stdout.strip() == PROCESSORS[architecture]
