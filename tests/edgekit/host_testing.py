"""Helpers of the host's tests: the command line as a process, and a small real model with its data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
EDGEKIT = Path(sys.executable).with_name("edgekit")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """Standard output as the one JSON document that it must be."""
        return json.loads(self.out)

    def error_lines(self) -> list[str]:
        """The lines of standard error from ``error:`` on."""
        lines = self.err.splitlines()
        starts = [number for number, line in enumerate(lines) if line.startswith("error: ")]
        return lines[starts[0] :] if starts else []


def assert_three_lines(result: Result, code: int) -> str:
    """Check that a command ended with ``code`` and three lines; return them as one text."""
    assert result.code == code, result.err
    assert "Traceback" not in result.err
    lines = result.error_lines()
    assert [line.split(":")[0].strip() for line in lines] == ["error", "why", "fix"], result.err
    assert all(line.split(":", 1)[1].strip() for line in lines), lines
    return "\n".join(lines)


def edgekit(*argv: object, cwd: Path, **env: str) -> Result:
    """Run the installed command."""
    done = subprocess.run(
        [EDGEKIT, *map(str, argv)],
        cwd=cwd,
        env={**os.environ, **ONE_THREAD, **env},
        capture_output=True,
        text=True,
        timeout=200,
    )
    return Result(done.returncode, done.stdout, done.stderr)


@dataclass
class Running:
    """A forked command that has not been waited for."""

    pid: int
    _answers: Any
    _files: tuple[Path, Path]

    def wait(self) -> Result:
        """Wait for its end; a killed one has minus the signal as its code."""
        code = int(self._answers.readline())
        return Result(code, *(path.read_text() for path in self._files))


@dataclass
class Forker:
    """Runs ``edgekit`` in forked processes, one at a time (see ``forking.py``)."""

    scratch: Path
    _process: subprocess.Popen[str] = field(init=False)

    def __enter__(self) -> Forker:
        self._process = subprocess.Popen(
            [sys.executable, HERE / "forking.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **ONE_THREAD},
            text=True,
            bufsize=1,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.stdout.close()  # type: ignore[union-attr]
        self._process.wait(30)

    def start(self, *argv: object, cwd: Path, env: dict[str, str] | None = None) -> Running:
        """Start a command."""
        files = self.scratch / "out", self.scratch / "err"
        for path in files:
            path.write_text("")
        request = {
            "argv": [str(part) for part in argv], "cwd": str(cwd), "env": env or {},
            "out": str(files[0]), "err": str(files[1]),
        }  # fmt: skip
        self._process.stdin.write(json.dumps(request) + "\n")  # type: ignore[union-attr]
        return Running(int(self._process.stdout.readline()), self._process.stdout, files)  # type: ignore[union-attr]

    def run(self, *argv: object, cwd: Path, env: dict[str, str] | None = None) -> Result:
        """Run a command to its end."""
        return self.start(*argv, cwd=cwd, env=env).wait()


@dataclass(frozen=True)
class TinyModel:
    """A trained network and its data, in a directory from which ``tiny_net:build`` can be imported."""

    home: Path
    weights: Path
    calib: Path
    eval: Path
    recipe: Path

    def compress_argv(self, workdir: Path, out: Path, *more: object, **options: object) -> list[object]:
        """Arguments of ``edgekit`` that compress it to INT8; ``options`` replace the usual ones."""
        usual = {
            "weights": self.weights, "profile": "x86-cpu", "calib": self.calib, "eval": self.eval,
            "recipe": self.recipe, "precision": "int8", "workdir": workdir, "out": out,
        }  # fmt: skip
        model = options.pop("model", "tiny_net:build")
        argv: list[object] = ["compress", model, "--json"]
        for name, value in {**usual, **options}.items():
            if value is not None:
                argv += ["--" + name.replace("_", "-"), value]
        return [*argv, *more]


#: One thread: two wait longer for each other than a model of this size takes.
RECIPE = """\
threads = 1
[recover]
epochs = 2
[measure]
runs = 50
warmup = 5
max_samples = 200
[quantize]
max_samples = 64
"""
