"""Fixtures of the host's tests; the helpers are in ``host_testing``."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from host_testing import HERE, RECIPE, Forker, Result, TinyModel, edgekit


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A small residual network, trained on scanned digits."""
    home = tmp_path_factory.mktemp("tiny")
    shutil.copy(HERE / "tiny_net.py", home)
    (home / "recipe.toml").write_text(RECIPE)
    subprocess.run(
        [sys.executable, "tiny_net.py"], cwd=home, check=True, env={"OMP_NUM_THREADS": "1"}, timeout=100
    )
    return TinyModel(
        home, home / "tiny.safetensors", home / "calib.npz", home / "eval.npz", home / "recipe.toml"
    )


@pytest.fixture(scope="session")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forker]:
    """Runs the command line quickly, in real processes."""
    with Forker(tmp_path_factory.mktemp("forked")) as forker:
        yield forker


@dataclass(frozen=True)
class Compressed:
    """A finished compression of the tiny model by the installed command."""

    result: Result
    document: dict[str, Any]
    out: Path
    workdir: Path

    @property
    def archive(self) -> Path:
        """The bundle's single file."""
        return Path(self.document["bundle"]["file"])


@pytest.fixture(scope="session")
def compressed(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Compressed:
    """Compress the tiny model once, with the real command; tests must not change what it wrote."""
    root = tmp_path_factory.mktemp("compressed")
    result = edgekit(*tiny.compress_argv(root / "work", root / "out"), cwd=tiny.home)
    assert result.code == 0, result.err
    return Compressed(result, result.json(), root / "out", root / "work")
