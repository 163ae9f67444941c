"""The update as a state machine: what follows each state, and each error in it."""

from __future__ import annotations

import asyncio
import errno
import threading
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Sequence

import numpy as np
import pytest

from agent_testing import linear, linear_bundle, write_bundle
from crash_disk import on_primitive
from device_agent import startup
from device_agent.config import Config
from device_agent.errors import AgentError, BadInput, Refused, TrustError
from device_agent.journal import STATES
from device_agent.lifecycle import Lifecycle
from device_agent.metrics import Metrics
from device_agent.models import Models
from device_agent.signature import Trust
from device_agent.store import Store
from storage_kit import FakeModels, make_bundle, make_key, sign_bundle, signed_bundle


class Device:
    """A device with a trusted key and a double of the models."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.key = make_key(root / "keys")
        self.trust = Trust(root / "keys")
        self.models = FakeModels()
        self.store = Store(root / "state")
        self.lifecycle = Lifecycle(self.store, self.trust, self.models)  # type: ignore[arg-type]  # the double

    def bundle(self, version: int, **changes: Any) -> str:
        """Make a signed bundle at ``root/VERSION`` and return its digest."""
        return signed_bundle(self.root / str(version), self.key, version=version, **changes).digest

    def install(self, version: int) -> str:
        """Make a bundle and install it."""
        digest = self.bundle(version)
        self.lifecycle.install(self.root / str(version))
        return digest

    def restart(self) -> None:
        """Start the agent again, with nothing in memory."""
        self.store.close()
        self.models = FakeModels(broken=self.models.broken)
        self.store = Store(self.root / "state")
        self.lifecycle = Lifecycle(self.store, self.trust, self.models)  # type: ignore[arg-type]  # the double
        self.lifecycle.restore()
        self.lifecycle.resume()

    @property
    def serving(self) -> Any:
        """Digest of what serves."""
        loaded = self.models.get("demo")
        return None if loaded is None else loaded.digest


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    """A device with nothing installed."""
    made = Device(tmp_path)
    yield made
    made.store.close()


def test_an_update_goes_through_every_state(device: Device) -> None:
    """Each state is reported once, in order; traffic moves after the self-test; the old version ends last."""
    old, new = device.install(1), device.bundle(2)
    device.models.events.clear()
    states: List[str] = []
    installed = device.lifecycle.install(device.root / "2", on_state=states.append)
    assert tuple(states) == STATES
    assert (installed.state, installed.previous, installed.signer) == ("committed", old, "release")
    assert (installed.name, installed.version, installed.digest) == ("demo", 2, new)
    assert device.models.events == [f"prepare {new[:8]}", f"switch {new[:8]}", f"retire {old[:8]}"]
    assert (device.serving, device.store.active("demo")) == (new, new)


def _break(device: Device, state: str, digest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the step that leads to ``state`` fail."""
    error = Refused("it failed", "the test says so", "nothing")

    def fail(*arguments: Any, **options: Any) -> Any:
        raise error

    if state == "received":
        (device.root / "2" / "manifest.json").write_bytes(b"{}")
    elif state == "verified":
        sign_bundle(device.root / "2", make_key(None))
    elif state == "staged":
        (device.root / "2" / "model.onnx").write_bytes(b"other")
    elif state in ("prepared", "selftested"):
        device.models.broken.append(digest)
    elif state == "switched":
        monkeypatch.setattr(device.models, "switch", fail)
    else:
        original = device.store.set_journal

        def fail_at_commit(name: str, entry: Dict[str, Any]) -> None:
            if entry["state"] == "committed" and not entry["failure"]:
                raise error
            original(name, entry)

        monkeypatch.setattr(device.store, "set_journal", fail_at_commit)


@pytest.mark.parametrize("installed_before", [True, False])
@pytest.mark.parametrize("state", STATES)
def test_an_error_on_the_way_to_any_state_leaves_everything_as_it_was(
    device: Device, monkeypatch: pytest.MonkeyPatch, state: str, installed_before: bool
) -> None:
    """Wherever an update fails, the old version serves on, also after a restart; nothing else is left."""
    old = device.install(1) if installed_before else None
    new = device.bundle(2)
    with monkeypatch.context() as patch:
        _break(device, state, new, patch)
        with pytest.raises(AgentError):
            device.lifecycle.install(device.root / "2")
    assert device.serving == old
    assert [v.digest for v in device.store.list()] == ([old] if old else [])
    device.restart()
    assert (device.serving, device.store.active("demo")) == (old, old)


def test_no_request_reaches_a_version_that_is_not_on_disk(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The choice of version is written first; if that fails, traffic was never moved."""
    device.install(1)
    device.bundle(2)
    device.models.events.clear()

    def fail(name: str, state: Any) -> None:
        raise Refused("state.json cannot be written", "the test says so", "nothing")

    monkeypatch.setattr(device.store, "set_state", fail)
    with pytest.raises(Refused):
        device.lifecycle.install(device.root / "2")
    assert not [event for event in device.models.events if event.startswith("switch")]


def test_the_reason_of_a_failure_is_kept(device: Device) -> None:
    """``status`` tells after a restart how the last operation ended, and what serves instead."""
    old, new = device.install(1), device.bundle(2)
    device.models.broken.append(new)
    with pytest.raises(Refused):
        device.lifecycle.install(device.root / "2")
    device.restart()
    (status,) = device.lifecycle.status()
    assert (status["serving"], status["active"], status["fallback"]) == (old, old, None)
    last = status["last_operation"]
    assert (last["operation"], last["digest"], last["state"]) == ("install", new, "staged")
    assert last["failure"]["what"] == "the golden outputs are not reproduced"


def test_a_bundle_nobody_vouches_for_leaves_no_trace(device: Device) -> None:
    """A bundle that is not trusted writes nothing into the store, not even its name."""
    make_bundle(device.root / "evil", name="evil")
    with pytest.raises(TrustError):
        device.lifecycle.install(device.root / "evil")
    assert device.store.names() == []


def test_staging_without_activating(device: Device) -> None:
    """``activate=False`` stores a version, which can be activated later by a short digest."""
    old, new = device.install(1), device.bundle(2)
    staged = device.lifecycle.install(device.root / "2", activate=False)
    assert (staged.state, device.serving, device.store.active("demo")) == ("staged", old, old)
    device.restart()
    assert device.serving == old
    activated = device.lifecycle.activate(new[:8])
    assert (activated.digest, activated.previous, device.serving) == (new, old, new)


def test_rolling_back_and_forth(device: Device) -> None:
    """A rollback serves the version before, also after a restart; a second one returns."""
    old, new = device.install(1), device.install(2)
    assert device.lifecycle.rollback("demo").digest == old
    assert device.serving == old
    device.restart()
    assert device.serving == old
    assert device.lifecycle.rollback("demo").digest == new


def test_there_may_be_nothing_to_roll_back_to(device: Device) -> None:
    """A rollback without a fallback is an error that changes nothing."""
    with pytest.raises(BadInput, match="no version to return to"):
        device.lifecycle.rollback("demo")
    only = device.install(1)
    with pytest.raises(BadInput, match="no version to return to"):
        device.lifecycle.rollback("demo")
    assert device.serving == only


def test_a_rollback_to_a_broken_version_is_refused(device: Device) -> None:
    """The fallback is self-tested like any other version; if it fails, the active one serves on."""
    old, new = device.install(1), device.install(2)
    device.models.broken.append(old)
    with pytest.raises(Refused):
        device.lifecycle.rollback("demo")
    assert (device.serving, device.store.active("demo")) == (new, new)
    assert old in [v.digest for v in device.store.list()]


def test_installing_what_serves_is_no_harm(device: Device) -> None:
    """The same bundle again ends committed, and the fallback stays."""
    old, new = device.install(1), device.install(2)
    assert device.lifecycle.install(device.root / "2").state == "committed"
    assert (device.serving, device.store.state("demo").fallback) == (new, old)


def test_a_start_falls_back(device: Device) -> None:
    """If the active version does not come up, the fallback serves; the active one gets its next chance."""
    old, new = device.install(1), device.install(2)
    device.models.broken.append(new)
    device.restart()
    assert (device.serving, device.store.active("demo")) == (old, new)
    device.models.broken.clear()
    device.restart()
    assert device.serving == new


def test_an_unproven_version_that_does_not_come_up_is_given_up(device: Device) -> None:
    """A version that was switched to but never committed is removed if it fails at the next start."""
    old, new = device.install(1), device.bundle(2)
    device.lifecycle.install(device.root / "2", activate=False)
    device.store.set_state("demo", device.store.state("demo").activated(new))
    entry = {"operation": "install", "digest": new, "goal": "committed", "state": "switched", "fresh": True}
    device.store.set_journal("demo", {**entry, "failure": None})
    device.models.broken.append(new)
    device.restart()
    assert (device.serving, device.store.active("demo"), device.store.state("demo").fallback) == (
        old,
        old,
        None,
    )
    assert [v.digest for v in device.store.list()] == [old]
    assert device.lifecycle.status()[0]["last_operation"]["failure"]["why"] == "an output is off"


def test_a_model_that_cannot_come_up_does_not_hinder_the_others(device: Device) -> None:
    """One model whose files decayed is left out and logged; the others serve."""
    signed_bundle(device.root / "other", device.key, name="other")
    device.lifecycle.install(device.root / "other")
    only = device.install(1)
    (device.store.directory("demo", only) / "model.onnx").write_bytes(b"rot")
    device.restart()
    assert device.serving is None
    assert device.models.get("other") is not None


def test_whatever_an_engine_raises_the_fallback_serves(device: Device) -> None:
    """An exception that nobody foresaw costs the version, not the start."""
    old, new = device.install(1), device.install(2)
    prepare = FakeModels.prepare

    def explode(models: FakeModels, directory: Path, manifest: Any, digest: str) -> Any:
        if digest == new:
            raise MemoryError
        return prepare(models, directory, manifest, digest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeModels, "prepare", explode)
        device.restart()
    assert (device.serving, device.store.active("demo")) == (old, new)


class ProcessEnd(BaseException):
    """The process ends here, as a crash in native code would end it."""


def test_a_version_that_ends_the_process_is_passed_over(device: Device) -> None:
    """After three starts that did not end, the fallback serves; then the version is tried again."""
    old, new = device.install(1), device.install(2)
    prepare = FakeModels.prepare

    def crash(models: FakeModels, directory: Path, manifest: Any, digest: str) -> Any:
        if digest == new:
            raise ProcessEnd
        return prepare(models, directory, manifest, digest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeModels, "prepare", crash)
        for _ in range(startup.MAX_STARTS):
            with pytest.raises(ProcessEnd):
                device.restart()
        device.restart()
        assert (device.serving, device.store.active("demo")) == (old, new)
        with pytest.raises(ProcessEnd):
            device.restart()
    device.restart()
    assert device.serving == new
    assert device.store.starts("demo", new) == 0


def test_a_disk_that_cannot_be_written_still_serves(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a remount read-only the device comes up with what it has, and refuses updates."""
    only = device.install(1)
    device.bundle(2)

    def fail(name: str, arguments: Sequence[Any], call: Callable[[], Any]) -> Any:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        on_primitive(patch, fail)
        device.restart()
        assert device.serving == only
        with pytest.raises(Refused, match="Read-only"):
            device.lifecycle.install(device.root / "2")
        assert device.serving == only
    assert device.lifecycle.install(device.root / "2").state == "committed"


def test_a_withdrawn_key_counts_at_the_next_start(device: Device) -> None:
    """What was signed with a key that was removed from the device is served no more."""
    device.install(1)
    (device.root / "keys" / "release.pub").unlink()
    device.restart()
    assert device.serving is None


def test_old_versions_are_collected_after_a_commit(device: Device) -> None:
    """A device keeps the active version and the one before, not its whole history."""
    digests = [device.install(version) for version in (1, 2, 3, 4)]
    assert sorted(v.digest for v in device.store.list()) == sorted(digests[2:])


def test_switches_happen_on_the_event_loop(device: Device) -> None:
    """Once a loop is bound, requests never see a model change in the middle of their turn."""
    threads: List[int] = []
    original = device.models.switch

    def switch(loaded: Any) -> Any:
        threads.append(threading.get_ident())
        return original(loaded)

    device.models.switch = switch  # type: ignore[method-assign]  # the double is watched

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        device.lifecycle.bind(loop)
        await loop.run_in_executor(None, device.install, 1)
        await loop.run_in_executor(None, device.install, 2)

    asyncio.run(serve())
    assert threads == [threading.get_ident()] * 2


def test_a_closed_life_cycle_begins_nothing(device: Device) -> None:
    """While the agent stops, a change is refused instead of half done."""
    device.bundle(1)
    device.lifecycle.close()
    with pytest.raises(Refused, match="the agent stops"):
        device.lifecycle.install(device.root / "1")


def test_a_real_engine_decides(tmp_path: Path) -> None:
    """With ONNX Runtime: a bundle whose golden outputs are wrong is refused, and the good one serves on."""
    good = linear_bundle(tmp_path / "good")
    wrong = write_bundle(
        tmp_path / "wrong",
        linear(),
        {"x": np.ones((2, 8), np.float32)},
        {"scores": np.full((2, 4), 7, np.float32)},
        version=2,
    )
    models = Models(Config(threads=1), Metrics())
    with Store(tmp_path / "state") as store:
        lifecycle = Lifecycle(store, Trust(tmp_path / "keys", allow_unsigned=True), models)
        lifecycle.install(good.directory)
        with pytest.raises(Refused):
            lifecycle.install(wrong.directory)
        serving = models.get("model")
        assert serving is not None
        assert serving.digest == store.active("model") == good.digest
        asyncio.run(models.retire(serving))
