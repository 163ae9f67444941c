"""README's commands, executed in order, in a copy of the repository, by a shell."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from edgekit.measure import processor

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(document: Path) -> list[str]:
    """The shell blocks of a Markdown file."""
    return BLOCK.findall(document.read_text(encoding="utf-8"))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the tracked files that shares this environment, so that ``make`` installs nothing again."""
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).exists():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tmp_path / name)
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    (ROOT / ".venv" / ".installed").touch()
    return tmp_path


def run(script: str, directory: Path) -> str:
    """Run a script as a user's shell would, stopping at the first command that fails."""
    output = directory / "output.txt"  # a file: what a block leaves running would keep a pipe open
    with output.open("w") as sink:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            timeout=1800,
            check=False,
            env={**os.environ, "PATH": f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}"},
        )
    text = output.read_text(errors="replace")
    assert done.returncode == 0, f"{script}\n{text[-6000:]}"
    return text


@pytest.mark.timeout(2400)
def test_readme_commands(copy: Path) -> None:
    """Every command of the README works, in the order in which it stands there."""
    commands = blocks(copy / "README.md")
    assert any("make demo" in block for block in commands)
    try:
        for block in commands:
            if block.strip() == "make test":
                run("make -n test", copy)  # running it here would run this test again
                continue
            output = run(block, copy)
            if block.strip() == "make demo":
                assert "200 requests, 200 identical" in output
    finally:
        pid = copy / "agent.pid"
        if pid.exists():
            with contextlib.suppress(ProcessLookupError):  # the last block stopped it
                os.kill(int(pid.read_text()), signal.SIGKILL)


@pytest.mark.timeout(1800)
def test_text_encoder_example(copy: Path) -> None:
    """The text encoder's commands give a faster bundle whose embeddings keep a mean cosine of 0.985.

    On a processor without VNNI with the profile that is named there for it.
    """
    [script] = blocks(copy / "examples" / "text_encoder" / "README.md")
    if processor.lacks_vnni():
        script = script.replace("--profile x86-cpu ", "--profile x86-cpu-avx2 ")
    run(script, copy)
    report = json.loads((copy / "minilm" / "report.json").read_text())
    assert report["contract"]["met"]
    assert report["chosen"]["metric"]["value"] >= 0.985
    assert report["chosen"]["precision"] == "int8"
