"""The ratchet: a device does not go back behind what it committed, unless a person at it says so."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crash_disk import on_primitive
from device_agent import ratchet
from device_agent.errors import DowngradeError, Refused
from device_agent.lifecycle import Lifecycle
from device_agent.ratchet import Committed
from device_agent.signature import Trust
from device_agent.store import Store
from storage_kit import FakeModels, make_bundle, make_key, signed_bundle


class Device:
    """A device that trusts the keys ``first`` and ``second``, with a double of the models."""

    def __init__(self, root: Path, allow_unsigned: bool = False) -> None:
        self.root = root
        self.keys = {name: make_key(root / "keys", name) for name in ("first", "second")}
        self.models = FakeModels()
        self._trust = Trust(root / "keys", allow_unsigned)
        self.start()

    def start(self) -> None:
        """Start the agent, with nothing in memory."""
        self.models = FakeModels(broken=self.models.broken)
        self.store = Store(self.root / "state")
        self.lifecycle = Lifecycle(self.store, self._trust, self.models)  # type: ignore[arg-type]  # the double
        self.lifecycle.restore()

    def restart(self) -> None:
        """Start it again."""
        self.store.close()
        self.start()

    def make(self, version: int, key: str = "first", note: str = "") -> Path:
        """Make a signed bundle of ``demo``; another note makes another digest."""
        path = self.root / f"{version}{key}{note}"
        signed_bundle(path, self.keys[key], version=version, provenance={"note": note})
        return path

    def install(self, version: int, key: str = "first", note: str = "", **options: Any) -> str:
        """Make a signed bundle and install it; return its digest."""
        return self.lifecycle.install(self.make(version, key, note), **options).digest

    @property
    def serving(self) -> Any:
        """Digest of what serves."""
        return self.models.serving["demo"].digest


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    """A device with nothing installed."""
    made = Device(tmp_path)
    yield made
    made.store.close()


def test_an_older_version_is_refused_before_a_byte_is_stored(device: Device) -> None:
    """What is older than what was committed is refused with an exit code of its own, and leaves no trace."""
    newest = device.install(5)
    before = _tree(device.root / "state")
    with pytest.raises(DowngradeError, match=r"version 4 of 'demo' is older than .* committed: 5") as caught:
        device.install(4)
    assert caught.value.exit_code == 5
    assert _tree(device.root / "state") == before
    assert device.serving == newest


def test_an_equal_version_may_be_another_bundle(device: Device) -> None:
    """A release that was built again, with the same number, is let in."""
    device.install(5)
    assert device.install(5, note="built again") == device.serving


def test_the_floor_survives_removal_and_restart(device: Device) -> None:
    """Removing the newest version, or restarting, does not open the way for old ones."""
    newest = device.install(5)
    device.install(5, note="built again")
    device.lifecycle.remove(newest)
    device.install(5, note="and again")
    device.install(5, note="and once more")
    for version in device.store.list():
        if not version.active:
            device.lifecycle.remove(version.digest)
    device.restart()
    with pytest.raises(DowngradeError):
        device.install(4)


def test_only_a_commit_raises_the_floor(device: Device) -> None:
    """A version that was only stored, or failed its self-test, keeps no other version out."""
    device.install(1)
    device.install(9, activate=False)
    path = device.make(8)
    device.models.broken.append(_digest(path))
    with pytest.raises(Refused, match="golden"):
        device.lifecycle.install(path)
    assert device.install(2) == device.serving


def test_what_was_committed_may_always_come_back(device: Device) -> None:
    """Rolling back and activating a committed version need no permission; the floor stays all the same."""
    old, new = device.install(1), device.install(2)
    assert device.lifecycle.rollback("demo").digest == old == device.serving
    assert device.lifecycle.install(device.root / "1first").digest == old  # it is active: nothing changes
    assert device.lifecycle.activate(new).digest == new
    assert device.lifecycle.activate(old).digest == old
    device.restart()
    assert device.serving == old
    with pytest.raises(DowngradeError, match="committed: 2"):
        device.install(1, note="another")


def test_an_old_version_that_was_only_stored_cannot_be_activated(device: Device) -> None:
    """A version that was stored while it was new and never committed is an old one like any other."""
    stored = device.install(3, activate=False)
    device.install(5)
    with pytest.raises(DowngradeError):
        device.lifecycle.activate(stored)


def test_a_person_may_allow_a_downgrade_once(device: Device) -> None:
    """--allow-downgrade lets one old version in; the next old one needs it again."""
    device.install(5)
    assert device.install(3, allow_downgrade=True) == device.serving
    device.restart()
    with pytest.raises(DowngradeError, match="committed: 5"):
        device.install(4)


def test_keys_of_different_owners_do_not_shut_each_other_out(device: Device) -> None:
    """The floor is each key's own: what one key releases is no limit for another."""
    device.install(7, key="first")
    assert device.install(1, key="second") == device.serving
    with pytest.raises(DowngradeError):
        device.install(6, key="first")


def test_models_have_floors_of_their_own(device: Device) -> None:
    """A high version of one model says nothing about another."""
    device.install(7)
    other = signed_bundle(device.root / "other", device.keys["first"], version=1, name="other")
    assert device.lifecycle.install(device.root / "other").digest == other.digest


def test_unsigned_bundles_have_a_floor_too(tmp_path: Path) -> None:
    """Where unsigned bundles are let in, the ratchet still guards against mistakes."""
    device = Device(tmp_path, allow_unsigned=True)
    for version in (2, 1):
        make_bundle(tmp_path / str(version), version=version)
    device.lifecycle.install(tmp_path / "2")
    with pytest.raises(DowngradeError):
        device.lifecycle.install(tmp_path / "1")
    device.store.close()


def test_a_damaged_record_shuts_nothing_out(device: Device) -> None:
    """If the floors cannot be read, what is installed still says what was committed; updates go on."""
    device.install(5)
    (device.root / "state" / "trust" / "floors.json").write_bytes(b"{")
    with pytest.raises(DowngradeError):
        device.install(4)
    assert device.install(6) == device.serving


@pytest.mark.parametrize("content", [b"[]", b'{"floors": []}', b'{"floors": {"a": {"demo": "5"}}}', b"\xff"])
def test_floors_of_another_form_are_ignored(device: Device, content: bytes) -> None:
    """A file that holds something else than floors does not stop the agent."""
    (device.root / "state" / "trust").mkdir()
    (device.root / "state" / "trust" / "floors.json").write_bytes(content)
    device.restart()
    assert device.install(1) == device.serving


def test_a_disk_that_cannot_record_the_floor_costs_nothing_else(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit holds though the floor cannot be written; it is written by the next operation."""

    def fail(name: str, arguments: Sequence[Any], call: Callable[[], Any]) -> Any:
        if name == "_write_synced" and "floors.json" in str(arguments[0]):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return call()

    with monkeypatch.context() as patch:
        on_primitive(patch, fail)
        newest = device.install(5)
    assert not (device.root / "state" / "trust" / "floors.json").exists()
    device.restart()
    assert device.serving == newest
    assert b'"demo": 5' in (device.root / "state" / "trust" / "floors.json").read_bytes()


COMMITS = st.lists(
    st.builds(Committed, st.sampled_from(["a", "b"]), st.sampled_from(["m", "n"]), st.integers(1, 2**70))
)


@given(COMMITS, COMMITS)
def test_floors_never_fall(first: List[Committed], second: List[Committed]) -> None:
    """Whatever is committed in whatever order, each floor is the highest version so far."""
    before = ratchet.raised({}, first)
    after = ratchet.raised(before, second)
    for name in ("m", "n"):
        for lineage in ({"a"}, {"b"}, {"a", "b"}):
            versions = [c.version for c in first + second if c.name == name and c.signer in lineage]
            assert ratchet.floor_of(after, lineage, name) == max(versions, default=0)
            assert ratchet.floor_of(after, lineage, name) >= ratchet.floor_of(before, lineage, name)
    assert ratchet.raised(after, first + second) == after


def _digest(path: Path) -> str:
    from device_agent import archive

    return archive.read_head(path).digest


def _tree(root: Path) -> Dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
