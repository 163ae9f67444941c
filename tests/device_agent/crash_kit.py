"""A device for crash tests, and what a power cut may leave of it."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

import pytest

from crash_disk import Contents, CrashDisk, on_plain_write, on_primitive, rebuild
from device_agent import journal, manifest
from device_agent.errors import Refused
from device_agent.lifecycle import Lifecycle
from device_agent.signature import Trust
from device_agent.store import Store
from storage_kit import FakeModels, make_key, signed_bundle

Change = Callable[[Lifecycle], Any]
Bring = Callable[["World", Lifecycle, str], Any]


class World:
    """A device with an old version, and bundles to change it with."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.state_dir = root / "state"
        self.rebuilt = Rebuilt(root)
        self.broken: List[str] = []
        self.unhealthy: List[str] = []
        self.trust = Trust(root / "keys")
        self.key = key = make_key(root / "keys")
        self.digests: Dict[str, str] = {}
        for version, name in enumerate(("old", "older", "new", "next"), 1):
            model = {"model.onnx": name.encode() * 20}
            self.digests[name] = signed_bundle(root / name, key, version=version, extra=model).digest

    def bundle(self, name: str) -> Path:
        """Where a bundle lies."""
        return self.root / name

    def install(self, *names: str) -> None:
        """Install versions one after the other, before the test begins."""
        with Store(self.state_dir) as store:
            lifecycle = Lifecycle(store, self.trust, FakeModels())  # type: ignore[arg-type]  # the double
            for name in names:
                lifecycle.install(self.bundle(name), allow_downgrade=True)

    def models(self) -> FakeModels:
        """What an agent that starts now would load versions with."""
        return FakeModels(broken=self.broken, unhealthy=self.unhealthy)

    def check_start(
        self, state_dir: Path, allowed: Sequence[Optional[str]], bring: Optional[Bring] = None
    ) -> Optional[str]:
        """Start on what a crash left; return which version serves, and prove that updates still work.

        Args:
            state_dir: what was left.
            allowed: digests of the versions that may serve; None: no model.
            bring: how the interrupted update comes once more; None: it does not.
        """
        models = self.models()
        with Store(state_dir) as store:
            lifecycle = Lifecycle(store, self.trust, models)  # type: ignore[arg-type]  # the double
            lifecycle.restore()
            lifecycle.resume()
            serving = models.get("demo")
            found = None if serving is None else serving.digest
            assert found in allowed
            assert store.active("demo") == found
            assert found is None or found in store.state("demo").committed
            assert not store.names() or journal.interrupted(store, "demo") is None
            for version in store.list():
                assert version.active or version.committed  # nothing half-installed stays
                self.trust.check(version.directory, *manifest.read(version.directory))
            assert not list((state_dir / "temporary").iterdir())
            if bring is not None:
                bring(self, lifecycle, "new")
                assert store.active("demo") == self.digests["new"]
            lifecycle.install(self.bundle("next"))
            assert models.serving["demo"].digest == store.active("demo") == self.digests["next"]
        return found

    def install_bundle(self, lifecycle: Lifecycle, name: str) -> None:
        """Bring a bundle to the device as a person there does: from its directory."""
        lifecycle.install(self.bundle(name))

    def run(self, change: Change) -> None:
        """Start the agent, change something, stop."""
        with Store(self.state_dir) as store:
            lifecycle = Lifecycle(store, self.trust, self.models())  # type: ignore[arg-type]  # the double
            lifecycle.restore()
            lifecycle.resume()
            change(lifecycle)


class CrashStates(NamedTuple):
    """The disks that a power cut may leave.

    Attributes:
        during: one while the change is made.
        finished: one right after it.
    """

    during: List[Contents]
    finished: List[Contents]

    def say(self, operation: str) -> None:
        """Print how much was explored; ``pytest -s`` shows it."""
        print(f"{operation}: {len(self.during) + len(self.finished)} states explored, 0 violations")


def crash_states(
    monkeypatch: pytest.MonkeyPatch,
    state_dir: Path,
    make_change: Callable[[], Any],
    beside: str = "temporary",
) -> CrashStates:
    """Run a change once, and collect every disk that a power cut may leave of it.

    Args:
        monkeypatch: undone afterwards.
        state_dir: the device's.
        make_change: the change.
        beside: a directory whose files make no state of their own; what lies there when is left to chance.
    """
    disk = CrashDisk(state_dir)
    states: List[Contents] = []
    with monkeypatch.context() as patch:
        on_primitive(patch, disk.around(lambda: states.extend(disk.states())))
        make_change()
    return CrashStates(unique(states, beside), unique(list(disk.states()), beside))


def states_without(
    monkeypatch: pytest.MonkeyPatch, state_dir: Path, primitive: str, make_change: Callable[[], Any]
) -> List[Contents]:
    """What a power cut may leave after a change that never calls one of ``durable``'s primitives."""
    disk = CrashDisk(state_dir)
    follow = disk.around(lambda: None)

    def forget(name: str, arguments: Sequence[Any], call: Callable[[], Any]) -> Any:
        return None if name == primitive else follow(name, arguments, call)

    with monkeypatch.context() as patch:
        on_primitive(patch, forget)
        make_change()
    return unique(list(disk.states()))


def unique(states: List[Contents], beside: str = "temporary") -> List[Contents]:
    """Drop repeated states; files below ``temporary`` are deleted at the start and make no difference."""
    kept: Dict[Any, Contents] = {}
    for state in states:
        lasting = {k: v for k, v in state.items() if not k.startswith(("temporary/", f"{beside}/"))}
        kept[frozenset(lasting.items())] = state
    return list(kept.values())


def fail_at_every_step(
    world: World, monkeypatch: pytest.MonkeyPatch, reason: int, lasting: bool, bring: Bring
) -> int:
    """Bring the version ``new`` to the device again and again, its disk failing at one step after another.

    Args:
        world: a device that serves ``old``.
        monkeypatch: undone before the device is looked at.
        reason: the ``errno`` that a failing step ends with.
        lasting: whether every later step fails too.
        bring: how the version comes.

    Returns:
        How many steps failed, each in a run of its own that left the old version or the new one serving, and
        a device that can update.
    """
    for step in itertools.count():
        if not _bring_on_failing_disk(world, monkeypatch, step, reason, lasting, bring):
            return step
    raise AssertionError


def _bring_on_failing_disk(
    world: World, monkeypatch: pytest.MonkeyPatch, step: int, reason: int, lasting: bool, bring: Bring
) -> bool:
    """Bring an update while the disk fails at one step; return whether that step was reached."""
    state_dir = world.root / f"disk{reason}-{step}"
    shutil.copytree(str(world.state_dir), str(state_dir))
    steps = itertools.count()
    failed = False

    def fail(name: str, arguments: Sequence[Any], call: Callable[[], Any]) -> Any:
        nonlocal failed
        index = next(steps)
        if index == step or (lasting and index > step):
            failed = True
            raise OSError(reason, os.strerror(reason))
        return call()

    models = FakeModels()
    with Store(state_dir) as store:
        lifecycle = Lifecycle(store, world.trust, models)  # type: ignore[arg-type]  # the double
        lifecycle.restore()
        with monkeypatch.context() as patch:
            on_primitive(patch, fail)
            for directory in ("incoming", "temporary"):
                on_plain_write(patch, state_dir / directory, fail)
            try:
                bring(world, lifecycle, "new")
                installed = "new"
            except Refused:
                installed = "old"
        assert models.serving["demo"].digest == world.digests[installed]
        if not lasting:
            assert store.active("demo") == world.digests[installed]
        bring(world, lifecycle, "next")
        assert models.serving["demo"].digest == store.active("demo") == world.digests["next"]
    world.check_start(state_dir, [world.digests["next"]])
    return failed


class Rebuilt:
    """Makes directories of modelled disks, each at a place of its own below ``root``."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._numbers = itertools.count()

    def __call__(self, state: Contents) -> Path:
        path = self._root / f"crash{next(self._numbers)}"
        rebuild(state, path)
        return path
