"""``edgekit-agent`` as a person or a script uses it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest

from agent_testing import AgentProcess, linear_bundle
from device_agent import archive, cli
from device_agent.errors import AgentError
from device_agent.server import control
from storage_kit import make_bundle, make_key, sign_bundle, signed_bundle


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration of a device that serves nothing yet and trusts one key."""
    path = tmp_path / "agent.toml"
    path.write_text(
        f'state_dir = "{tmp_path / "state"}"\nkeys_dir = "{tmp_path / "keys"}"\n'
        f'control_socket = "{tmp_path / "control.sock"}"\nthreads = 1\n'
    )
    return path


@pytest.fixture
def run(config: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run a command that must succeed, and return what ``--json`` printed."""

    def run_command(*arguments: str) -> Any:
        assert cli.main([*arguments, "--config", str(config), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run_command


def _signed(directory: Path, key: Any, **changes: Any) -> str:
    """A bundle of a real model, signed."""
    linear_bundle(directory, **changes)
    return sign_bundle(directory, key).digest


def test_a_device_is_administered_without_a_running_agent(tmp_path: Path, run: Callable[..., Any]) -> None:
    """Every command works on the store itself when no agent runs, with the self-test in its own process."""
    key = make_key(tmp_path / "keys")
    first = _signed(tmp_path / "1", key)
    second = _signed(tmp_path / "2", key, seed=1, version=2)
    assert run("install", str(tmp_path / "1"))["state"] == "committed"
    assert run("install", str(tmp_path / "2"), "--no-activate")["state"] == "staged"
    assert run("activate", second[:12])["previous"] == first
    assert run("rollback")["digest"] == first
    assert {v["digest"]: v["active"] for v in run("list")} == {first: True, second: False}
    assert run("status")[0]["last_operation"]["state"] == "committed"
    assert run("remove", second) == {"name": "model", "digest": second}
    assert [v["digest"] for v in run("list")] == [first]


def test_output_for_people(tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --json a command prints a line or two on standard output, progress on standard error."""
    digest = _signed(tmp_path / "1", make_key(tmp_path / "keys"))
    assert cli.main(["install", str(tmp_path / "1"), "--config", str(config)]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"committed model 1 {digest[:12]} (signed by release)\n"
    assert printed.err.split()[-1] == "committed"
    assert cli.main(["list", "--config", str(config)]) == 0
    assert capsys.readouterr().out == f"model 1 {digest[:12]} active committed\n"
    assert cli.main(["status", "--config", str(config)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "model: not served"


@pytest.mark.parametrize(
    ("arguments", "code", "what"),
    [
        (["install", "/nowhere"], 2, "cannot be read"),
        (["activate", "0123456789"], 2, "names no installed version"),
        (["remove", "01"], 2, "too short"),
        (["rollback"], 2, "which model"),
        (["rollback", "absent"], 2, "no version to return to"),
        (["list", "--config", "/nowhere.toml"], 2, "/nowhere.toml"),
    ],
)
def test_an_error_is_three_lines(
    config: Path, capsys: pytest.CaptureFixture[str], arguments: List[str], code: int, what: str
) -> None:
    """What, why and what to do, on standard error, nothing on standard output, and the promised exit code."""
    if "--config" not in arguments:
        arguments = [*arguments, "--config", str(config)]
    assert cli.main(arguments) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 3
    assert what in printed.err.splitlines()[0]


def test_refusals_have_their_exit_codes(tmp_path: Path, config: Path) -> None:
    """2 for a bundle that is not trusted, 5 for one that fails its self-test; progress, then three lines."""
    make_bundle(tmp_path / "unsigned")
    command = [sys.executable, "-m", "device_agent.cli", "install", "--config", str(config)]
    untrusted = subprocess.run([*command, str(tmp_path / "unsigned")], stderr=subprocess.PIPE)
    assert untrusted.returncode == 2
    assert [line[:3] for line in untrusted.stderr.decode().splitlines()] == ["rec", "the", "it ", "sig"]
    signed_bundle(tmp_path / "no-model", make_key(tmp_path / "keys"))
    refused = subprocess.run([*command, str(tmp_path / "no-model")], stderr=subprocess.PIPE)
    assert refused.returncode == 5
    assert refused.stderr.decode().split()[:3] == ["received", "verified", "staged"]
    assert len(refused.stderr.splitlines()) == 6


def test_bad_usage_is_exit_code_2(config: Path) -> None:
    """An unknown command or a missing argument is bad usage."""
    for arguments in ([], ["fly"], ["install"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 2


def test_debug_shows_the_traceback(config: Path) -> None:
    """--debug lets the error through as it was raised."""
    with pytest.raises(Exception, match="names no installed version"):
        cli.main(["activate", "0123456789", "--debug", "--config", str(config)])


def test_check_says_whether_the_device_can_serve(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything serving needs is looked at; a missing runtime is exit code 4 and says its name."""
    make_key(tmp_path / "keys")
    assert cli.main(["check", "--json", "--config", str(config)]) == 0
    document: Dict[str, Any] = json.loads(capsys.readouterr().out)
    assert document["ok"] is True
    found = {finding["subject"]: finding["status"] for finding in document["findings"]}
    assert {"python", "onnxruntime", "state_dir", "memory", "keys"} <= set(found)
    assert found["keys"] == "ok"
    (tmp_path / "keys" / "broken.pub").write_text("not a key")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert cli.main(["check", "--config", str(config)]) == 4
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("missing") and "onnxruntime" in line for line in lines)
    assert any(line.startswith("warning") and "broken.pub" in line for line in lines)
    assert not (tmp_path / "state").exists()


def test_commands_reach_the_running_agent(
    tmp_path: Path, start_agent: Callable[..., AgentProcess], capsys: pytest.CaptureFixture[str]
) -> None:
    """While an agent serves, the same commands act on it: a new version takes over without a restart."""
    first = linear_bundle(tmp_path / "1")
    second = linear_bundle(tmp_path / "2", seed=1, version=2)
    agent = start_agent(first)
    config = str(agent.control.with_name("agent.toml"))

    def ask(*arguments: str) -> Any:
        assert cli.main([*arguments, "--json", "--config", config]) == 0
        return json.loads(capsys.readouterr().out)

    assert ask("status")[0]["serving"] == first.digest
    assert ask("install", str(second.directory))["previous"] == first.digest
    assert ask("status")[0]["serving"] == second.digest
    assert ask("rollback")["digest"] == first.digest
    assert ask("status")[0]["serving"] == first.digest
    assert agent.stop() == 0
    agent.start()
    assert ask("status")[0]["serving"] == first.digest


def _hides(directory: Path) -> List[str]:
    """A launcher whose process sees an empty directory there, as systemd's ProtectHome= shows /root."""
    mount = 'mount -t tmpfs -o mode=0700 tmpfs "$0" && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", mount, str(directory)]


def _can_hide(directory: Path) -> bool:
    try:
        return subprocess.run([*_hides(directory), "true"], stderr=subprocess.DEVNULL).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("form", ["directory", "file"])
def test_a_bundle_that_the_agent_cannot_read_is_installed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    """The command reads it and hands it over, so root's home serves as well as /srv."""
    home = tmp_path / "home"
    bundle = linear_bundle(home / "b")
    archive.pack(bundle.directory, home / "b.edgekit")
    path = bundle.directory if form == "directory" else home / "b.edgekit"
    if not _can_hide(home):
        pytest.skip("this user may not make a mount namespace")
    (tmp_path / "agent").mkdir()
    agent = AgentProcess(tmp_path / "agent")
    agent.launcher = _hides(home)
    agent.start()
    try:
        with pytest.raises(AgentError, match=r"cannot be read|manifest"):
            control.request(agent.control, {"op": "install", "bundle": str(path)}, lambda state: None)
        assert cli.main(["install", str(path), "--config", str(agent.config)]) == 0
        printed = capsys.readouterr()
        assert printed.out == f"committed model 1 {bundle.digest[:12]} (not signed)\n"
        assert printed.err.split()[:4] == ["received", "verified", "staged", "prepared"]
    finally:
        agent.kill()


def test_the_choices_of_install_reach_the_running_agent(
    tmp_path: Path, start_agent: Callable[..., AgentProcess], capsys: pytest.CaptureFixture[str]
) -> None:
    """--no-activate stops at staged, and an older version needs --allow-downgrade, as without an agent."""
    old, new = linear_bundle(tmp_path / "1"), linear_bundle(tmp_path / "2", seed=1, version=2)
    config = ["--json", "--config", str(start_agent(new).config)]
    assert cli.main(["install", str(old.directory), *config]) == 5
    assert "older" in capsys.readouterr().err
    assert cli.main(["install", str(old.directory), "--no-activate", "--allow-downgrade", *config]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "staged"
    assert cli.main(["install", str(tmp_path / "nowhere"), *config]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_a_store_that_is_in_use_is_not_touched(
    tmp_path: Path, start_agent: Callable[..., AgentProcess], capsys: pytest.CaptureFixture[str]
) -> None:
    """If the agent runs but its socket is gone, a command refuses rather than write beside it."""
    agent = start_agent(linear_bundle(tmp_path / "1"))
    agent.control.unlink()
    assert cli.main(["list", "--config", str(agent.control.with_name("agent.toml"))]) == 5
    assert "is in use" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may be somebody else")
@pytest.mark.parametrize("command", ["list", "install"])
def test_root_leaves_nothing_in_the_store_of_another_user(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """While no agent runs root is refused, and told as whom to run it: the agent can still use its store."""
    state = tmp_path / "state"
    state.mkdir()
    os.chown(str(state), 65534, 65534)
    _signed(tmp_path / "1", make_key(tmp_path / "keys"))
    arguments = [str(tmp_path / "1")] if command == "install" else []
    assert cli.main([command, *arguments, "--config", str(config)]) == 5
    lines = capsys.readouterr().err.splitlines()
    assert (len(lines), list(state.iterdir())) == (3, [])
    assert "sudo -u" in lines[2]


def test_the_command_starts_fast_and_light() -> None:
    """Parsing loads neither numpy nor a runtime: a script may call the command often."""
    code = "import sys, device_agent.cli; device_agent.cli._parser(); print(sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True).stdout.decode()
    for heavy in ("numpy", "onnxruntime", "asyncio", "cryptography"):
        assert f"'{heavy}'" not in modules
