"""Writes that survive a power cut; that they do is tested in test_crash."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Callable, List, Sequence

import pytest

from crash_disk import on_primitive
from device_agent import durable


def _record(monkeypatch: pytest.MonkeyPatch) -> List[str]:
    calls: List[str] = []

    def note(name: str, arguments: Sequence[Any], call: Callable[[], Any]) -> Any:
        calls.append(f"{name[1:]} {Path(arguments[0]).name}")
        return call()

    on_primitive(monkeypatch, note)
    return calls


def test_a_file_is_synced_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is written aside, synced, renamed, and its directory synced, in this order."""
    calls = _record(monkeypatch)
    durable.write(tmp_path / "state.json", b"new")
    assert calls == [
        "write_synced .state.json.tmp",
        "rename .state.json.tmp",
        f"sync_directory {tmp_path.name}",
    ]
    assert (tmp_path / "state.json").read_bytes() == b"new"
    assert os.listdir(str(tmp_path)) == ["state.json"]


def test_a_failed_write_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the new content cannot be written, the old content stays."""
    durable.write(tmp_path / "state.json", b"old")

    def fail(name: str, arguments: Sequence[Any], call: Callable[[], Any]) -> Any:
        raise OSError("no")

    with monkeypatch.context() as patch:
        on_primitive(patch, fail)
        with pytest.raises(OSError, match="no"):
            durable.write(tmp_path / "state.json", b"new")
    assert (tmp_path / "state.json").read_bytes() == b"old"
    durable.write(tmp_path / "state.json", b"newer")
    assert (tmp_path / "state.json").read_bytes() == b"newer"


def test_a_directory_is_published_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file and directory inside is synced before the rename makes it visible."""
    (tmp_path / "temporary" / "inner").mkdir(parents=True)
    (tmp_path / "temporary" / "inner" / "file").write_bytes(b"x")
    (tmp_path / "final").mkdir()
    calls = _record(monkeypatch)
    durable.publish(tmp_path / "temporary", tmp_path / "final" / "d")
    assert calls == [
        "sync_file file",
        "sync_directory inner",
        "sync_directory temporary",
        "rename temporary",
        "sync_directory final",
        f"sync_directory {tmp_path.name}",
    ]
    assert (tmp_path / "final" / "d" / "inner" / "file").read_bytes() == b"x"


def test_a_removed_directory_disappears_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory is renamed away, and that is on disk, before anything in it is deleted."""
    (tmp_path / "trash" / "removed-v").mkdir(parents=True)
    (tmp_path / "versions" / "v").mkdir(parents=True)
    calls = _record(monkeypatch)
    durable.remove(tmp_path / "versions" / "v", tmp_path / "trash")
    assert calls == [
        "delete_tree removed-v",
        "rename v",
        "sync_directory versions",
        "sync_directory trash",
        "delete_tree removed-v",
    ]
    assert not list((tmp_path / "trash").iterdir())


def test_directories_are_made_from_above(tmp_path: Path) -> None:
    """Missing parents are created too, and a directory that exists is fine."""
    durable.make_directory(tmp_path / "a" / "b")
    durable.make_directory(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="exists"):
        durable.make_directory(tmp_path / "file")


def test_emptying_takes_files_links_and_nothing(tmp_path: Path) -> None:
    """What means nothing can be a file, a link or missing; a link's target is not touched."""
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    durable.empty(tmp_path / "link")
    durable.empty(tmp_path / "missing")
    assert os.listdir(str(tmp_path)) == ["target"]
