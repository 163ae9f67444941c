"""Versions on disk, and which of them matter."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Iterator, List

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_agent import archive
from device_agent.errors import BadInput, Refused, TrustError
from device_agent.model_state import ModelState
from device_agent.store import Store
from storage_kit import FILES, make_bundle, make_key, sign_bundle


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """An open, empty store."""
    with Store(tmp_path / "state") as opened:
        yield opened


def _add(store: Store, directory: Path, **changes: object) -> str:
    head = make_bundle(directory, **changes)
    store.add(directory, head)
    return head.digest


_OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["activate", "commit", "rollback", "give up"]), st.sampled_from("abcd"))
)


@given(_OPERATIONS)
def test_no_sequence_of_operations_loses_what_serves(operations: List[str]) -> None:
    """The active version and the fallback always differ, and a fallback was always proven once."""
    state = ModelState()
    for operation, digest in operations:
        if operation == "activate":
            state = state.activated(digest)
            assert state.active == digest
        elif operation == "commit":
            state = state.with_commit()
            assert state.active is None or state.active in state.committed
        elif state.fallback is not None:
            state = (
                state.rolled_back()
                if operation == "rollback" and state.active in state.committed
                else state.given_up()
            )
        assert state.active is None or state.active != state.fallback
        assert state.fallback is None or state.fallback in state.committed
        assert len(set(state.committed)) == len(state.committed)


def test_an_unproven_version_does_not_become_the_fallback() -> None:
    """If a version is replaced before it was committed, the one before it stays the way back."""
    state = ModelState("good", None, ("good",)).activated("doubtful").activated("newer")
    assert (state.active, state.fallback) == ("newer", "good")


@pytest.mark.parametrize("form", ["directory", "file"])
def test_a_bundle_is_stored_whole(tmp_path: Path, store: Store, form: str) -> None:
    """Both forms end as the same directory, named by the digest, below the model's name."""
    head = make_bundle(tmp_path / "b")
    archive.pack(tmp_path / "b", tmp_path / "b.edgekit")
    assert store.add(tmp_path / ("b" if form == "directory" else "b.edgekit"), head)
    (version,) = store.list()
    assert (version.name, version.digest, version.active) == ("demo", head.digest, False)
    assert version.directory == tmp_path / "state" / "models" / "demo" / "versions" / head.digest
    archive.check_files(version.directory, head.manifest)
    assert version.describe()["version"] == 1


def test_the_state_survives_a_restart(tmp_path: Path) -> None:
    """What was active and fallback is so again when the store is opened the next time."""
    with Store(tmp_path / "state") as store:
        digests = [_add(store, tmp_path / str(i), version=i) for i in (1, 2)]
        state = ModelState().activated(digests[0]).with_commit().activated(digests[1]).with_commit()
        store.set_state("demo", state)
    with Store(tmp_path / "state") as store:
        assert store.state("demo") == state
        assert store.active("demo") == digests[1]
        assert {v.digest: (v.active, v.fallback) for v in store.list()} == {
            digests[0]: (False, True),
            digests[1]: (True, False),
        }


def test_adding_twice_copies_once_and_renews_the_signature(tmp_path: Path, store: Store) -> None:
    """A bundle that is there is not copied again; a new signature of it is taken over."""
    head = make_bundle(tmp_path / "b")
    assert store.add(tmp_path / "b", head)
    inode = (store.directory("demo", head.digest) / "model.onnx").stat().st_ino
    signed = sign_bundle(tmp_path / "b", make_key(None))
    assert not store.add(tmp_path / "b", signed)
    assert archive.read_head(store.directory("demo", head.digest)) == signed
    assert (store.directory("demo", head.digest) / "model.onnx").stat().st_ino == inode


def test_a_damaged_version_is_replaced(tmp_path: Path, store: Store) -> None:
    """Installing a bundle again repairs it if its files decayed."""
    head = make_bundle(tmp_path / "b")
    store.add(tmp_path / "b", head)
    (store.directory("demo", head.digest) / "model.onnx").write_bytes(b"rot")
    assert store.add(tmp_path / "b", head)
    archive.check_files(store.directory("demo", head.digest), head.manifest)


def test_a_tampered_bundle_leaves_nothing(tmp_path: Path, store: Store) -> None:
    """A bundle that fails while it is copied leaves neither a version nor temporary files."""
    head = make_bundle(tmp_path / "b")
    (tmp_path / "b" / "model.onnx").write_bytes(bytes(len(FILES["model.onnx"])))
    with pytest.raises(TrustError, match="was changed"):
        store.add(tmp_path / "b", head)
    assert store.list() == []
    assert not list((tmp_path / "state" / "temporary").iterdir())


def test_space_is_asked_for_before_a_byte_is_copied(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bundle that does not fit is refused with both numbers, and nothing was written."""
    head = make_bundle(tmp_path / "b")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 10**9 - 5000, 5000))
    monkeypatch.setattr("device_agent.archive.unpack", None)
    with pytest.raises(Refused, match="5000 are free"):
        store.add(tmp_path / "b", head)
    assert store.list() == []


def test_a_disk_that_fills_while_copying_is_left_clean(tmp_path: Path, store: Store) -> None:
    """A write that really fails half-way is a refusal, leaves nothing, and the store goes on working."""
    head = make_bundle(tmp_path / "b", extra={"model.onnx": bytes(200_000)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(Refused, match="cannot be stored"):
            store.add(tmp_path / "b", head)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "state" / "temporary").iterdir())
    assert store.add(tmp_path / "b", head)


def test_one_process_writes(tmp_path: Path) -> None:
    """A second process cannot open the store until the first has closed it."""
    script = f"from pathlib import Path; from device_agent.store import Store; Store(Path({str(tmp_path)!r}))"
    command = [sys.executable, "-c", script]
    with Store(tmp_path):
        second = subprocess.run(command, stderr=subprocess.PIPE)
        assert b"is in use" in second.stderr
    assert subprocess.run(command).returncode == 0


def test_a_store_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    """A state directory that cannot exist is an error, not an agent without a store."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(Refused, match="cannot be opened"):
        Store(tmp_path / "file" / "state")


def test_leftovers_are_cleaned_when_the_store_is_opened(tmp_path: Path) -> None:
    """What an interrupted copy left is gone after the next start."""
    leftover = tmp_path / "state" / "temporary" / "half"
    leftover.mkdir(parents=True)
    (leftover / "model.onnx").write_bytes(b"half")
    with Store(tmp_path / "state"):
        assert not leftover.exists()


def test_collecting_keeps_what_matters(tmp_path: Path, store: Store) -> None:
    """Only versions that served and are neither active nor the fallback are collected."""
    digests = [_add(store, tmp_path / str(i), version=i) for i in range(1, 6)]
    state = ModelState()
    for digest in digests[:4]:
        state = state.activated(digest).with_commit()
    store.set_state("demo", state)
    assert sorted(store.collect("demo")) == sorted(digests[:2])
    assert sorted(v.digest for v in store.list()) == sorted(digests[2:])
    assert store.state("demo").committed == tuple(digests[2:4])


def test_removing(tmp_path: Path, store: Store) -> None:
    """The active version cannot be removed; a removed fallback is no fallback any more."""
    old, new = (_add(store, tmp_path / str(i), version=i) for i in (1, 2))
    store.set_state("demo", ModelState(new, old, (old, new)))
    with pytest.raises(BadInput, match="is the active version"):
        store.remove("demo", new)
    store.remove("demo", old)
    assert store.state("demo") == ModelState(new, None, (new,))
    assert [v.digest for v in store.list()] == [new]


def test_finding_by_prefix(tmp_path: Path, store: Store) -> None:
    """Six characters name a version; fewer, unknown and ambiguous ones are errors."""
    digest = _add(store, tmp_path / "b")
    assert store.find(digest[:6]).digest == store.find(digest).digest == digest
    for prefix, reason in ((digest[:5], "too short"), ("0" * 64, "no version"), ("", "too short")):
        with pytest.raises(BadInput, match=reason):
            store.find(prefix)
    (store.directory("demo", digest).with_name(digest[:6] + "0" * 58)).mkdir()
    with pytest.raises(BadInput, match="2 versions"):
        store.find(digest[:6])


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b'{"active": 7}', b'{"committed": "abc"}'])
def test_a_damaged_state_file_means_nothing_is_active(tmp_path: Path, store: Store, data: bytes) -> None:
    """A state file that decayed costs the choice of version, and no crash; activating writes it anew."""
    digest = _add(store, tmp_path / "b")
    (tmp_path / "state" / "models" / "demo" / "state.json").write_bytes(data)
    assert store.state("demo") == ModelState()
    assert store.collect("demo") == []
    store.set_state("demo", store.state("demo").activated(digest))
    assert store.active("demo") == digest


@pytest.mark.parametrize("name", ["../x", "", ".", "a/b", "x" * 65])
def test_a_model_name_is_no_path(store: Store, name: str) -> None:
    """A name that could lead out of the store is refused wherever it comes from."""
    with pytest.raises(BadInput):
        store.state(name)
