"""What follows each state of an update: an error, a power cut, a step that takes too long.

``TABLE`` is the specification; docs/lifecycle.md prints it, and a test holds the two together.
"""

from __future__ import annotations

import asyncio
import shutil
import threading
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

import pytest

from device_agent import archive, journal
from device_agent.bounded import Timeouts
from device_agent.errors import AgentError, Refused
from device_agent.journal import MAX_ATTEMPTS, STATES
from device_agent.lifecycle import Lifecycle
from device_agent.signature import Trust
from device_agent.store import Store
from storage_kit import FakeModels, make_key, sign_bundle, signed_bundle

NO_TRACE = "old; no trace"
OLD = "old; reason kept"
AGAIN = "new, on probation again"
NEW = "new"
NEVER = "-"  # the step only computes, or writes a small file

TABLE: Dict[str, Dict[str, str]] = {
    "(nothing)": {"error": NO_TRACE, "power cut": NO_TRACE, "timeout": NO_TRACE},
    "received": {"error": NO_TRACE, "power cut": NO_TRACE, "timeout": NEVER},
    "verified": {"error": OLD, "power cut": OLD, "timeout": OLD},
    "staged": {"error": OLD, "power cut": OLD, "timeout": OLD},
    "prepared": {"error": OLD, "power cut": OLD, "timeout": NEVER},
    "selftested": {"error": OLD, "power cut": OLD, "timeout": OLD},
    "switched": {"error": OLD, "power cut": AGAIN, "timeout": NEVER},
    "probation": {"error": OLD, "power cut": AGAIN, "timeout": OLD},
    "probation again": {"error": OLD, "power cut": OLD, "timeout": OLD},
    "committed": {"error": NEW, "power cut": NEW, "timeout": NEW},
}
EVENTS = ("error", "power cut", "timeout")

SHORT = Timeouts(stage_s=0.2, prepare_s=0.2, drain_s=0.2)
_error = Refused("it failed", "the test says so", "nothing")


class Device:
    """A device that serves version 1, and a bundle of version 2."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.trust = Trust(root / "keys")
        key = make_key(root / "keys")
        self.old = signed_bundle(root / "1", key, version=1).digest
        self.new = signed_bundle(root / "2", key, version=2).digest
        self.hang = threading.Event()  # set: what hangs may end
        self.open(root / "state")
        self.lifecycle.install(root / "1")

    def open(self, state_dir: Path) -> None:
        """Start on a disk, with nothing in memory."""
        self.models = FakeModels()
        self.store = Store(state_dir)
        self.lifecycle = Lifecycle(self.store, self.trust, self.models, SHORT)  # type: ignore[arg-type]  # the double
        self.lifecycle.restore()

    def install(self, on_state: Optional[Callable[[str], None]] = None) -> None:
        """Install version 2."""
        self.lifecycle.install(self.root / "2", on_state=on_state)

    def cut_power_at(self, state: str) -> None:
        """Start on what the disk held when the update had just reached ``state``."""
        copy = self.root / "cut"

        def on_state(reached: str) -> None:
            if reached == state:
                shutil.copytree(str(self.root / "state"), str(copy))

        self.install(on_state)
        self.restart(copy)

    def restart(self, state_dir: Optional[Path] = None) -> None:
        """Start again without an orderly stop, on this disk or on another."""
        self.store.close()
        self.open(state_dir or self.root / "state")

    def outcome(self) -> str:
        """What followed, in the words of the table."""
        serving = self.models.get("demo")
        assert serving is not None
        state, entry = self.store.state("demo"), self.store.journal("demo") or {}
        assert state.active == serving.digest
        if serving.digest == self.new:
            return NEW if self.new in state.committed else AGAIN
        assert [version.digest for version in self.store.list()] == [self.old]
        if entry.get("digest") == self.old:
            return NO_TRACE
        assert entry["failure"]["why"]
        return OLD


@pytest.fixture(name="device")
def _device(tmp_path: Path) -> Iterator[Device]:
    made = Device(tmp_path)
    yield made
    made.hang.set()
    made.store.close()


def _fail_journal_at(device: Device, patch: pytest.MonkeyPatch, state: str) -> None:
    original = device.store.set_journal

    def set_journal(name: str, entry: Dict[str, Any]) -> None:
        if entry["state"] == state and not entry["failure"]:
            raise _error
        original(name, entry)

    patch.setattr(device.store, "set_journal", set_journal)


def _raise(*arguments: Any, **options: Any) -> Any:
    raise _error


def _break(device: Device, patch: pytest.MonkeyPatch, state: str) -> None:
    """Make the step that follows ``state`` fail."""
    if state == "(nothing)":
        (device.root / "2" / "manifest.json").write_bytes(b"{}")
    elif state == "received":
        sign_bundle(device.root / "2", make_key(None))
    elif state == "verified":
        (device.root / "2" / "model.onnx").write_bytes(b"other")
    elif state == "staged":
        device.models.broken.append(device.new)
    elif state == "prepared":
        _fail_journal_at(device, patch, "selftested")
    elif state == "selftested":
        patch.setattr(device.models, "switch", _fail_for(device.new, device.models.switch))
    elif state == "switched":
        _fail_journal_at(device, patch, "probation")
    elif state == "probation":
        device.models.unhealthy.append(device.new)
    else:
        patch.setattr(device.store, "collect", _raise)


def _fail_for(digest: str, original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def switch(loaded: Any) -> Any:
        return _raise() if loaded.digest == digest else original(loaded)

    return switch


def _hang(device: Device, patch: pytest.MonkeyPatch, state: str) -> None:
    """Make the step that follows ``state`` take for ever."""

    def wait(*arguments: Any) -> Any:
        device.hang.wait(30)
        raise _error

    async def never(loaded: Any) -> None:
        await asyncio.sleep(30)

    if state == "(nothing)":
        read_head = archive.read_head
        patch.setattr(archive, "read_head", lambda path: wait() if path.name == "2" else read_head(path))
    elif state == "verified":
        patch.setattr(archive, "unpack", wait)
    elif state == "staged":
        patch.setattr(device.models, "prepare", wait)
    elif state == "selftested":
        device.models.late_shadow = True
    elif state == "probation":
        device.models.late = True
    else:
        patch.setattr(device.models, "retire", never)


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("state", [state for state in TABLE if state != "probation again"])
def test_what_follows_each_state(
    device: Device, monkeypatch: pytest.MonkeyPatch, state: str, event: str
) -> None:
    """Whatever happens in whichever state, the device serves what the table says, also after a restart."""
    expected = TABLE[state][event]
    if expected == NEVER:
        return
    if event == "power cut" and state == "(nothing)":
        device.restart()
    elif event == "power cut":
        device.cut_power_at(state)
    else:
        with monkeypatch.context() as patch:
            (_break if event == "error" else _hang)(device, patch, state)
            if expected == NEW:
                device.install()
            else:
                with pytest.raises(AgentError, match="timeout" if event == "timeout" else None):
                    device.install()
        device.hang.set()
    assert device.outcome() == expected
    if expected == AGAIN:
        device.lifecycle.resume()
        assert device.outcome() == NEW
    else:
        device.restart(device.root / "cut" if (device.root / "cut").exists() else None)
        device.lifecycle.resume()
        assert device.outcome() == expected


@pytest.mark.parametrize("event", EVENTS)
def test_what_follows_a_probation_that_goes_on_after_a_power_cut(device: Device, event: str) -> None:
    """A start goes on with the probation once; a second end of the agent, or a verdict, ends it."""
    device.cut_power_at("probation")
    assert device.outcome() == AGAIN
    if event == "power cut":
        device.restart(device.root / "cut")
    else:
        device.models.unhealthy, device.models.late = [device.new], event == "timeout"
        device.lifecycle.resume()
    assert device.outcome() == TABLE["probation again"][event] == OLD
    device.restart(device.root / "cut")
    assert device.outcome() == OLD


def test_an_orderly_stop_counts_no_attempt(device: Device) -> None:
    """An agent that is stopped in a probation goes on with it, however often, from where it was."""
    watch = device.models.watch
    for number in range(MAX_ATTEMPTS + 2):
        device.models.watch = lambda *versions, **options: _Stopped(options["seen_s"])  # type: ignore[method-assign]
        if number == 0:
            with pytest.raises(Refused, match="the agent stops"):
                device.install()
        else:
            device.lifecycle.resume()
        entry = device.store.journal("demo") or {}
        assert (entry["state"], entry["attempts"], entry["seen_s"]) == ("probation", 0, number + 1.0)
        device.restart()
        assert device.outcome() == AGAIN
    device.models.watch = watch  # type: ignore[method-assign]
    device.lifecycle.resume()
    assert device.outcome() == NEW


class _Stopped:
    """A probation that ends after one more second, since the agent stops."""

    def __init__(self, seen_s: float) -> None:
        self.seen_s = seen_s + 1.0

    async def run(self) -> None:
        """Say so."""
        from device_agent.probation.watch import Interrupted

        raise Interrupted("the agent stops", "it was on probation", "it goes on")


def test_a_first_version_that_ends_the_agent_twice_is_given_up(tmp_path: Path) -> None:
    """With nothing to return to, the agent comes up empty and can be updated, instead of ending for ever."""
    device = Device(tmp_path)
    device.store.close()
    shutil.rmtree(str(tmp_path / "state"))
    device.open(tmp_path / "state")
    device.cut_power_at("probation")
    device.restart(tmp_path / "cut")
    assert (device.models.get("demo"), device.store.active("demo"), device.store.list()) == (None, None, [])
    device.install()
    assert device.outcome() == NEW
    device.store.close()


def test_the_table_names_every_state() -> None:
    """Nothing that an update can be in is left unsaid."""
    assert set(STATES) < set(TABLE)
    assert all(tuple(row) == EVENTS for row in TABLE.values())


def _rendered() -> List[str]:
    lines = ["| after | error | power cut, at the next start | timeout |", "|---|---|---|---|"]
    return lines + [
        f"| {state} | {' | '.join(row[event] for event in EVENTS)} |" for state, row in TABLE.items()
    ]


def test_the_documentation_prints_the_table() -> None:
    """docs/lifecycle.md says what this module proves."""
    page = Path(__file__).parents[2] / "docs" / "lifecycle.md"
    assert "\n".join(_rendered()) in page.read_text(encoding="utf-8")


def test_how_operations_ended_is_kept(device: Device) -> None:
    """``status`` tells the end of each of the last operations and its reason; the oldest are forgotten."""
    device.models.unhealthy.append(device.new)
    for _ in range(journal.HISTORY + 3):
        with pytest.raises(Refused):
            device.install()
    device.models.unhealthy.clear()
    device.install()
    (status,) = device.lifecycle.status()
    assert (status["last_operation"]["state"], status["last_operation"]["failure"]) == ("committed", None)
    assert len(status["history"]) == journal.HISTORY
    assert {entry["failure"]["why"] for entry in status["history"]} == {"all requests failed"}
    assert all(entry["state"] == "probation" and entry["ended"].endswith("Z") for entry in status["history"])
