"""Bundles that were on the disk before the agent ever ran."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from agent_testing import TestBundle, linear_bundle, make_lifecycle
from device_agent import archive, provisioned
from device_agent.store import Store


def leave(state_dir: Path, bundle: TestBundle) -> Path:
    """Put a bundle where ``edgekit provision`` leaves it."""
    waiting = state_dir / provisioned.DIRECTORY / f"{bundle.manifest.name}{archive.SUFFIX}"
    waiting.parent.mkdir(parents=True, exist_ok=True)
    archive.pack(bundle.directory, waiting)
    return waiting


def test_a_bundle_that_waits_is_installed_once(tmp_path: Path) -> None:
    """At the first start it is installed and removed; one for a model that serves already is only removed."""
    state_dir = tmp_path / "state"
    first, second = linear_bundle(tmp_path / "a"), linear_bundle(tmp_path / "b", seed=1)
    with Store(state_dir) as store:
        lifecycle = make_lifecycle(store, state_dir)
        for bundle in (first, second):
            waiting = leave(state_dir, bundle)
            provisioned.install(state_dir, lifecycle)
            assert not waiting.exists()
        assert [version["digest"] for version in lifecycle.list()] == [first.digest]
        assert lifecycle.status()[0]["active"] == first.digest


def test_a_bundle_that_cannot_be_installed_waits_on_and_harms_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It stays for the next start with the reason in the log, and the one beside it is installed."""
    state_dir = tmp_path / "state"
    good = linear_bundle(tmp_path / "good")
    with Store(state_dir) as store:
        lifecycle = make_lifecycle(store, state_dir)
        leave(state_dir, good)
        broken = state_dir / provisioned.DIRECTORY / f"broken{archive.SUFFIX}"
        broken.write_bytes(b"no bundle")
        provisioned.install(state_dir, lifecycle)
        assert broken.exists()
        assert "broken.edgekit was not installed" in caplog.text
        assert lifecycle.status()[0]["active"] == good.digest


def test_a_device_on_which_nothing_waits_starts(tmp_path: Path) -> None:
    """Without the directory, or with an empty one, nothing happens."""
    with Store(tmp_path) as store:
        provisioned.install(tmp_path, make_lifecycle(store, tmp_path))
        shutil.rmtree(tmp_path / provisioned.DIRECTORY, ignore_errors=True)
        assert not make_lifecycle(store, tmp_path).list()
