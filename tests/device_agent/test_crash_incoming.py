"""Bundles that arrive in chunks or from a registry: power cuts and failing disks on their way in."""

from __future__ import annotations

import asyncio
import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Iterator

import pytest

from crash_kit import Bring, World, crash_states, fail_at_every_step, states_without
from device_agent import archive
from device_agent.errors import AgentError
from device_agent.follow import record
from device_agent.follow.follower import Follower, work_directory
from device_agent.follow.settings import Follow
from device_agent.lifecycle import Lifecycle
from device_agent.metrics import Metrics
from device_agent.transfer import offer
from device_agent.transfer.incoming import Incoming
from device_agent.transfer.session import Session
from registry_kit import Registry, needs_registry
from transfer_kit import cut, missing_data


@pytest.fixture
def world(in_memory: Path) -> World:
    """A device that serves ``old``."""
    made = World(in_memory)
    made.install("old")
    return made


# In chunks


def deliver(world: World, lifecycle: Lifecycle, name: str) -> None:
    """Bring a bundle as ``edgekit deploy`` does: offer it, send what is missing, have it installed."""
    asyncio.run(_deliver(world.bundle(name), lifecycle))


async def _deliver(bundle: Path, lifecycle: Lifecycle) -> None:
    head = archive.read_head(bundle)
    signature = head.signature or b""
    listed = offer.encode(cut(bundle, head.manifest))
    sizes = {"manifest": head.manifest_bytes, "signature": signature, "chunks": listed}
    line = asyncio.StreamReader()
    with ThreadPoolExecutor(1) as pool:
        session = Session(Incoming(lifecycle), pool, line)
        line.feed_data(b"".join(sizes.values()))
        offered = await session.offer({f"{key}_bytes": len(data) for key, data in sizes.items()})
        line.feed_data(missing_data(bundle, offered["missing"]))
        await session.receive(lambda progress: None)

        async def install(path: str) -> Any:
            return await asyncio.get_running_loop().run_in_executor(None, lifecycle.install, Path(path))

        await session.install(install)
        session.close()


def _check(world: World, state_dir: Path, *allowed: str) -> str:
    """Start on what is left, and have the same bundle delivered; return what served."""
    found = world.check_start(state_dir, [world.digests[name] for name in allowed], deliver)
    assert not list((state_dir / "incoming" / "chunks").iterdir())
    return next(name for name in allowed if world.digests[name] == found)


def test_a_power_cut_while_an_offered_bundle_moves_in(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is left of a transfer and its installation, one whole version serves; the offer is taken."""
    run = lambda: world.run(lambda lifecycle: deliver(world, lifecycle, "new"))  # noqa: E731
    states = crash_states(monkeypatch, world.state_dir, run)
    seen = {_check(world, world.rebuilt(state), "old", "new") for state in states.during}
    assert seen == {"old", "new"}
    for state in states.finished:
        _check(world, world.rebuilt(state), "new")
    states.say("offered bundle")


@pytest.mark.parametrize("broken", ["_sync_directory", "_sync_file"])
def test_the_harness_finds_a_missing_sync(world: World, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    """If what was received were not synced before it becomes a version, the test above would notice."""
    run = lambda: world.run(lambda lifecycle: deliver(world, lifecycle, "new"))  # noqa: E731
    failures = 0
    for state in states_without(monkeypatch, world.state_dir, broken, run):
        try:
            _check(world, world.rebuilt(state), "new")
        except (AssertionError, AgentError):
            failures += 1
    assert failures > 0


@pytest.mark.parametrize(("reason", "lasting"), [(errno.ENOSPC, False), (errno.EROFS, True)])
def test_a_failing_disk_costs_the_transfer_and_nothing_else(
    world: World, monkeypatch: pytest.MonkeyPatch, reason: int, lasting: bool
) -> None:
    """A disk that fills up or turns read-only, while chunks arrive or move in, leaves the old version."""
    steps = fail_at_every_step(world, monkeypatch, reason, lasting, deliver)
    assert steps > 30
    print(f"offered bundle, {os.strerror(reason)}: {steps} steps failed, 0 violations")


# From a registry


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A real registry."""
    started = Registry(tmp_path_factory.mktemp("registry") / "files")
    yield started
    started.stop()


def follower_of(registry: Registry, name: str) -> Bring:
    """Brings a version as a follower does, in one turn, whose directory lies beside the store's."""
    settings = Follow(reference=f"oci://{registry.host}/{name}:stable", interval_s=100.0)

    def turn(world: World, lifecycle: Lifecycle, name: str) -> None:
        state_dir = lifecycle.incoming.parents[1]
        Follower("demo", settings, state_dir, lifecycle, Metrics().of_follower("demo")).turn()
        assert not work_directory(state_dir, "demo").exists()
        assert record.read(state_dir, "demo", settings.reference).outcome == "installed"

    return turn


@needs_registry
def test_a_power_cut_while_a_followed_version_comes(
    world: World, monkeypatch: pytest.MonkeyPatch, registry: Registry
) -> None:
    """Whatever is left of a download and its installation, the next look at the tag installs it."""
    registry.push(world.bundle("new"), "models/crash")
    follow = follower_of(registry, "models/crash")
    run = lambda: world.run(lambda lifecycle: follow(world, lifecycle, "new"))  # noqa: E731
    states = crash_states(monkeypatch, world.state_dir, run, beside="incoming/follow")
    allowed = [world.digests[name] for name in ("old", "new")]
    seen = {world.check_start(world.rebuilt(state), allowed, follow) for state in states.during}
    assert seen == set(allowed)
    for state in states.finished:
        assert world.check_start(world.rebuilt(state), allowed, follow) == world.digests["new"]
    states.say("followed version")
