"""Killed, interrupted, moved: the same command ends with the same bundle, byte for byte."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from pathlib import Path

from conftest import Compressed
from host_testing import Forker, Result, Running, TinyModel, assert_three_lines

from edgekit import bundle
from edgekit.artifact import Store

_LONGEST_RUN_S = 60.0


def _artifacts(workdir: Path) -> int:
    directory = workdir / "artifacts"
    return len(list(directory.iterdir())) if directory.exists() else 0


def _whole(workdir: Path) -> bool:
    """Whether every artifact that is there is undamaged."""
    store = Store(workdir)
    return all(store.get(path.name) is not None for path in (workdir / "artifacts").iterdir())


def _signal_when(running: Running, number: int, condition: object, pause_s: float = 0.002) -> Result:
    """Send a signal as soon as a condition holds; a run that ends before is waited for all the same."""
    deadline = time.monotonic() + _LONGEST_RUN_S
    while not condition() and time.monotonic() < deadline and Path(f"/proc/{running.pid}").exists():  # type: ignore[operator]
        time.sleep(pause_s)
    with contextlib.suppress(ProcessLookupError):  # it was faster
        os.kill(running.pid, number)
    return running.wait()


def test_the_same_inputs_give_the_same_bytes_anywhere(
    compressed: Compressed, tiny: TinyModel, forked: Forker, tmp_path: Path
) -> None:
    """Another process, current directory, working directory and copies of the inputs: the same file, byte
    for byte, and the same artifacts.
    """
    home = tmp_path / "elsewhere"
    shutil.copytree(tiny.home, home)
    moved = TinyModel(
        home, *(home / path.name for path in (tiny.weights, tiny.calib, tiny.eval, tiny.recipe))
    )
    result = forked.run(*moved.compress_argv(tmp_path / "w", tmp_path / "o"), cwd=home)
    assert result.code == 0, result.err
    assert result.json()["bundle"]["digest"] == compressed.document["bundle"]["digest"]
    assert (tmp_path / "o" / "build.edgekit").read_bytes() == compressed.archive.read_bytes()
    here, there = (
        {a.key: a.sha256 for path in (w / "artifacts").iterdir() if (a := Store(w).get(path.name))}
        for w in (compressed.workdir, tmp_path / "w")
    )
    assert set(there) <= set(here)
    assert all(there[key] == here[key] for key in there)


def test_killed_after_every_stage_it_goes_on(
    compressed: Compressed, tiny: TinyModel, forked: Forker, tmp_path: Path
) -> None:
    """``kill -9`` right after each stage: nothing finished is done again, and the bundle is the same."""
    work, out = tmp_path / "work", tmp_path / "out"
    argv = tiny.compress_argv(work, out)
    for finished in range(1, len(compressed.document["stages"]) + 1):
        result = _signal_when(
            forked.start(*argv, cwd=tiny.home),
            signal.SIGKILL,
            lambda finished=finished: _artifacts(work) >= finished,
        )
        assert result.code in (-signal.SIGKILL, 0), result.err
        assert _artifacts(work) >= finished
        assert _whole(work)
    result = forked.run(*argv, cwd=tiny.home)
    assert result.code == 0, result.err
    assert all(stage["cached"] for stage in result.json()["stages"])
    assert result.json()["bundle"]["digest"] == compressed.document["bundle"]["digest"]
    assert (out / "build.edgekit").read_bytes() == compressed.archive.read_bytes()
    assert list((work / "tmp").iterdir()) == []


def test_killed_at_random_moments_it_goes_on(
    compressed: Compressed, tiny: TinyModel, forked: Forker, tmp_path: Path
) -> None:
    """``kill -9`` at any moment, again and again: every artifact there is whole, and so is the end."""
    work, out = tmp_path / "work", tmp_path / "out"
    argv = tiny.compress_argv(work, out)
    moments = random.Random(20)
    for _ in range(6):
        begin = time.monotonic()
        wait_s = moments.uniform(0.1, 1.8)
        _signal_when(
            forked.start(*argv, cwd=tiny.home),
            signal.SIGKILL,
            lambda begin=begin, wait_s=wait_s: time.monotonic() > begin + wait_s,
        )
        assert not (work / "artifacts").exists() or _whole(work)
    result = forked.run(*argv, cwd=tiny.home)
    assert result.code == 0, result.err
    assert result.json()["bundle"]["digest"] == compressed.document["bundle"]["digest"]
    assert (out / "build.edgekit").read_bytes() == compressed.archive.read_bytes()


def test_killed_while_the_bundle_is_written_it_goes_on(
    compressed: Compressed, tiny: TinyModel, forked: Forker, tmp_path: Path
) -> None:
    """``kill -9`` among the last moves, over an older bundle: a bundle under its name is always whole."""
    work, out = tmp_path / "work", tmp_path / "out"
    shutil.copytree(compressed.workdir, work)
    shutil.copytree(compressed.out, out)
    argv = tiny.compress_argv(work, out, latency="p95:0.0001ms")  # a bundle with another contract
    moments = random.Random(3)
    for _ in range(6):
        running = forked.start(*argv, cwd=tiny.home)
        _signal_when(running, signal.SIGKILL, lambda: any(out.glob(".*")), pause_s=moments.uniform(0, 0.004))
        single = out / "build.edgekit"
        with bundle.open_bundle(single) as opened:
            assert opened.manifest.name == "build"
    assert_three_lines(forked.run(*argv, cwd=tiny.home), 3)
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []
    assert bundle.inspect(out / "build")["digest"] == bundle.inspect(out / "build.edgekit")["digest"]


def test_ctrl_c_is_130_and_can_be_resumed(
    compressed: Compressed, tiny: TinyModel, forked: Forker, tmp_path: Path
) -> None:
    """SIGINT in the middle of a stage: exit 130, three lines, nothing half-written; then the same bundle."""
    work, out = tmp_path / "work", tmp_path / "out"
    argv = tiny.compress_argv(work, out)
    for finished in (0, 1, 2):
        running = forked.start(*argv, cwd=tiny.home)

        def in_a_stage(finished: int = finished) -> bool:
            return _artifacts(work) >= finished and any((work / "tmp").glob("*"))

        result = _signal_when(running, signal.SIGINT, in_a_stage)
        assert "interrupted" in assert_three_lines(result, 130)
        assert result.out == ""
        assert list((work / "tmp").iterdir()) == []
        assert list(out.iterdir()) == []
        assert _whole(work)
    result = forked.run(*argv, cwd=tiny.home)
    assert result.code == 0, result.err
    assert result.json()["bundle"]["digest"] == compressed.document["bundle"]["digest"]
