"""Everything that the agent imports, in one directory, for a device of another kind than this machine.

Versions are pinned in ``requirements.lock`` for every Python; markers in it are judged for the target, which
pip by itself does for the Python that runs it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import List, Sequence

from device_agent.errors import Missing
from device_agent.packaging.target import Target

SOURCES = Path(__file__).resolve().parent.parent
LOCK = SOURCES / "packaging" / "requirements.lock"

#: Declared by onnxruntime, but for its tools that edit models; the agent only runs them.
UNUSED = ("coloredlogs", "flatbuffers", "humanfriendly", "mpmath", "packaging", "protobuf", "sympy")

# Parts of wheels that serving never imports: most of their size after the native libraries.
_PRUNED = (
    "bin",
    "onnxruntime/backend",
    "onnxruntime/datasets",
    "onnxruntime/quantization",
    "onnxruntime/tools",
    "onnxruntime/transformers",
    "numpy/f2py",
    "**/tests",
    "**/*.a",
    "**/*.pyi",
    # They name the machine that built the package.
    "*.dist-info/direct_url.json",
    "*.dist-info/RECORD",
)


def requirements(target: Target) -> List[str]:
    """The pinned requirements of a target, without the agent itself."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    chosen = []
    for line in LOCK.read_text(encoding="utf-8").splitlines():
        requirement = Requirement(line)
        fits = requirement.marker is None or requirement.marker.evaluate(dict(target.marker_environment()))
        if fits and canonicalize_name(requirement.name) not in UNUSED:
            chosen.append(f"{requirement.name}{requirement.specifier}")
    return sorted(chosen)


def agent_wheel(directory: Path) -> Path:
    """Build the agent's wheel from a copy of its sources, so that nothing is left among them.

    Raises:
        Missing: pip failed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        copy = Path(work) / "device_agent"
        ignored = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
        shutil.copytree(str(SOURCES), str(copy), ignore=ignored)
        built = Path(work) / "wheel"
        _pip(["wheel", "--no-deps", "--wheel-dir", str(built), str(copy)])
        (wheel,) = built.glob("*.whl")
        return Path(shutil.move(str(wheel), str(directory / wheel.name)))


def collect(target: Target, wheels: Path) -> None:
    """Put the wheels that a target needs into a directory, the agent's own among them.

    Raises:
        Missing: pip failed, as without a network, or where a release has no wheel for the target.
    """
    agent_wheel(wheels)
    _pip(["download", "--no-deps", "--dest", str(wheels), *target.pip_options(), *requirements(target)])


def unpack(target: Target, wheels: Path, site: Path) -> None:
    """Install the wheels into the new directory ``site``, without what serving does not need.

    Raises:
        Missing: pip failed.
    """
    files = sorted(str(path) for path in wheels.glob("*.whl"))
    options = ["--no-deps", "--no-index", "--no-compile", "--target", str(site), *target.pip_options()]
    _pip(["install", "--no-warn-script-location", *options, *files])
    for pattern in _PRUNED:
        for path in sorted(site.glob(pattern)):
            if path.is_dir():
                shutil.rmtree(str(path))
            elif path.exists():
                path.unlink()


def _pip(arguments: Sequence[str]) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ)
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        errors = [line for line in lines if "ERROR" in line] or lines or ["it says nothing"]
        raise Missing(
            f"pip {arguments[0]} failed",
            errors[-1],
            "see that pip reaches its index, or that PIP_FIND_LINKS names a directory with the wheels",
        )
