"""Devices for the system tests; ``device.py`` boots them, ``roots.py`` makes what they are copied from."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "device_agent"))

import roots
from device import Device, copy_root

MakeDevice = Callable[..., Device]


@pytest.fixture(scope="session")
def administrator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The SSH key of the devices' administrator."""
    key = tmp_path_factory.mktemp("administrator") / "id_ed25519"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    return key


@pytest.fixture(scope="module")
def make_device(tmp_path_factory: pytest.TempPathFactory, administrator: Path) -> Iterator[MakeDevice]:
    """Makes devices that are switched off and deleted at the end of the module."""
    made: list[Device] = []

    def make(name: str, architecture: str = "amd64") -> Device:
        workdir = tmp_path_factory.mktemp(name)
        root = workdir / name
        copy_root(roots.base(architecture), root)
        device = Device(root, administrator, workdir)
        made.append(device)
        return device

    yield make
    for device in made:
        device.cut_power()
        shutil.rmtree(device.root)
