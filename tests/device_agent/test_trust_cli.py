"""Trust as a person at the device meets it: keys, rotations, downgrades, and unsigned bundles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable, List, Tuple

import pytest

from agent_testing import AgentProcess, linear_bundle
from device_agent import cli
from storage_kit import make_key, rotation_to, sign_bundle

Run = Callable[..., Tuple[int, List[str], List[str]]]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command on a device without an agent; return its exit code and what it printed."""
    config = tmp_path / "agent.toml"
    config.write_text(
        f'state_dir = "{tmp_path / "state"}"\nkeys_dir = "{tmp_path / "keys"}"\n'
        f'control_socket = "{tmp_path / "control.sock"}"\nthreads = 1\n'
    )

    def run_command(*arguments: str) -> Tuple[int, List[str], List[str]]:
        code = cli.main([*arguments, "--config", str(config)])
        printed = capsys.readouterr()
        return code, printed.out.splitlines(), printed.err.splitlines()

    return run_command


def _signed(directory: Path, key: Any, version: int) -> str:
    linear_bundle(directory, seed=version, version=version)
    return sign_bundle(directory, key).digest


def test_a_rotation_document_is_taken_and_shown(tmp_path: Path, run: Run) -> None:
    """``trust FILE`` takes it; ``trust``, ``status`` and ``check`` show which keys count."""
    old, new = make_key(tmp_path / "keys", "release"), make_key(None)
    (tmp_path / "rotation").write_bytes(rotation_to(new, old, 1, "release-2", retire=True))
    code, out, _ = run("trust", str(tmp_path / "rotation"))
    assert (code, out[0][:18], out[1]) == (0, "trusted: release-2", "retired: release")
    code, keys, _ = run("trust")
    assert [line.split()[1] for line in keys] == ["release", "release-2"]
    assert keys[0].endswith(" retired")
    assert keys[1].endswith(" named by release")
    assert run("status")[1] == keys
    (finding,) = [line for line in run("check")[1] if " keys: " in line]
    assert finding.endswith("trusted keys: release (retired), release-2")
    documents = json.loads("\n".join(run("trust", "--json")[1]))
    assert [(key["name"], key["retired"]) for key in documents] == [("release", True), ("release-2", False)]


@pytest.mark.parametrize(
    ("content", "what"),
    [(None, "cannot be read"), (b"{}", "not a usable rotation document"), (b"\xff", "not a usable rotation")],
)
def test_another_file_is_no_rotation(tmp_path: Path, run: Run, content: Any, what: str) -> None:
    """A file that is missing or something else is exit code 2 and three lines."""
    if content is not None:
        (tmp_path / "rotation").write_bytes(content)
    code, out, err = run("trust", str(tmp_path / "rotation"))
    assert (code, out, len(err)) == (2, [], 3)
    assert what in err[0]


def test_a_downgrade_is_a_refusal_that_names_its_override(tmp_path: Path, run: Run) -> None:
    """Exit code 5, in three lines that name the way out; with --allow-downgrade the old version serves."""
    key = make_key(tmp_path / "keys")
    old = _signed(tmp_path / "1", key, 1)
    _signed(tmp_path / "2", key, 2)
    assert run("install", str(tmp_path / "2"))[0] == 0
    code, out, err = run("install", str(tmp_path / "1"))
    assert (code, out) == (5, [])
    assert err[-3:][0].startswith("version 1 of 'model' is older")
    assert "--allow-downgrade" in err[-1]
    assert run("install", str(tmp_path / "1"), "--allow-downgrade")[0] == 0
    assert [line.split()[2] for line in run("list")[1] if " active" in line] == [old[:12]]


def test_an_agent_that_lets_in_unsigned_bundles_says_so_at_every_start(
    tmp_path: Path, start_agent: Callable[..., AgentProcess]
) -> None:
    """The warning is in the log of each start, whatever is installed, and names each unsigned model."""
    agent = start_agent(linear_bundle(tmp_path / "b"))
    for _ in range(2):
        agent.wait_for("WARNING .*allow_unsigned is set")
        agent.wait_for("WARNING .*model version 1 is not signed")
        assert agent.stop() == 0
        agent.start()


def test_a_running_agent_takes_rotations(tmp_path: Path, start_agent: Callable[..., AgentProcess]) -> None:
    """Over the control socket a rotation counts at once, and also after a restart."""
    agent = start_agent()
    keys, config = agent.control.with_name("keys"), str(agent.control.with_name("agent.toml"))
    old, new = make_key(keys, "release"), make_key(None)
    (tmp_path / "rotation").write_bytes(rotation_to(new, old, 1, retire=True))
    _signed(tmp_path / "1", old, 1)
    _signed(tmp_path / "2", new, 2)
    assert cli.main(["install", str(tmp_path / "2"), "--config", config]) == 2
    assert cli.main(["trust", str(tmp_path / "rotation"), "--config", config]) == 0
    assert cli.main(["install", str(tmp_path / "1"), "--config", config]) == 2
    assert cli.main(["install", str(tmp_path / "2"), "--config", config]) == 0
    assert agent.stop() == 0
    agent.start()
    assert cli.main(["status", "--config", config]) == 0
