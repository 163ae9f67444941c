"""A device is never left worse than it was: power cuts, kills and failing disks at every step."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

import pytest

from crash_disk import Contents, CrashDisk, on_primitive, rebuild
from device_agent import journal
from device_agent.errors import AgentError, Refused
from device_agent.lifecycle import Lifecycle
from device_agent.signature import Trust
from device_agent.store import Store
from device_agent.trust_store import TrustStore
from storage_kit import FakeModels, make_key, rotation_to, signed_bundle

Change = Callable[[Lifecycle], Any]


class World:
    """A device with an old version, and bundles to change it with."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.state_dir = root / "state"
        self.counter = itertools.count()
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

    def check_start(self, state_dir: Path, allowed: Sequence[Optional[str]]) -> Optional[str]:
        """Start on what a crash left; return which version serves, and prove that updates still work."""
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
                self.trust.check(version.directory, *_read(version.directory))
            assert not list((state_dir / "temporary").iterdir())
            lifecycle.install(self.bundle("next"))
            assert models.serving["demo"].digest == store.active("demo") == self.digests["next"]
        return found


def _read(directory: Path) -> Any:
    from device_agent import manifest

    return manifest.read(directory)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A device; syncing a real disk is skipped, since the disks here are modelled or survive the process."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    return World(tmp_path)


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
    during, finished = _crash_states(world, monkeypatch, make_change(world))
    allowed = [None if item is None else world.digests[item] for item in (*before, after)]
    seen = {world.check_start(_rebuilt(world, state), allowed) for state in during}
    assert seen == set(allowed)
    for state in finished:  # once the agent has said that it is done, nothing takes the change back
        rebuilt = _rebuilt(world, state)
        world.check_start(rebuilt, [world.digests[after]])
        assert len(TrustStore(rebuilt / "trust").rotations()) == (name == "key rotation")
    print(f"{name}: {len(during) + len(finished)} states explored, 0 violations")


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
    during, finished = _crash_states(world, monkeypatch, lambda lifecycle: None)
    seen = {world.check_start(_rebuilt(world, state), [world.digests["old"], new]) for state in during}
    assert world.digests[after] in seen
    for state in finished:
        world.check_start(_rebuilt(world, state), [world.digests[after]])
    print(f"recovery to {after} {fault}: {len(during) + len(finished)} states explored, 0 violations")


@pytest.mark.parametrize("broken", ["_sync_directory", "_sync_file"])
def test_the_harness_finds_a_missing_sync(world: World, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    """If the agent stopped syncing files or directories, the tests above would notice."""
    world.install("old")
    disk = CrashDisk(world.state_dir)
    follow = disk.around(lambda: None)

    def forget_to_sync(name: str, arguments: Sequence[Any], call: Callable[[], Any]) -> Any:
        return None if name == broken else follow(name, arguments, call)

    with monkeypatch.context() as patch:
        on_primitive(patch, forget_to_sync)
        _run(world, lambda lifecycle: lifecycle.install(world.bundle("new")))
    failures = 0
    for state in _unique(list(disk.states())):
        try:
            world.check_start(_rebuilt(world, state), [world.digests["new"]])
        except (AssertionError, AgentError):
            failures += 1
    assert failures > 0


@pytest.mark.parametrize(("reason", "lasting"), [(errno.ENOSPC, False), (errno.EROFS, True)])
def test_a_failing_disk_leaves_the_old_version_serving(
    world: World, monkeypatch: pytest.MonkeyPatch, reason: int, lasting: bool
) -> None:
    """A disk that fills up, turns read-only or breaks at any step costs the update and nothing else."""
    world.install("old")
    step = 0
    while _install_on_failing_disk(world, monkeypatch, step, reason, lasting):
        step += 1
    assert step > 20


def _install_on_failing_disk(
    world: World, monkeypatch: pytest.MonkeyPatch, step: int, reason: int, lasting: bool
) -> bool:
    """Install while the disk fails at one step; return whether that step was reached."""
    state_dir = world.root / f"disk{reason}-{step}"
    shutil.copytree(str(world.state_dir), str(state_dir))
    steps = iter(range(10**6))
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
            try:
                lifecycle.install(world.bundle("new"))
                installed = "new"
            except Refused:
                installed = "old"
        assert models.serving["demo"].digest == world.digests[installed]
        if not lasting:
            assert store.active("demo") == world.digests[installed]
        lifecycle.install(world.bundle("next"))
        assert models.serving["demo"].digest == store.active("demo") == world.digests["next"]
    world.check_start(state_dir, [world.digests["next"]])
    return failed


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


def _crash_states(world: World, monkeypatch: pytest.MonkeyPatch, change: Change) -> Any:
    """The disks that a power cut during ``change`` may leave, and those that one afterwards may."""
    disk = CrashDisk(world.state_dir)
    states: List[Contents] = []
    with monkeypatch.context() as patch:
        on_primitive(patch, disk.around(lambda: states.extend(disk.states())))
        _run(world, change)
    after = list(disk.states())
    return _unique(states), _unique(after)


def _run(world: World, change: Change) -> None:
    models = world.models()
    with Store(world.state_dir) as store:
        lifecycle = Lifecycle(store, world.trust, models)  # type: ignore[arg-type]  # the double
        lifecycle.restore()
        lifecycle.resume()
        change(lifecycle)


def _unique(states: List[Contents]) -> List[Contents]:
    """Drop repeated states; content below ``temporary`` is deleted at the start and makes no difference."""
    kept: Dict[Any, Contents] = {}
    for state in states:
        lasting = {k: v for k, v in state.items() if v is None or not k.startswith("temporary/")}
        kept[frozenset(lasting.items())] = state
    return list(kept.values())


def _rebuilt(world: World, state: Contents) -> Path:
    path = world.root / f"crash{next(world.counter)}"
    rebuild(state, path)
    return path
