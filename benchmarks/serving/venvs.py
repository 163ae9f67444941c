"""An environment for each peer under ``.bench/``, made when it is first needed and kept."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
HOME = ROOT / ".bench"
_INSTALL_TIMEOUT_S = 1800
#: The same releases for all.
ONNXRUNTIME = "onnxruntime==1.32.0"
RUNTIME = ("numpy==2.4.6", ONNXRUNTIME)


@dataclass(frozen=True)
class Environment:
    """What a peer needs.

    Attributes:
        name: its directory under ``.bench/``.
        requirements: installed with what they depend on.
        alone: installed without; their own pins would force another numpy than everyone else's.
    """

    name: str
    requirements: tuple[str, ...]
    alone: tuple[str, ...] = ()

    @property
    def wanted(self) -> list[str]:
        """All that is installed by name."""
        return [*self.requirements, *self.alone]

    @property
    def directory(self) -> Path:
        """Where it is."""
        return HOME / self.name

    @property
    def stamp(self) -> Path:
        """Names what is installed, once it is."""
        return HOME / f"{self.name}.json"

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.directory / "bin" / "python"

    @property
    def packages(self) -> Path:
        """Its site-packages."""
        return next(self.directory.glob("lib/python3*/site-packages"))


class EnvironmentFailed(Exception):
    """A peer cannot be installed here."""


def prepare(environment: Environment) -> None:
    """Make the environment unless it is there.

    Raises:
        EnvironmentFailed: pip's last words.
    """
    wanted = environment.wanted
    stamp = environment.stamp
    if stamp.exists() and json.loads(stamp.read_text()) == wanted:
        return
    print(f"installing {environment.name} into {environment.directory}", file=sys.stderr)
    stamp.unlink(missing_ok=True)
    shutil.rmtree(environment.directory, ignore_errors=True)
    environment.directory.parent.mkdir(exist_ok=True)
    _run([_interpreter(), "-m", "venv", environment.directory])
    pip: list[str | Path] = [environment.python, "-m", "pip", "install", "--quiet"]
    _run([*pip, *environment.requirements])
    if environment.alone:
        _run([*pip, "--no-deps", *environment.alone])
    stamp.write_text(json.dumps(wanted))


def version(environment: Environment, package: str) -> str:
    """The release of ``package`` in the environment."""
    code = f"from importlib.metadata import version; print(version({package!r}))"
    done = subprocess.run([environment.python, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()


def agent_requirements() -> tuple[str, ...]:
    """What the agent depends on, with the pinned runtime of everyone."""
    project = tomllib.loads((ROOT / "device_agent" / "pyproject.toml").read_text())["project"]
    pinned = {requirement.split("==")[0] for requirement in RUNTIME}
    others = [r for r in project["dependencies"] if r.split(">=")[0].split("==")[0] not in pinned]
    return (*RUNTIME, *others)


def _interpreter() -> str:
    """Debian's Python where there is one: Triton's Python backend is linked against its library."""
    debian = Path("/usr/bin/python3.11")
    return str(debian) if debian.exists() else sys.executable


def _run(command: Sequence[str | Path]) -> None:
    done = subprocess.run(
        [str(part) for part in command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=_INSTALL_TIMEOUT_S,
    )  # fmt: skip
    if done.returncode != 0:
        raise EnvironmentFailed(done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "no output")
