"""The agent as one executable file: unpacked once, by whoever runs it, and then as good as installed."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from device_agent.packaging import onefile
from device_agent.packaging.bootstrap import CannotStart, cache_of
from device_agent.packaging.site import SOURCES, requirements
from device_agent.packaging.target import Target

# What a stand-in for the agent prints: where it came from, and what it could be changed by.
_STAND_IN = """
import sys
def main():
    print(__file__, VERSION, sys.flags.isolated, *sys.argv[1:])
    sys.stdout.flush()
    sys.stdin.read()
    return 3
"""


def make(directory: Path, version: int = 1) -> Path:
    """The one-file executable of a stand-in for the agent, for this machine."""
    package = directory / f"site{version}" / "device_agent"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text("")
    (package / "cli.py").write_text(f"VERSION = {version}\n{_STAND_IN}")
    return onefile.assemble(Target.here(), package.parent, directory / f"out{version}")


def start(file: Path, cache: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start the file the way a shell does, in an empty environment."""
    argv = [sys.executable, str(file), *arguments]
    where = {"PATH": os.environ["PATH"], "XDG_CACHE_HOME": str(cache), **environment}
    pipe = subprocess.PIPE
    return subprocess.Popen(argv, env=where, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def run(file: Path, cache: Path, *arguments: str, **environment: str) -> tuple[int, str, str]:
    """Run the file to its end; exit code, output and errors."""
    with start(file, cache, *arguments, **environment) as process:
        out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def unpacked(cache: Path) -> list[Path]:
    """The versions in a cache, and what else is there but locks."""
    return [path for path in (cache / "edgekit-agent").iterdir() if path.suffix != ".lock"]


def test_the_file_runs_by_itself(tmp_path: Path) -> None:
    """It is executable, names the Python that it is for, and passes on arguments and the exit code."""
    file = make(tmp_path)
    assert os.access(file, os.X_OK)
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert file.read_bytes().startswith(f"#!/usr/bin/env python{version}\n".encode())
    code, out, err = run(file, tmp_path / "cache", "check", "--json")
    (site,) = unpacked(tmp_path / "cache")
    assert (code, err) == (3, "")
    assert out.split() == [str(site / "device_agent" / "cli.py"), "1", "1", "check", "--json"]
    assert site.stat().st_mode & 0o077 == site.parent.stat().st_mode & 0o077 == 0


def test_nothing_around_it_changes_what_runs(tmp_path: Path) -> None:
    """Neither PYTHONPATH nor a module in the working directory takes the place of what it carries."""
    other = tmp_path / "other" / "device_agent"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("raise SystemExit('the wrong one')")
    code, _, err = run(make(tmp_path), tmp_path / "cache", PYTHONPATH=str(other.parent))
    assert (code, err) == (3, "")


def test_it_is_unpacked_once_though_two_start_at_once(tmp_path: Path) -> None:
    """Processes that start together all run, and there is one whole copy, which later starts find."""
    file = make(tmp_path)
    together = [start(file, tmp_path / "cache") for _ in range(6)]
    done = [(process.communicate(timeout=60), process.returncode) for process in together]
    assert [code for _, code in done] == [3] * 6, done
    (site,) = unpacked(tmp_path / "cache")
    marker = site / "device_agent" / "kept"
    marker.write_text("")
    assert run(file, tmp_path / "cache")[0] == 3
    assert marker.exists()


def test_what_an_interrupted_start_left_is_not_used(tmp_path: Path) -> None:
    """A copy that a killed process left half done is replaced."""
    file = make(tmp_path)
    run(file, tmp_path / "cache")
    (site,) = unpacked(tmp_path / "cache")
    shutil.rmtree(site / "device_agent")
    site.rename(site.with_suffix(".partial"))
    assert run(file, tmp_path / "cache")[0] == 3
    assert unpacked(tmp_path / "cache") == [site]


def test_an_upgrade_removes_the_old_copy_once_nobody_runs_it(tmp_path: Path) -> None:
    """The old version goes on undisturbed while the new one runs; after its end the next start removes it."""
    old, new, cache = make(tmp_path, 1), make(tmp_path, 2), tmp_path / "cache"
    with start(old, cache) as running:
        assert running.stdout is not None
        running.stdout.readline()
        run(new, cache)
        assert len(unpacked(cache)) == 2
        running.communicate(timeout=60)
    run(new, cache)
    assert len(unpacked(cache)) == 1


def test_a_cache_that_others_can_write_is_refused(tmp_path: Path) -> None:
    """What another user could have put there is not run; three lines say so."""
    (tmp_path / "cache" / "edgekit-agent").mkdir(parents=True)
    (tmp_path / "cache" / "edgekit-agent").chmod(0o777)
    code, out, err = run(make(tmp_path), tmp_path / "cache")
    assert (code, out, len(err.splitlines())) == (4, "", 3)
    assert "others can write" in err


def test_another_python_is_told_which_one_it_takes(tmp_path: Path) -> None:
    """On a Python that its libraries are not built for, the file says so instead of failing to import."""
    package = tmp_path / "site"
    package.mkdir()
    file = onefile.assemble(Target(Target.here().architecture, "3.99"), package, tmp_path)
    code, _, err = run(file, tmp_path / "cache")
    assert (code, len(err.splitlines())) == (4, 3)
    assert "3.99" in err


def test_the_same_sources_give_the_same_file(tmp_path: Path) -> None:
    """Two builds are equal byte for byte."""
    assert make(tmp_path / "a").read_bytes() == make(tmp_path / "b").read_bytes()


def test_the_cache_is_where_the_system_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service's directory, then the user's; without any, the error says which variable to set."""
    both = {"CACHE_DIRECTORY": "/var/cache/a:/var/cache/b", "XDG_CACHE_HOME": "/x"}
    assert cache_of(both) == Path("/var/cache/a/edgekit-agent")
    assert cache_of({"XDG_CACHE_HOME": "/x"}) == Path("/x/edgekit-agent")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_of({"XDG_CACHE_HOME": "relative"}) == tmp_path / ".cache" / "edgekit-agent"
    monkeypatch.setenv("HOME", "/nonexistent")
    with pytest.raises(CannotStart, match="XDG_CACHE_HOME"):
        cache_of({})


# The agent itself


def copy_of_this_environment(site: Path) -> Path:
    """The agent and what it imports, from where this test runs, in the place of what pip would fetch."""
    ignored = shutil.ignore_patterns("__pycache__", "packaging")
    shutil.copytree(SOURCES, site / "device_agent", ignore=ignored)
    for requirement in requirements(Target.here()):
        name = requirement.split("==")[0]
        if name in ("grpcio", "pycparser", "typing-extensions"):
            continue  # not needed to serve over HTTP
        for entry in metadata.files(name) or ():
            source = Path(str(entry.locate()))
            if ".." not in entry.parts and "__pycache__" not in entry.parts and source.is_file():
                (site / entry).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, site / entry)
    return site


def repository(root: Path) -> Path:
    """A Triton-layout repository with one model that gives back what it gets."""
    spec = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "echo", spec[:1], spec[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (root / "echo" / "1").mkdir(parents=True)
    onnx.save(model, root / "echo" / "1" / "model.onnx")
    return root


@contextmanager
def serving(file: Path, root: Path, config: Path) -> Iterator[str]:
    """The file serves a repository; the address of its HTTP door."""
    log = root / "log"
    argv = [
        sys.executable,
        file,
        "serve",
        "--config",
        config,
        "--model-repository",
        repository(root / "models"),
    ]
    with log.open("wb") as sink:
        process = subprocess.Popen(
            argv, env={"XDG_CACHE_HOME": str(root / "cache")}, cwd=root, stdout=sink, stderr=sink
        )
    try:
        deadline_s = time.monotonic() + 60
        while (found := re.search(r"listening http=(\S+)", log.read_text())) is None:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline_s, log.read_text()
            time.sleep(0.05)
        yield found[1]
        process.terminate()
        assert process.wait(60) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.mark.slow
def test_the_agent_checks_the_device_and_serves_out_of_one_file(tmp_path: Path) -> None:
    """With nothing but Python around it, it finds its native libraries and answers a request."""
    site = copy_of_this_environment(tmp_path / "site")
    file = onefile.assemble(Target.here(), site, tmp_path / "out")
    config = tmp_path / "agent.toml"
    config.write_text(
        f'state_dir = "{tmp_path}/state"\nkeys_dir = "{tmp_path}/keys"\n'
        f'control_socket = "{tmp_path}/control.sock"\nallow_unsigned = true\nthreads = 1\n'
        "[http]\nport = 0\n[metrics]\nport = 0\n[grpc]\nenabled = false\n"
    )
    code, out, err = run(file, tmp_path / "cache", "check", "--json", "--config", str(config))
    assert (code, json.loads(out)["ok"]) == (0, True), err
    with serving(file, tmp_path, config) as address:
        connection = http.client.HTTPConnection(address, timeout=60)
        tensor = {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1.5, 2.0]}
        connection.request("POST", "/v2/models/echo/infer", json.dumps({"inputs": [tensor]}))
        answer = json.loads(connection.getresponse().read())
        connection.close()
    assert answer["outputs"][0]["data"] == [1.5, 2.0]
