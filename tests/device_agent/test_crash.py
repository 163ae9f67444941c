"""A device is never left worse than it was: power cuts, kills and failing disks at every step."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from crash_kit import Change, World, crash_states, fail_at_every_step, states_without
from device_agent.errors import AgentError, Refused
from device_agent.lifecycle import Lifecycle
from device_agent.store import Store
from device_agent.trust_store import TrustStore
from storage_kit import FakeModels, make_key, rotation_to


@pytest.fixture
def world(in_memory: Path) -> World:
    """A device."""
    return World(in_memory)


def _fail_on_probation(world: World) -> Change:
    """An install whose version is rolled back from its probation."""
    world.unhealthy.append(world.digests["new"])

    def change(lifecycle: Lifecycle) -> None:
        with pytest.raises(Refused, match="probation"):
            lifecycle.install(world.bundle("new"))

    return change


def _rotate(world: World) -> Change:
    """A rotation to a new key, which retires none."""
    document = rotation_to(make_key(None), world.key, 1, "second")
    return lambda lifecycle: lifecycle.rotate(document)


CHANGES = {
    "first install": ([], lambda w: lambda lc: lc.install(w.bundle("new")), [None], "new"),
    "install": (["old"], lambda w: lambda lc: lc.install(w.bundle("new")), ["old"], "new"),
    "install and collect": (
        ["older", "old"],
        lambda w: lambda lc: lc.install(w.bundle("new")),
        ["old"],
        "new",
    ),
    "activate": (["new", "old"], lambda w: lambda lc: lc.activate(w.digests["new"]), ["old"], "new"),
    "rollback": (["new", "old"], lambda w: lambda lc: lc.rollback("demo"), ["old"], "new"),
    "rollback from probation": (["old"], _fail_on_probation, ["old"], "old"),
    "key rotation": (["old"], _rotate, ["old"], "old"),
    "remove": (["older", "old"], lambda w: lambda lc: lc.remove(w.digests["older"]), ["old"], "old"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_power_cut_leaves_the_old_version_or_the_new_one(
    world: World, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Whatever a power cut leaves of a change, the next start serves one whole version and can update."""
    installed, make_change, before, after = CHANGES[name]
    world.install(*installed)
    world.state_dir.mkdir(exist_ok=True)
    change = make_change(world)
    states = crash_states(monkeypatch, world.state_dir, lambda: world.run(change))
    allowed = [None if item is None else world.digests[item] for item in (*before, after)]
    seen = {world.check_start(world.rebuilt(state), allowed) for state in states.during}
    assert seen == set(allowed)
    for state in states.finished:  # once the agent has said that it is done, nothing takes the change back
        rebuilt = world.rebuilt(state)
        world.check_start(rebuilt, [world.digests[after]])
        assert len(TrustStore(rebuilt / "trust").rotations()) == (name == "key rotation")
    states.say(name)


@pytest.mark.parametrize(("fault", "after"), [("", "new"), ("broken", "old"), ("unhealthy", "old")])
def test_a_power_cut_while_recovering_is_no_different(
    world: World, monkeypatch: pytest.MonkeyPatch, fault: str, after: str
) -> None:
    """A start that finishes or gives up an interrupted update may be interrupted itself."""
    world.install("old")
    new = world.digests["new"]
    with Store(world.state_dir) as store:
        lifecycle = Lifecycle(store, world.trust, FakeModels())  # type: ignore[arg-type]  # the double
        lifecycle.install(world.bundle("new"), activate=False)
        store.set_state("demo", store.state("demo").activated(new))
        entry = {
            "operation": "install",
            "digest": new,
            "goal": "committed",
            "state": "probation",
            "fresh": True,
            "attempts": 1,
        }
        store.set_journal("demo", {**entry, "failure": None})
    if fault:
        monkeypatch.setattr(world, fault, [new])
    states = crash_states(monkeypatch, world.state_dir, lambda: world.run(lambda lifecycle: None))
    seen = {world.check_start(world.rebuilt(state), [world.digests["old"], new]) for state in states.during}
    assert world.digests[after] in seen
    for state in states.finished:
        world.check_start(world.rebuilt(state), [world.digests[after]])
    states.say(f"recovery to {after} {fault}".rstrip())


@pytest.mark.parametrize("broken", ["_sync_directory", "_sync_file"])
def test_the_harness_finds_a_missing_sync(world: World, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    """If the agent stopped syncing files or directories, the tests above would notice."""
    world.install("old")
    change: Change = lambda lifecycle: lifecycle.install(world.bundle("new"))  # noqa: E731
    failures = 0
    for state in states_without(monkeypatch, world.state_dir, broken, lambda: world.run(change)):
        try:
            world.check_start(world.rebuilt(state), [world.digests["new"]])
        except (AssertionError, AgentError):
            failures += 1
    assert failures > 0


@pytest.mark.parametrize(("reason", "lasting"), [(errno.ENOSPC, False), (errno.EROFS, True)])
def test_a_failing_disk_leaves_the_old_version_serving(
    world: World, monkeypatch: pytest.MonkeyPatch, reason: int, lasting: bool
) -> None:
    """A disk that fills up, turns read-only or breaks at any step costs the update and nothing else."""
    world.install("old")
    steps = fail_at_every_step(world, monkeypatch, reason, lasting, World.install_bundle)
    assert steps > 20
    print(f"install, {os.strerror(reason)}: {steps} steps failed, 0 violations")


KILLED_INSTALL = """
import os, shutil, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from crash_disk import PRIMITIVES
from storage_kit import FakeModels
from device_agent import durable
from device_agent.lifecycle import Lifecycle
from device_agent.signature import Trust
from device_agent.store import Store

root = Path(sys.argv[2])
os.fsync = lambda descriptor: None  # what a process wrote outlives it

def install(state_dir, step):
    steps = iter(range(10**6))
    for name in PRIMITIVES:
        def wrapped(*arguments, original=getattr(durable, name)):
            if next(steps) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments)
        setattr(durable, name, wrapped)
    with Store(state_dir) as store:
        lifecycle = Lifecycle(store, Trust(root / "keys"), FakeModels())
        lifecycle.restore()
        lifecycle.install(root / "new")

for step in range(1000):
    state_dir = root / f"killed{step}"
    shutil.copytree(str(root / "state"), str(state_dir))
    child = os.fork()
    if child == 0:
        install(state_dir, step)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
"""


def test_a_kill_at_any_step_leaves_the_old_version_or_the_new_one(world: World) -> None:
    """SIGKILL at each durable operation of a real process: the next start serves one whole version."""
    world.install("old")
    command = [sys.executable, "-c", KILLED_INSTALL, str(Path(__file__).parent), str(world.root)]
    subprocess.run(command, check=True, timeout=120)
    killed = sorted(world.root.glob("killed*"), key=lambda path: int(path.name[6:]))
    assert len(killed) > 20
    allowed = [world.digests["old"], world.digests["new"]]
    outcomes = [world.check_start(state_dir, allowed) for state_dir in killed]
    assert (outcomes[0], outcomes[-1]) == (world.digests["old"], world.digests["new"])
    print(f"install, killed: {len(killed)} steps, 0 violations")
