"""The command line: quick to start, one document on standard output, three lines when something is wrong."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Compressed
from host_testing import EDGEKIT, Forker, Result, assert_three_lines, edgekit

from edgekit import cli, interrupt, profile

#: Every command, as the words that call it.
COMMANDS = [[]] + [
    [name, *below]
    for name, command in cli.cli.commands.items()
    for below in [[], *([sub] for sub in getattr(command, "commands", {}))]
]
HEAVY = {
    "torch",
    "onnx",
    "onnxruntime",
    "numpy",
    "pydantic",
    "transformers",
    "sklearn",
    "rich",
    "cryptography",
}


def test_help_imports_nothing_heavy() -> None:
    """``edgekit --help`` answers at once because it loads no library that takes long."""
    program = (
        "import sys; from edgekit import cli\n"
        "sys.argv = ['edgekit', '--help']\n"
        "try: cli.main()\n"
        "finally: print('\\n'.join(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stderr.split()}
    assert "click" in loaded
    assert not loaded & HEAVY
    assert "compress" in done.stdout


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(command: list[str], forked: Forker, tmp_path: Path) -> None:
    """``--help`` and ``-h`` of every command exit 0 and describe its options."""
    for flag in ("--help", "-h"):
        result = forked.run(*command, flag, cwd=tmp_path)
        assert result.code == 0
        assert result.out.startswith("Usage: edgekit")
        assert result.err == ""


def test_without_a_command_the_help_is_shown() -> None:
    """``edgekit`` alone shows what there is, on standard error, and exits 2."""
    done = subprocess.run([EDGEKIT], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("Usage: edgekit")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["compres"], "Did you mean 'compress'"),
        (["compress"], "MODEL"),
        (["compress", "m", "--profile", "x86-cpu"], "--calib"),
        (["compress", "m", "--profile", "x86-cpu", "--calib", "c", "--size", "small"], "small"),
        (["profiles", "show", "x86"], "x86"),
        (["profiles", "show", "x86-cqu"], "did you mean 'x86-cpu'"),
        (["profiles", "validate", "missing.toml"], "missing.toml"),
        (["inspect", "missing"], "missing"),
        (["verify", "missing", "--key", "k.pub"], "missing"),
        (["sign", "missing", "--key", "k.key"], "k.key"),
        (["deploy", "missing"], "missing"),
        (["deploy", "missing", "--to", "ftp://x"], "ftp://x"),
    ],
)
def test_bad_usage_is_three_lines(argv: list[str], words: str, forked: Forker, tmp_path: Path) -> None:
    """A wrong command, a missing option or file: exit 2, what, why and what to do."""
    result = forked.run(*argv, cwd=tmp_path)
    assert words in assert_three_lines(result, 2)
    assert result.out == ""
    assert list(tmp_path.iterdir()) == []


def _fails(error: Exception) -> Any:
    def raise_it(*_: Any, **__: Any) -> Any:
        raise error

    return raise_it


@pytest.mark.parametrize("debug", [False, True])
def test_a_mistake_of_ours_shows_a_traceback_only_for_debugging(
    debug: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An unexpected error is three lines and exit 1; with ``--debug`` it is the traceback."""
    monkeypatch.setattr(profile, "names", _fails(ZeroDivisionError("one\ntwo")))
    monkeypatch.setattr(sys, "argv", ["edgekit", *(["--debug"] if debug else []), "profiles", "list"])
    with pytest.raises(ZeroDivisionError if debug else SystemExit) as caught:
        cli.main()
    if not debug:
        assert caught.value.code == 1  # type: ignore[attr-defined]
        said = capsys.readouterr().err
        assert said.splitlines()[0] == "error: unexpected ZeroDivisionError"
        assert said.splitlines()[1] == "  why: one two"
        assert len(said.splitlines()) == 3


def test_ctrl_c_counts_even_if_a_library_swallows_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever error a library makes of an interrupt, it ends as one: exit 130."""

    def library() -> list[str]:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise TypeError("invalid combination of arguments") from None
        return []

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(interrupt, "_heard", False)
    monkeypatch.setattr(profile, "names", library)
    monkeypatch.setattr(sys, "argv", ["edgekit", "profiles", "list"])
    try:
        with pytest.raises(SystemExit) as caught:
            cli.main()
    finally:
        signal.signal(signal.SIGINT, handler)
    assert caught.value.code == 130
    assert "error: interrupted" in capsys.readouterr().err


# Profiles


def _one_document(result: Result) -> Any:
    assert result.code == 0, result.err
    return json.loads(result.out)


def test_profiles_are_listed_shown_validated_and_exported(forked: Forker, tmp_path: Path) -> None:
    """What is exported is valid and shows as the same device; ``--json`` prints one document each."""
    listed = _one_document(forked.run("profiles", "list", "--json", cwd=tmp_path))
    names = [entry["name"] for entry in listed]
    assert names == profile.names()
    text = forked.run("profiles", "list", cwd=tmp_path).out
    assert all(name in text for name in names)
    for name in names:
        shown = _one_document(forked.run("profiles", "show", name, "--json", cwd=tmp_path))
        exported = forked.run("profiles", "export", name, cwd=tmp_path)
        file = tmp_path / f"{name}.toml"
        file.write_text(exported.out)
        validated = _one_document(forked.run("profiles", "validate", file, "--json", cwd=tmp_path))
        assert validated == {"name": name, "digest": shown["digest"], "valid": True}


# Bundles


def test_the_bundle_can_be_inspected(compressed: Compressed, forked: Forker, tmp_path: Path) -> None:
    """``inspect`` describes both forms, for people and as one document, with the report's digest."""
    for form in (compressed.document["bundle"]["path"], compressed.archive):
        described = _one_document(forked.run("inspect", form, "--json", cwd=tmp_path))
        assert described["digest"] == compressed.document["bundle"]["digest"]
        assert described["signed"] is False
        assert described["precision"] == "int8"
        text = forked.run("inspect", form, cwd=tmp_path).out
        assert described["digest"] in text
        assert "image" in text


@pytest.mark.parametrize("form", ["directory", "file"])
def test_keygen_sign_verify(form: str, compressed: Compressed, forked: Forker, tmp_path: Path) -> None:
    """A signed bundle verifies with the public key: not unsigned, not with another key, not changed."""
    bundle = tmp_path / ("build" if form == "directory" else "build.edgekit")
    if form == "directory":
        shutil.copytree(compressed.document["bundle"]["path"], bundle)
    else:
        shutil.copy(compressed.archive, bundle)
    for name in ("mine", "other"):
        assert forked.run("keygen", name, cwd=tmp_path).code == 0
    assert (tmp_path / "mine.key").stat().st_mode & 0o777 == 0o600
    verify = ["verify", bundle, "--key", "mine.pub"]
    assert_three_lines(forked.run(*verify, cwd=tmp_path), 2)
    signed = forked.run("sign", bundle, "--key", "mine.key", cwd=tmp_path)
    assert signed.code == 0, signed.err
    verified = forked.run(*verify, cwd=tmp_path)
    assert verified.code == 0, verified.err
    assert "signed with the key" in verified.out
    described = _one_document(forked.run("inspect", bundle, "--json", cwd=tmp_path))
    assert described["signed"] is True
    assert described["digest"] == compressed.document["bundle"]["digest"]
    assert_three_lines(forked.run("verify", bundle, "--key", "other.pub", cwd=tmp_path), 2)
    victim = bundle / "model.onnx" if form == "directory" else bundle
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    assert_three_lines(forked.run(*verify, cwd=tmp_path), 2)
    assert_three_lines(forked.run("keygen", "mine", cwd=tmp_path), 2)


def test_deploying_where_no_agent_listens_is_exit_4(
    compressed: Compressed, forked: Forker, tmp_path: Path
) -> None:
    """No agent on that socket: something is missing on this machine."""
    result = forked.run("deploy", compressed.archive, "--to", f"unix://{tmp_path}/none.sock", cwd=tmp_path)
    assert "edgekit-agent serve" in assert_three_lines(result, 4)


def test_the_table_for_people_says_where_the_results_are(compressed: Compressed, tmp_path: Path) -> None:
    """Without ``--json``, a table, the bundle's and the report's path; progress is on standard error only."""
    from rich.console import Console

    from edgekit.report.document import Report
    from edgekit.terminal import result_table, served_line

    console = Console(width=120, record=True, file=(tmp_path / "table").open("w"))
    console.print(result_table(Report.model_validate(compressed.document)))
    console.file.close()
    text = console.export_text()
    for word in ("parameters", "latency p50", "top1 on 200 held-out samples", "int8"):
        assert word in text
    assert "200 identical" in served_line(200, 200, 1.0, 2.0)


def test_the_version_is_the_package_s(tmp_path: Path) -> None:
    """``--version`` names the program and its version."""
    import edgekit as package

    assert edgekit("--version", cwd=tmp_path).out.strip() == f"edgekit, version {package.__version__}"
