"""Power cuts, kills and failing disks while keys change hands and the ratchet rises."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from pathlib import Path
from typing import Any, Callable, Dict, FrozenSet, List, Sequence

import pytest

from crash_disk import on_primitive
from crash_kit import Change, Rebuilt, crash_states, states_without
from device_agent.errors import AgentError, DowngradeError, Refused
from device_agent.lifecycle import Lifecycle
from device_agent.signature import Trust
from device_agent.store import Store
from storage_kit import FakeModels, make_key, rotation_to, signed_bundle

Usable = FrozenSet[str]


class World:
    """A device that serves version 1, signed with ``root``, with rotations at hand."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.state_dir = root / "state"
        self.rebuilt = Rebuilt(root)
        self.keys: Dict[str, Any] = {name: make_key(None) for name in ("second", "third")}
        self.keys["root"] = make_key(root / "keys", "root")
        self.documents = {
            "second": rotation_to(self.keys["second"], self.keys["root"], 1, "second"),
            "third": rotation_to(self.keys["third"], self.keys["root"], 2, "third", retire=True),
        }
        self.digests = {
            version: signed_bundle(self.bundle(version), self.keys["root"], version=version).digest
            for version in (1, 2, 3)
        }
        self.run(self.state_dir, lambda lifecycle: lifecycle.install(self.bundle(1)))

    def bundle(self, version: int) -> Path:
        """Where a bundle lies."""
        return self.root / f"v{version}"

    def run(self, state_dir: Path, change: Change) -> Any:
        """Start the agent, change something, stop."""
        models = FakeModels()
        with Store(state_dir) as store:
            lifecycle = Lifecycle(store, Trust(self.root / "keys"), models)  # type: ignore[arg-type]  # double
            lifecycle.restore()
            lifecycle.resume()
            change(lifecycle)
            assert models.serving["demo"].digest == store.active("demo")
            return models.serving["demo"].digest

    def usable(self, state_dir: Path) -> Usable:
        """Start on what a crash left: a whole version serves; return the keys that sign something new."""
        found: List[Usable] = []

        def look(lifecycle: Lifecycle) -> None:
            found.append(frozenset(k["name"] for k in lifecycle.trusted_keys() if not k["retired"]))

        self.run(state_dir, look)
        return found[0]


@pytest.fixture
def world(in_memory: Path) -> World:
    """A device."""
    return World(in_memory)


ROTATIONS: Dict[str, Any] = {
    "first rotation": ([], "second", {"root"}, {"root", "second"}),
    "rotation that retires": (["second"], "third", {"root", "second"}, {"third"}),
}


@pytest.mark.parametrize("name", ROTATIONS)
def test_a_power_cut_leaves_the_old_keys_or_the_new_ones(
    world: World, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Whatever a power cut leaves of a rotation, the model serves and the keys are those before or after."""
    earlier, document, before, after = ROTATIONS[name]
    for item in earlier:
        world.run(world.state_dir, lambda lifecycle, item=item: lifecycle.rotate(world.documents[item]))
    change: Change = lambda lifecycle: lifecycle.rotate(world.documents[document])  # noqa: E731
    states = crash_states(monkeypatch, world.state_dir, lambda: world.run(world.state_dir, change))
    seen = set()
    for state in states.during:
        state_dir = world.rebuilt(state)
        usable = world.usable(state_dir)
        assert usable in (before, after)
        seen.add(usable)
        world.run(state_dir, change)  # what was interrupted can be done again, or was done
        assert world.usable(state_dir) == after
    assert seen == {frozenset(before), frozenset(after)}
    for state in states.finished:  # once the agent has said that it is done, nothing takes it back
        assert world.usable(world.rebuilt(state)) == after
    states.say(name)


def test_a_power_cut_never_lowers_the_floor(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever power goes while an update commits, the version that then serves is the floor."""
    install: Change = lambda lifecycle: lifecycle.install(world.bundle(3))  # noqa: E731
    states = crash_states(monkeypatch, world.state_dir, lambda: world.run(world.state_dir, install))
    seen = set()
    for state in states.during + states.finished:
        state_dir = world.rebuilt(state)
        serving = world.run(state_dir, lambda lifecycle: None)
        seen.add(serving)
        if serving == world.digests[3]:
            with pytest.raises(DowngradeError):
                world.run(state_dir, lambda lifecycle: lifecycle.install(world.bundle(2)))
        else:
            world.run(state_dir, lambda lifecycle: lifecycle.install(world.bundle(2)))
    assert seen == {world.digests[1], world.digests[3]}
    for state in states.finished:
        assert world.run(world.rebuilt(state), lambda lifecycle: None) == world.digests[3]
    states.say("floor")


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EROFS])
def test_a_failing_disk_costs_the_rotation_and_nothing_else(
    world: World, monkeypatch: pytest.MonkeyPatch, reason: int
) -> None:
    """Wherever a disk fails in a rotation, the old keys count or the new ones, and the model serves."""
    for step in itertools.count():
        state_dir = world.root / f"disk{step}"
        shutil.copytree(str(world.state_dir), str(state_dir))
        failed, refused = _rotate_on_failing_disk(world, monkeypatch, state_dir, step, reason)
        usable = world.usable(state_dir)
        assert usable in ({"root"}, {"root", "second"})
        assert refused or usable == {"root", "second"}
        world.run(state_dir, lambda lifecycle: lifecycle.rotate(world.documents["second"]))
        assert world.usable(state_dir) == {"root", "second"}
        if not failed:
            break
    assert step >= 3
    print(f"rotation, {os.strerror(reason)}: {step} steps failed, 0 violations")


def _rotate_on_failing_disk(
    world: World, monkeypatch: pytest.MonkeyPatch, state_dir: Path, step: int, reason: int
) -> Any:
    """Rotate while the disk fails from one step on; return whether it failed, and whether that was told."""
    steps = itertools.count()
    failed = refused = False

    def fail(name: str, arguments: Sequence[Any], call: Callable[[], Any]) -> Any:
        nonlocal failed
        if next(steps) >= step:
            failed = True
            raise OSError(reason, os.strerror(reason))
        return call()

    with Store(state_dir) as store:
        lifecycle = Lifecycle(store, Trust(world.root / "keys"), FakeModels())  # type: ignore[arg-type]  # double
        lifecycle.restore()
        with monkeypatch.context() as patch:
            on_primitive(patch, fail)
            try:
                lifecycle.rotate(world.documents["second"])
            except Refused:
                refused = True
    return failed, refused


@pytest.mark.parametrize("broken", ["_sync_directory"])
def test_the_harness_finds_a_missing_sync(world: World, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    """If a rotation were not synced, the tests above would notice."""
    change: Change = lambda lifecycle: lifecycle.rotate(world.documents["second"])  # noqa: E731
    lost = 0
    run = lambda: world.run(world.state_dir, change)  # noqa: E731
    for state in states_without(monkeypatch, world.state_dir, broken, run):
        try:
            lost += world.usable(world.rebuilt(state)) != {"root", "second"}
        except (AssertionError, AgentError, KeyError):
            lost += 1
    assert lost > 0
