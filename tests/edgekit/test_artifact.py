"""The store: whole artifacts or none, one run at a time, damage noticed, a full disk survived."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from host_testing import Forker, TinyModel, assert_three_lines
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit import interrupt
from edgekit.artifact import Artifact, Store, disk_full_is_an_error, open_store, tree_digest
from edgekit.errors import BadInput

KEY = "ab" * 32


def _make(content: bytes = b"content") -> Any:
    def make(out: Path) -> dict[str, Any]:
        (out / "sub").mkdir()
        (out / "sub" / "file").write_bytes(content)
        return {"n": 1, "pair": (1, 2)}

    return make


def _stored(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "artifacts").iterdir())


def _unfinished(root: Path) -> list[Path]:
    return list((root / "tmp").iterdir())


def test_what_was_built_is_found_again(tmp_path: Path) -> None:
    """An artifact comes back equal, also after the store was opened anew."""
    with open_store(tmp_path) as store:
        assert store.get(KEY) is None
        built = store.build(KEY, "onnx", ("p",), _make())
    with open_store(tmp_path) as store:
        found = store.get(KEY)
    assert found == built == Artifact(
        "onnx", tmp_path / "artifacts" / KEY / "data", built.sha256, KEY, ("p",), {"n": 1, "pair": [1, 2]}
    )  # fmt: skip
    assert found.size_bytes() == len(b"content")


@pytest.mark.parametrize(
    "damage",
    [
        lambda home: (home / "data/sub/file").write_bytes(b"Content"),
        lambda home: (home / "data/sub/file").unlink(),
        lambda home: (home / "data/more").write_bytes(b""),
        lambda home: (home / "data/sub/file").rename(home / "data/sub/other"),
        lambda home: shutil.rmtree(home / "data"),
        lambda home: (home / "artifact.json").unlink(),
        lambda home: (home / "artifact.json").write_text(""),
        lambda home: (home / "artifact.json").write_text("[]"),
        lambda home: (home / "artifact.json").write_bytes(b"\xff"),
        lambda home: (home / "artifact.json").write_text(
            (home / "artifact.json").read_text().replace('"n": 1', '"n": 2')
        ),
    ],
)
def test_damage_is_noticed_and_repaired(tmp_path: Path, damage: Any) -> None:
    """A changed, missing or extra file, or a changed record, counts as absent, and can be built again."""
    with open_store(tmp_path) as store:
        built = store.build(KEY, "onnx", (), _make())
        damage(tmp_path / "artifacts" / KEY)
        assert store.get(KEY) is None
        assert store.build(KEY, "onnx", (), _make()) == built == store.get(KEY)


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), OSError(errno.EIO, "x")])
def test_a_failed_stage_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    """Whatever ends a stage, Ctrl-C included, no artifact and no unfinished work stays."""

    def make(out: Path) -> dict[str, Any]:
        (out / "half").write_bytes(b"half")
        raise error

    with open_store(tmp_path) as store:
        with pytest.raises(type(error)):
            store.build(KEY, "onnx", (), make)
        assert store.get(KEY) is None
    assert _stored(tmp_path) == []
    assert _unfinished(tmp_path) == []


def test_nothing_made_around_a_lost_interrupt_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage that went on after Ctrl-C, because a library swallowed it, is not stored."""

    def make(out: Path) -> dict[str, Any]:
        monkeypatch.setattr(interrupt, "_heard", True)
        return {}

    with open_store(tmp_path) as store, pytest.raises(KeyboardInterrupt):
        store.build(KEY, "onnx", (), make)
    assert _stored(tmp_path) == []


def test_leftovers_of_a_killed_run_are_cleared(tmp_path: Path) -> None:
    """Opening the store removes what a killed run left unfinished."""
    with open_store(tmp_path):
        (tmp_path / "tmp" / "left").mkdir()
    with open_store(tmp_path):
        assert _unfinished(tmp_path) == []


def test_a_second_run_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    """One run at a time; the lock goes with its process, even if that is killed."""
    holder = "import sys; from pathlib import Path; from edgekit.artifact import open_store\n"
    holder += "with open_store(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", holder, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(BadInput, match="in use"), open_store(tmp_path):
            pass
        process.kill()
        process.wait(10)
        with open_store(tmp_path):
            pass


def test_a_place_that_cannot_be_used_is_an_error_with_a_reason(tmp_path: Path) -> None:
    """A file where the working directory should be is named, with what to do."""
    (tmp_path / "work").write_text("")
    with pytest.raises(BadInput, match="--workdir"), open_store(tmp_path / "work"):
        pass


_names = st.from_regex(r"[a-z]{1,3}|dir/[a-z]{1,3}", fullmatch=True).filter(lambda name: name != "dir")


@settings(max_examples=30)
@given(st.dictionaries(_names, st.binary(max_size=8), max_size=5))
def test_the_digest_tells_trees_apart(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]
) -> None:
    """Equal names and contents give equal digests in any directory; any other name or byte does not."""

    def write(tree: dict[str, bytes]) -> str:
        root = tmp_path_factory.mktemp("tree")
        for name, content in tree.items():
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).write_bytes(content)
        return tree_digest(root)

    digest = write(files)
    assert write(dict(reversed(files.items()))) == digest
    for name, content in files.items():
        assert write({**files, name: content + b"x"}) != digest
        assert write({key: value for key, value in files.items() if key != name}) != digest


def test_a_full_disk_behind_a_library_s_own_error_is_recognized(tmp_path: Path) -> None:
    """Exporters wrap "no space left" in errors of their own; the person still reads that the disk is full."""
    wrapped = RuntimeError("export failed")
    wrapped.__cause__ = OSError(errno.ENOSPC, "no space")
    with pytest.raises(BadInput, match="disk is full"), disk_full_is_an_error(tmp_path):
        raise wrapped
    with pytest.raises(OSError, match="denied"), disk_full_is_an_error(tmp_path):
        raise OSError(errno.EACCES, "denied")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of four megabytes."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_the_store_survives_a_full_disk(small_disk: Path) -> None:
    """A stage that fills the disk fails with three lines, leaves nothing, and works once there is space."""

    def make(out: Path) -> dict[str, Any]:
        (out / "large").write_bytes(bytes(2_000_000))
        return {}

    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(3_000_000))
    with open_store(small_disk / "work") as store:
        with pytest.raises(BadInput, match="disk is full"):
            store.build(KEY, "onnx", (), make)
        assert _stored(store.root) == []
        assert _unfinished(store.root) == []
        ballast.unlink()
        store.build(KEY, "onnx", (), make)
        assert store.get(KEY) is not None


@pytest.mark.parametrize("what", ["workdir", "out"])
def test_compress_on_a_full_disk_can_go_on_when_there_is_space(
    what: str, small_disk: Path, tiny: TinyModel, forked: Forker, tmp_path: Path
) -> None:
    """Exit 2 and three lines that say so, wherever the space ends; with space, the same command finishes."""
    places = {"workdir": tmp_path / "work", "out": tmp_path / "out", what: small_disk / what}
    argv = tiny.compress_argv(places["workdir"], places["out"], precision="fp32")
    ballast = small_disk / "ballast"
    free = {"workdir": (1_500_000, 800_000), "out": (300_000, 10_000)}[what]
    for bytes_left in free:
        ballast.write_bytes(bytes(4_150_000 - bytes_left))
        text = assert_three_lines(forked.run(*argv, cwd=tiny.home), 2)
        assert "disk is full" in text or "No space left" in text
        ballast.unlink()
        shutil.rmtree(places["workdir"] / "artifacts" if what == "workdir" else small_disk / "out")
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    result = forked.run(*argv, cwd=tiny.home)
    assert result.code in (0, 3), result.err
    assert json.loads((places["out"] / "report.json").read_text()) == result.json()


def test_reading_the_store_needs_no_lock(tmp_path: Path) -> None:
    """Looking up artifacts of a directory that does not exist makes nothing."""
    assert Store(tmp_path / "nowhere").get(KEY) is None
    assert list(tmp_path.iterdir()) == []
