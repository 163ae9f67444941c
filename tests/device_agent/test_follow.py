"""An agent that follows a tag: what it installs, when, and what it never does twice."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_testing import AgentProcess, linear_bundle
from device_agent import cli, config
from device_agent.errors import BadInput, Refused
from device_agent.follow import backoff, record, windows
from device_agent.follow.credential_files import credentials
from device_agent.follow.follower import Follower, work_directory
from device_agent.follow.followers import Followers
from device_agent.follow.settings import Follow
from device_agent.metrics import Metrics
from device_agent.model_state import ModelState
from device_agent.oci.digests import digest_of
from device_agent.probation.watch import Interrupted
from device_agent.store import Store
from registry_kit import Front, Registry, TokenService, answer, needs_registry
from storage_kit import make_bundle, make_key, sign_bundle
from test_lifecycle import Device

WEIGHTS = bytes(range(256)) * 400
WEIGHTS_DIGEST = digest_of(WEIGHTS)

pytestmark = needs_registry


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """One real registry; each test has a repository of its own."""
    started = Registry(tmp_path_factory.mktemp("registry") / "files")
    yield started
    started.stop()


class Fleet:
    """A device, and a registry whose tag it follows.

    Attributes:
        device: a device with a trusted key and a double of the models.
        front: what stands before the registry.
    """

    def __init__(self, root: Path, real: Registry, repository: str) -> None:
        self.device = Device(root)
        self.front = Front(real.host)
        self._root = root
        self._real = real
        self._repository = repository
        self.metrics = Metrics()
        self.follow = Follow(reference=f"oci://{self.front.host}/{repository}:stable", interval_s=100.0)

    def push(self, version: int, extra: bytes = WEIGHTS, **changes: Any) -> str:
        """Push a signed bundle to the tag; return its digest."""
        directory = self._root / f"pushed-{version}-{len(extra)}"
        if not directory.exists():
            make_bundle(directory, {"weights.bin": extra}, version=version, **changes)
            sign_bundle(directory, self.device.key)
        self._real.push(directory, self._repository)
        return digest_of((directory / "manifest.json").read_bytes()).partition(":")[2]

    def follower(self, **changes: Any) -> Follower:
        """A follower as it is after a start of the agent; it looks when it is told to."""
        settings = Follow(**{**vars(self.follow), **changes})
        state = self.device.root / "state"
        return Follower("demo", settings, state, self.device.lifecycle, self.metrics.of_follower("demo"))

    def blobs(self) -> List[str]:
        """Digests of the blobs that were asked for."""
        return [path.rpartition("/")[2] for path in self.front.paths() if "/blobs/" in path]

    def close(self) -> None:
        """Free the ports and the store."""
        self.front.stop()
        self.device.store.close()


@pytest.fixture
def fleet(tmp_path: Path, real: Registry, request: pytest.FixtureRequest) -> Iterator[Fleet]:
    """A device and the tag that it follows."""
    name = "".join(letter for letter in request.node.name.lower() if letter.isalnum())
    made = Fleet(tmp_path, real, f"models/{name}")
    yield made
    made.close()


# Installing


def test_what_the_tag_points_at_is_installed_once(fleet: Fleet) -> None:
    """A new bundle is fetched and installed; looking again asks for nothing but the tag."""
    digest = fleet.push(1)
    follower = fleet.follower()
    assert 90 <= follower.turn() <= 110
    assert fleet.device.serving == digest
    described = follower.describe()
    assert (described["phase"], described["outcome"], described["bundle"]) == (
        "installed",
        "installed",
        digest,
    )
    before = len(fleet.front.seen)
    follower.turn()
    fleet.follower().turn()  # and after a restart
    assert [method for method, _, _ in fleet.front.seen[before:]] == ["HEAD", "HEAD"]
    assert not work_directory(fleet.device.root / "state", "demo").exists()
    counters = fleet.metrics.of_follower("demo")
    assert counters.up_to_date
    assert counters.failures == 0
    assert abs(counters.last_success_s - time.time()) < 60


def test_only_what_changed_is_fetched(fleet: Fleet) -> None:
    """Of a new version, the files that an installed version has are not fetched again."""
    fleet.push(1)
    fleet.follower().turn()
    before = len(fleet.blobs())
    digest = fleet.push(2)
    fleet.follower().turn()
    assert fleet.device.serving == digest
    assert len(fleet.blobs()[before:]) == 2  # manifest and signature
    assert WEIGHTS_DIGEST not in fleet.blobs()[before:]


def test_a_download_goes_on_after_a_restart(fleet: Fleet) -> None:
    """A line that is cut, and an agent that is restarted, cost not one percent of the bytes."""
    digest = fleet.push(1)
    for kept in (20_000, 30_000, 40_000):
        fleet.front.cut_after_bytes = [kept]
        follower = fleet.follower()
        follower.turn()
        described = follower.describe()
        assert described["phase"] == "failing"
        assert "came only in part" in described["last_error"]["what"]
    fleet.follower().turn()
    assert fleet.device.serving == digest
    assert fleet.front.sent_bytes[WEIGHTS_DIGEST] <= len(WEIGHTS) * 1.01


def test_a_pinned_digest_is_followed_without_asking_twice(fleet: Fleet, real: Registry) -> None:
    """A reference by digest is installed, and from then on the registry is left alone."""
    digest = fleet.push(1)
    directory = fleet.device.root / f"pushed-1-{len(WEIGHTS)}"
    artifact = real.push(directory, fleet.follow.reference.split("/", 3)[3].split(":")[0])
    pinned = fleet.follow.reference.rpartition(":")[0] + "@" + artifact
    fleet.follower(reference=pinned).turn()
    assert fleet.device.serving == digest
    before = len(fleet.front.seen)
    fleet.follower(reference=pinned).turn()
    assert len(fleet.front.seen) == before


def test_what_serves_already_is_not_installed_again(fleet: Fleet) -> None:
    """A bundle that came another way is taken note of, and its large files are not fetched."""
    digest = fleet.push(1)
    fleet.device.lifecycle.install(fleet.device.root / f"pushed-1-{len(WEIGHTS)}")
    fleet.device.models.events.clear()
    follower = fleet.follower()
    follower.turn()
    assert fleet.device.models.events == []
    assert follower.describe()["outcome"] == "installed"
    assert WEIGHTS_DIGEST not in fleet.blobs()
    assert fleet.device.serving == digest


# Refusing


def test_a_bundle_that_failed_is_not_tried_again_until_the_tag_moves(fleet: Fleet) -> None:
    """Neither looking again nor a restart tries a refused bundle again; the next one is taken."""
    old = fleet.push(1)
    fleet.follower().turn()
    bad = fleet.push(2)
    fleet.device.models.broken.append(bad)
    follower = fleet.follower()
    follower.turn()
    described = follower.describe()
    assert described["outcome"] == "refused"
    assert "golden outputs" in described["why"]
    assert fleet.device.serving == old
    assert not fleet.metrics.of_follower("demo").up_to_date
    fleet.device.models.events.clear()
    before = len(fleet.blobs())
    follower.turn()
    again = fleet.follower()
    again.turn()
    assert again.describe()["phase"] == "refused"
    assert (fleet.device.models.events, fleet.blobs()[before:]) == ([], [])
    good = fleet.push(3)
    again.turn()
    assert fleet.device.serving == good


def test_a_local_rollback_stays(fleet: Fleet) -> None:
    """What a person at the device rolled back does not come back before the tag moves."""
    old = fleet.push(1)
    fleet.follower().turn()
    fleet.push(2)
    fleet.follower().turn()
    fleet.device.lifecycle.rollback("demo")
    fleet.follower().turn()
    assert fleet.device.serving == old


def test_an_update_that_ends_the_agent_is_given_up(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation that ends the process each time is begun three times, not for ever."""

    class PowerCut(BaseException):
        pass

    def end(*_: object, **__: object) -> None:
        raise PowerCut

    fleet.push(1)
    monkeypatch.setattr(fleet.device.lifecycle, "install", end)
    for _ in range(record.MAX_TRIES):
        with pytest.raises(PowerCut):
            fleet.follower().turn()
    follower = fleet.follower()
    follower.turn()
    assert follower.describe()["outcome"] == "refused"
    assert "ended 3 times" in follower.describe()["why"]


def test_one_power_cut_costs_no_update(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an interrupted installation the next start installs, from what was fetched."""

    class PowerCut(BaseException):
        pass

    def end(*_: object, **__: object) -> None:
        raise PowerCut

    digest = fleet.push(1)
    with monkeypatch.context() as patched:
        patched.setattr(fleet.device.lifecycle, "install", end)
        with pytest.raises(PowerCut):
            fleet.follower().turn()
    fetched = fleet.front.sent_bytes[WEIGHTS_DIGEST]
    fleet.follower().turn()
    assert fleet.device.serving == digest
    assert fleet.front.sent_bytes[WEIGHTS_DIGEST] == fetched


def _stop_in_probation(follower: Follower) -> Callable[..., None]:
    """An installation that the end of the agent interrupts while the new version proves itself."""

    def install(bundle: Path, on_state: Callable[[str], None]) -> None:
        for state in ("received", "verified", "staged", "prepared", "selftested", "switched", "probation"):
            on_state(state)
        follower.stop()
        raise Interrupted("the probation was interrupted", "the agent stops", "it goes on at its start")

    return install


@pytest.mark.parametrize("holds", [True, False])
def test_a_probation_that_a_stop_interrupts_is_waited_for(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, holds: bool
) -> None:
    """A stop in the middle is no verdict; the next start's verdict is taken over, whichever it is."""
    digest = fleet.push(1)
    store, lifecycle = fleet.device.store, fleet.device.lifecycle
    with monkeypatch.context() as patched:
        stopping = fleet.follower()
        patched.setattr(lifecycle, "install", _stop_in_probation(stopping))
        stopping.turn()
        assert stopping.describe()["outcome"] is None
    before = ModelState()
    store.set_state("demo", before.activated(digest))
    follower = fleet.follower()
    follower.turn()
    assert follower.describe()["phase"] == "on probation"
    if holds:
        store.set_state("demo", before)
        lifecycle.install(fleet.device.root / f"pushed-1-{len(WEIGHTS)}")
    else:
        store.set_state("demo", before)
        failure = {"what": "it was too slow", "why": "p99", "fix": "tune it"}
        store.set_journal("demo", {"digest": digest, "state": "probation", "failure": failure})
    follower.turn()
    assert follower.describe()["outcome"] == ("installed" if holds else "refused")
    assert follower.describe()["why"] == (None if holds else "it was too slow: p99")


def test_a_full_disk_passes(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """No space is found out before a large blob is asked for, and tried again when there is some."""
    digest = fleet.push(1)

    def no_space(head: Any, beside_bytes: int = 0) -> None:
        raise Refused("there is no space", f"{beside_bytes} bytes beside", "remove something")

    with monkeypatch.context() as patched:
        patched.setattr(fleet.device.store, "require_space", no_space)
        follower = fleet.follower()
        follower.turn()
    error = follower.describe()["last_error"]
    assert error["what"] == "there is no space"
    assert int(error["why"].split()[0]) > len(WEIGHTS)
    assert WEIGHTS_DIGEST not in fleet.blobs()
    follower.turn()
    assert fleet.device.serving == digest
    assert follower.describe()["last_error"] is None


@pytest.mark.parametrize(
    ("spoil", "fragment"),
    [
        (lambda fleet, path: (path / "model.sig").unlink(), "not signed"),
        (lambda fleet, path: sign_bundle(path, make_key(None)), "unknown key"),
    ],
    ids=["unsigned", "another key"],
)
def test_trust_comes_before_the_large_files(
    fleet: Fleet, spoil: Callable[[Fleet, Path], object], fragment: str
) -> None:
    """A bundle that nobody vouches for is refused before its files are fetched."""
    fleet.push(1)
    directory = fleet.device.root / f"pushed-1-{len(WEIGHTS)}"
    spoil(fleet, directory)
    fleet.push(1)
    follower = fleet.follower()
    follower.turn()
    assert fragment in follower.describe()["last_error"]["what"]
    assert WEIGHTS_DIGEST not in fleet.blobs()
    sign_bundle(directory, fleet.device.key)
    digest = fleet.push(1)
    follower.turn()
    assert fleet.device.serving == digest


def test_an_older_version_is_refused(fleet: Fleet) -> None:
    """A tag that is moved back to a version below what was committed brings nothing."""
    new = fleet.push(2)
    fleet.follower().turn()
    fleet.push(1, extra=WEIGHTS[::-1])
    follower = fleet.follower()
    follower.turn()
    assert fleet.device.serving == new
    assert follower.describe()["phase"] == "failing"
    assert digest_of(WEIGHTS[::-1]) not in fleet.blobs()


def test_another_model_is_not_taken(fleet: Fleet) -> None:
    """A tag that suddenly holds another signed model changes nothing on the device."""
    fleet.push(1, name="other")
    follower = fleet.follower()
    follower.turn()
    assert "holds another model" in follower.describe()["last_error"]["what"]
    assert fleet.device.store.names() == []


# Windows, failures, stopping


def _window(offset_h: int) -> str:
    hour = (time.gmtime().tm_hour + offset_h) % 24
    return f"{hour:02}:00-{(hour + 2) % 24:02}:00"


def test_a_window_holds_the_installation_not_the_download(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outside of the window the bundle is fetched and kept; it is installed once the window opens."""
    digest = fleet.push(1)
    follower = fleet.follower(windows=(_window(5),), windows_utc=True)
    assert follower.turn() <= 110
    assert follower.describe()["phase"] == "waiting for a maintenance window"
    assert fleet.device.serving is None
    assert fleet.blobs().count(WEIGHTS_DIGEST) == 1
    follower.turn()
    assert fleet.device.serving is None
    now_s = time.time()
    monkeypatch.setattr(time, "gmtime", lambda s=None, real=time.gmtime: real((s or now_s) + 6 * 3600))
    follower.turn()
    assert fleet.device.serving == digest
    assert fleet.blobs().count(WEIGHTS_DIGEST) == 1


def test_an_open_window_holds_nothing(fleet: Fleet) -> None:
    """Inside of the window an update is installed at once."""
    digest = fleet.push(1)
    fleet.follower(windows=(_window(5), _window(-1)), windows_utc=True).turn()
    assert fleet.device.serving == digest


def test_a_registry_that_is_away_is_waited_for(fleet: Fleet) -> None:
    """Failures are counted, told and waited out, longer each time; then everything is as it was."""
    fleet.front.rules.append(lambda handler: answer(handler, 503, b"", {"Retry-After": "40"}))
    follower = fleet.follower()
    waits = [follower.turn() for _ in range(5)]
    assert all(40 < wait_s <= 40 + backoff.FIRST_S * 2**number for number, wait_s in enumerate(waits))
    described = follower.describe()
    assert (described["phase"], described["failures"]) == ("failing", 5)
    assert described["last_success"] is None
    assert described["last_error"]["at"].endswith("Z")
    assert fleet.metrics.of_follower("demo").failures == 5
    fleet.front.rules.clear()
    digest = fleet.push(1)
    assert 90 <= follower.turn() <= 110
    assert fleet.device.serving == digest
    assert follower.describe()["failures"] == 0


def test_nothing_ends_a_follower(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that nobody foresaw is told in status, and there is a next time."""
    digest = fleet.push(1)
    follower = fleet.follower()
    with monkeypatch.context() as patched:
        patched.setattr(follower, "_open", lambda: 1 / 0)
        assert follower.turn() > 0
    assert "ZeroDivisionError" in follower.describe()["last_error"]["why"]
    follower.turn()
    assert fleet.device.serving == digest


def test_a_disk_that_cannot_be_written_ends_no_follower(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the record cannot be kept nothing is installed: it could be installed for ever."""

    def read_only(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    digest = fleet.push(1)
    follower = fleet.follower()
    with monkeypatch.context() as patched:
        patched.setattr(record, "write", read_only)
        follower.turn()
    assert "Read-only" in follower.describe()["last_error"]["why"]
    assert fleet.device.serving is None
    follower.turn()
    assert fleet.device.serving == digest


def test_followers_stop_at_once(fleet: Fleet) -> None:
    """A stopping agent waits neither for the next look nor for a download."""
    fleet.front.rules.append(lambda handler: time.sleep(0.5) or False)  # type: ignore[func-returns-value]
    state = fleet.device.root / "state"
    (state / "incoming" / "follow" / "gone").mkdir(parents=True)
    settings = Follow(**{**vars(fleet.follow), "interval_s": 0.01})
    followers = Followers({"demo": settings}, state, fleet.device.lifecycle, fleet.metrics)
    assert not (state / "incoming" / "follow" / "gone").exists()
    followers.start()
    deadline_s = time.monotonic() + 20
    while not fleet.front.seen and time.monotonic() < deadline_s:
        time.sleep(0.01)
    followers.stop()
    followers.join(10)
    assert fleet.front.seen
    assert list(followers.describe()) == ["demo"]


def test_credentials_come_from_files(fleet: Fleet, tmp_path: Path) -> None:
    """User and password get the token; a file that others can read is refused, and nothing is sent."""
    service = TokenService(fleet.front, "ann", "s3cret")
    digest = fleet.push(1)
    secret = tmp_path / "secret"
    secret.write_text("s3cret\n")
    secret.chmod(0o644)
    follower = fleet.follower(username="ann", password_file=str(secret))
    follower.turn()
    assert "lets others" in follower.describe()["last_error"]["why"]
    assert fleet.front.seen == []
    secret.chmod(0o600)
    follower.turn()
    assert fleet.device.serving == digest
    assert len(service.asked) == 1


# Pure parts


@given(st.integers(1, 10**9), st.floats(0, 1), st.floats(0, 86_400))
def test_the_wait_after_failures_is_bounded(failures: int, chance: float, asked_s: float) -> None:
    """However long it goes on, the wait is from a second to half an hour, on top of what was asked for."""
    wait_s = backoff.after_failures_s(failures, chance, asked_s)
    assert asked_s + backoff.SHORTEST_S <= wait_s <= asked_s + backoff.LONGEST_S


@given(st.integers(1, 100), st.floats(0, 1))
def test_the_wait_grows_and_spreads(failures: int, chance: float) -> None:
    """Each failure at most doubles the wait, and all of it down to the shortest is open to chance."""
    first, second = (backoff.after_failures_s(failures + more, chance) for more in (0, 1))
    assert first <= second <= 2 * first
    assert backoff.after_failures_s(failures, 0.0) == backoff.SHORTEST_S
    assert backoff.after_failures_s(failures, 1.0) == min(
        backoff.LONGEST_S, backoff.FIRST_S * 2.0 ** (failures - 1)
    )


@given(st.floats(0.1, 86_400), st.floats(0, 1))
def test_looks_are_spread(interval_s: float, chance: float) -> None:
    """No two devices look in step: the interval varies by a tenth, the first look comes at any time."""
    assert 0.89 * interval_s <= backoff.next_look_s(interval_s, chance) <= 1.11 * interval_s
    assert 0 <= backoff.first_look_s(interval_s, chance) <= min(interval_s, 60.0)


@given(st.integers(0, 1439), st.integers(0, 1439), st.integers(0, windows.DAY_S - 1))
def test_windows_hold_and_open(start: int, end: int, second: int) -> None:
    """A window that is closed opens after exactly the wait, over midnight too; an empty one is none."""
    text = f"{start // 60:02}:{start % 60:02}-{end // 60:02}:{end % 60:02}"
    window = windows.parse(text)
    if start == end:
        assert window is None
        return
    assert window is not None
    wait_s = windows.wait_s([window], second)
    if start < end:
        assert window.holds(second) == (start * 60 <= second < end * 60)
    assert (wait_s == 0) == window.holds(second)
    assert window.holds((second + wait_s) % windows.DAY_S)
    if wait_s:
        assert not window.holds((second + wait_s - 1) % windows.DAY_S)


@pytest.mark.parametrize("text", ["", "2:00-4:00", "24:00-01:00", "02:60-03:00", "02:00", "02:00-04:00 "])
def test_what_is_no_window_is_none(text: str) -> None:
    """Only HH:MM-HH:MM is a window."""
    assert windows.parse(text) is None
    assert windows.wait_s([], 0) == 0


@given(
    st.builds(
        record.Record,
        reference=st.just("oci://h/n:t"),
        artifact=st.text(max_size=5),
        outcome=st.sampled_from(["", "installed", "refused"]),
        tries=st.integers(0, 3),
        why=st.text(max_size=20),
        changed_s=st.floats(0, 1e10),
    )
)
def test_a_record_reads_back(tmp_path_factory: pytest.TempPathFactory, kept: record.Record) -> None:
    """What was remembered is remembered; for another reference nothing is."""
    state = tmp_path_factory.getbasetemp() / "records"
    record.write(state, "demo", kept)
    assert record.read(state, "demo", "oci://h/n:t") == kept
    assert record.read(state, "demo", "oci://h/n:other") == record.Record(reference="oci://h/n:other")


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff", b'{"tries": "x"}', b'{"reference": 5}'])
def test_a_damaged_record_is_an_empty_one(tmp_path: Path, data: bytes) -> None:
    """A record that cannot be read costs a try, not the follower."""
    path = record.path_of(tmp_path, "demo")
    path.parent.mkdir()
    path.write_bytes(data)
    assert record.read(tmp_path, "demo", "oci://h/n:t") == record.Record(reference="oci://h/n:t")


@pytest.mark.parametrize(
    ("mode", "content", "fragment"),
    [
        (0o604, b"x", "lets others"),
        (0o660, b"x", "lets others"),
        (0o600, b"", "is empty"),
        (0o600, b"\xff", "cannot be read"),
        (0o600, b"two\nlines", "not one line"),
        (None, b"", "cannot be read"),
    ],
)
def test_secrets_are_held_to_their_files(tmp_path: Path, mode: Any, content: bytes, fragment: str) -> None:
    """A secret that others can read or change, or that is none, is refused with its reason."""
    path = tmp_path / "secret"
    if mode is not None:
        path.write_bytes(content)
        path.chmod(mode)
    with pytest.raises(BadInput) as caught:
        credentials(Follow(token_file=str(path)))
    assert fragment in str(caught.value)


def test_secrets_are_read(tmp_path: Path) -> None:
    """A token, or user and password, or nothing; group-readable is fine, and none of it is ever printed."""
    path = tmp_path / "secret"
    path.write_text("s3cret\n")
    path.chmod(0o640)
    token, password = (
        credentials(Follow(token_file=str(path))),
        credentials(Follow(username="ann", password_file=str(path))),
    )
    assert (token.bearer_token, password.username, password.password) == ("s3cret", "ann", "s3cret")
    assert "s3cret" not in repr(token) + repr(password)
    assert not credentials(Follow()).secret


GOOD = 'reference = "oci://registry.example.com/models/demo:stable"\n'


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("[follow.demo]", "follow.demo.reference"),
        ("[follow.demo]\nreference = 'registry.example.com/x:1'", "follow.demo.reference"),
        (f"[follow.demo]\n{GOOD}interval_s = 0", "follow.demo.interval_s"),
        (f"[follow.demo]\n{GOOD}windows = ['2-4']", "follow.demo.windows"),
        (f"[follow.demo]\n{GOOD}windows = '02:00-04:00'", "a list of strings"),
        (f"[follow.demo]\n{GOOD}windows = [2]", "a string"),
        (f"[follow.demo]\n{GOOD}username = 'ann'", "follow.demo.username"),
        (f"[follow.demo]\n{GOOD}username = 'a'\npassword_file = 'p'\ntoken_file = 't'", "token_file"),
        (f"[follow.'../x']\n{GOOD}", "follow.../x"),
        (f"[follow.demo]\n{GOOD}intervall_s = 3", "did you mean 'follow.demo.interval_s'"),
    ],
)
def test_wrong_settings_are_told(text: str, fragment: str) -> None:
    """A table that cannot be followed keeps the agent from starting, and says which key is wrong."""
    with pytest.raises(BadInput) as caught:
        config.parse(text, "agent.toml")
    assert fragment in str(caught.value)


def test_settings_are_read() -> None:
    """A table names the model, the tag and the windows; the rest has defaults."""
    loaded = config.parse(f"[follow.demo]\n{GOOD}windows = ['22:00-04:00']", "agent.toml")
    assert loaded.follow["demo"].windows == ("22:00-04:00",)
    assert loaded.follow["demo"].interval_s == 300.0


# The whole agent


def test_an_agent_follows_a_tag(
    start_agent: Callable[..., AgentProcess], real: Registry, tmp_path: Path
) -> None:
    """A real agent installs what is pushed to its tag, serves it, and shows it in status and metrics."""
    first, second = (linear_bundle(tmp_path / str(v), seed=v, version=v) for v in (1, 2))
    real.push(first.directory, "models/agent")
    agent = start_agent(
        settings=f'[follow.model]\nreference = "oci://{real.host}/models/agent:stable"\ninterval_s = 0.2\n'
    )
    _wait_until(lambda: _status(agent)["serving"] == first.digest)
    real.push(second.directory, "models/agent")
    _wait_until(lambda: _status(agent)["serving"] == second.digest)
    _wait_until(lambda: _status(agent)["follow"]["outcome"] == "installed")
    status = _status(agent)
    assert status["follow"]["bundle"] == second.digest
    assert status["follow"]["reference"] == f"oci://{real.host}/models/agent:stable"
    assert status["follow"]["last_success"]
    _, body = _metrics(agent)
    assert 'edgekit_follow_up_to_date{model="model"} 1.0' in body
    assert 'edgekit_follow_failures_total{model="model"} 0.0' in body
    assert agent.stop() == 0


def test_an_agent_that_does_not_run_is_asked_for_its_followers(
    fleet: Fleet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without an agent, `edgekit-agent status` shows what the followers left on disk."""
    bad = fleet.push(1)
    fleet.device.models.broken.append(bad)
    fleet.follower().turn()
    fleet.device.store.close()
    settings = tmp_path / "agent.toml"
    settings.write_text(
        f'state_dir = "{tmp_path / "state"}"\nkeys_dir = "{tmp_path / "keys"}"\n'
        f'control_socket = "{tmp_path / "none.sock"}"\n'
        f'[follow.demo]\nreference = "{fleet.follow.reference}"\n'
        '[follow.other]\nreference = "oci://registry.example.com/models/other:stable"\n'
    )
    assert cli.main(["status", "--config", str(settings)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "follows" in line]
    fleet.device.store = Store(tmp_path / "state")
    assert len(lines) == 2
    assert fleet.follow.reference in lines[0]
    assert "not running" in lines[0]
    assert "golden outputs" in lines[0]
    assert "last answer never" in lines[1]


def _wait_until(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 30
    while time.monotonic() < deadline_s:
        if holds():
            return
        time.sleep(0.05)
    raise AssertionError("it never came to hold")


def _status(agent: AgentProcess) -> Dict[str, Any]:
    from device_agent.server import control

    (model,) = control.request(agent.control, {"op": "status"}, lambda state: None)
    return dict(model)


def _metrics(agent: AgentProcess) -> Any:
    from registry_kit import request

    status, _, body = request(agent.metrics, "GET", "/metrics")
    return status, body.decode()
