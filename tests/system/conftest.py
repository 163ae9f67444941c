"""Devices for the system tests; ``device.py`` boots them, ``roots.py`` makes what they are copied from."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
# What other rooms' tests have already; last, since each room has a conftest.py.
sys.path.extend(str(Path(__file__).parents[1] / room) for room in ("device_agent", "edgekit"))

import roots
from device import Device, MakeDevice, copy_root

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def administrator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The SSH key of the devices' administrator."""
    key = tmp_path_factory.mktemp("administrator") / "id_ed25519"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    return key


@pytest.fixture(scope="session")
def agent_package() -> Path:
    """The agent's Debian package for the devices of this machine's architecture."""
    return make_package("amd64")


def make_package(architecture: str) -> Path:
    """Make the agent's Debian package for the devices of an architecture, as `make deb` does."""
    _, python = roots.SUITES[architecture]
    argv = ["make", "--no-print-directory", "deb", f"DEB_ARCH={architecture}", f"DEB_PYTHON={python}"]
    done = subprocess.run(argv, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    return REPOSITORY / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def make_device(tmp_path_factory: pytest.TempPathFactory, administrator: Path) -> Iterator[MakeDevice]:
    """Makes devices that are switched off and deleted at the end of the module."""
    made: list[Device] = []

    def make(name: str, architecture: str = "amd64", namespace: str = "") -> Device:
        workdir = tmp_path_factory.mktemp(name)
        root = workdir / name
        copy_root(roots.base(architecture), root)
        device = Device(root, administrator, workdir, namespace)
        made.append(device)
        return device

    yield make
    for device in made:
        device.cut_power()
        shutil.rmtree(device.root)
