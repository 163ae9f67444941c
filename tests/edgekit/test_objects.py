"""Objects that a user names as ``package.module:name``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from edgekit import objects
from edgekit.errors import BadInput


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("pkg.mod:name", True),
        ("mod:name", True),
        ("dir/mod:name", False),
        ("mod.onnx", False),
        ("mod:", False),
        (":name", False),
        ("mod:a.b", False),
        ("1mod:name", False),
        ("ssh://host", False),
    ],
)
def test_only_dotted_modules_with_a_name_are_object_specs(text: str, is_one: bool) -> None:
    """Paths and addresses are never mistaken for code to import."""
    assert objects.is_object_spec(text) is is_one


def test_the_current_directory_is_importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's module is found where the command is run, without installing it."""
    (tmp_path / "pkg_beside").mkdir()
    (tmp_path / "pkg_beside" / "__init__.py").write_text("")
    (tmp_path / "pkg_beside" / "mod.py").write_text("def answer():\n    return 42\nvalue = 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert objects.load_callable("pkg_beside.mod:answer")() == 42
    with pytest.raises(BadInput, match="did you mean 'answer'"):
        objects.load_callable("pkg_beside.mod:anwser")
    with pytest.raises(BadInput, match="no function 'value'"):
        objects.load_callable("pkg_beside.mod:value")
    before = objects.source_digest(sys.modules["pkg_beside.mod"])
    (tmp_path / "pkg_beside" / "mod.py").write_text("def answer():\n    return 43\n")
    assert objects.source_digest(sys.modules["pkg_beside.mod"]) != before


def test_missing_and_broken_modules_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not there, there but needing something that is not installed, and failing: three different answers."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "needs_more.py").write_text("import surely_not_installed\n")
    (tmp_path / "is_broken.py").write_text("raise OSError('no disk')\n")
    for spec, said in {
        "not_there:f": "there is no module 'not_there'",
        "not_there.at_all:f": "there is no module 'not_there'",
        "needs_more:f": "imports 'surely_not_installed'",
        "is_broken:f": "OSError: no disk",
    }.items():
        with pytest.raises(BadInput, match=said):
            objects.load_callable(spec)
