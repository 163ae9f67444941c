"""Rules of the house that no other tool checks."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("edgekit", "calibration", "host_trainer", "device_agent")
#: Places and addresses of one machine; what a reader elsewhere could not use.
FOREIGN = re.compile(rb"(?<![\w/.])/w" + rb"ork/|\.lib" + rb"rary/|pypi-" + rb"more")


def tracked(pattern: str = "*") -> list[Path]:
    """Files in the repository."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", pattern], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


TESTS = [path for path in tracked("tests/*.py") if path.name.startswith("test_")]


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_test_says_what_holds(path: Path) -> None:
    """Each test function has a docstring: one sentence on what a user may rely on."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    silent = [
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
        and not ast.get_docstring(node)
    ]
    assert silent == []


def modules() -> list[str]:
    """Every module of the packages."""
    names = []
    for package in PACKAGES:
        for path in tracked(f"{package}/*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


#: Imports each module in a forked process; libraries first, for their import takes long and may warn.
_IMPORT_EACH = """
import importlib, os, sys, warnings
import click, cryptography, numpy, onnx, onnxruntime, pydantic, rich, torch, transformers
for name in sys.argv[1:]:
    pid = os.fork()
    if pid == 0:
        warnings.simplefilter("error")
        try:
            importlib.import_module(name)
        except BaseException as error:
            print(name, type(error).__name__, error, flush=True)
            os._exit(1)
        os._exit(0)
    os.waitpid(pid, 0)
"""


def _import_each(names: list[str]) -> str:
    return subprocess.run(
        [sys.executable, "-c", _IMPORT_EACH, *names], cwd=ROOT, capture_output=True, text=True, timeout=200
    ).stdout


def test_every_module_imports_alone() -> None:
    """Each module, in a process without any other of ours, warnings as errors: no order, no import cycle."""
    assert len(modules()) > 80
    assert _import_each(modules()) == ""


def test_an_import_that_fails_is_noticed() -> None:
    """The test above can fail: a module that is not there is reported."""
    assert "edgekit.no_such_module" in _import_each(["edgekit.no_such_module"])


def test_nothing_names_the_machine_it_was_made_on() -> None:
    """No tracked file mentions a place that only one machine has."""
    assert [str(path) for path in tracked() if FOREIGN.search(path.read_bytes())] == []


def test_imports_are_absolute() -> None:
    """The keys of artifacts follow absolute imports; a relative one would be missed."""
    relative = [
        str(path)
        for package in PACKAGES
        for path in tracked(f"{package}/*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert relative == []


def test_validation_is_not_done_by_assert() -> None:
    """Asserts vanish under ``python -O``; the packages raise errors instead, and never use pickle."""
    found = []
    for package in PACKAGES:
        for path in tracked(f"{package}/*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Assert):
                    found.append(f"{path}:{node.lineno}: assert")
                if isinstance(node, ast.Attribute) and ast.unparse(node) in ("pickle.loads", "pickle.load"):
                    found.append(f"{path}:{node.lineno}: pickle")
    assert found == []
