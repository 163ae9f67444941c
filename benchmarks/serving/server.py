"""A server as a process: started on a core, asked until it answers, watched, and stopped with all it started.

A server is every process that carries its mark in the environment or belongs to its session (setsid),
whoever the parent is by then: some start workers in sessions of their own, others rewrite their environment.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from serving import client, wire

SERVER_CORE = 0
CLIENT_CORE = 1
_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 10.0
_POLL_S = 0.002
_KILL_ROUNDS = 100
_KILL_PAUSE_S = 0.02
_MARK = "BENCH_SERVER"


@dataclass(frozen=True)
class Launch:
    """How a server is started.

    Attributes:
        command: program and arguments.
        port: where it will answer HTTP, on 127.0.0.1.
        environment: added to this process's own.
        directory: its working directory; None: this one.
    """

    command: Sequence[str | Path]
    port: int
    environment: Mapping[str, str] = field(default_factory=dict)
    directory: Path | None = None


class ServerError(Exception):
    """A server did not start, or answered wrongly."""


class Server:
    """A server that runs.

    Attributes:
        address: where it answers HTTP.
        first_answer_s: from exec until every probe was answered well.
    """

    def __init__(self, launch: Launch, log: Path, probes: Sequence[bytes]) -> None:
        """Start it, and return when every one of ``probes`` has been answered with 200.

        Raises:
            ServerError: it ended, or did not answer in time; the message has its last words.
        """
        self.address = ("127.0.0.1", launch.port)
        self._log = log
        self._mark = uuid.uuid4().hex
        with log.open("wb") as sink, on_core(SERVER_CORE):
            begin = time.perf_counter()
            self._process = subprocess.Popen(
                [str(part) for part in launch.command],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                cwd=launch.directory,
                env={**os.environ, "OMP_NUM_THREADS": "1", _MARK: self._mark, **launch.environment},
                start_new_session=True,
            )
        try:
            for probe in probes:
                self._wait_for(probe)
        except BaseException:
            self.kill()
            raise
        self.first_answer_s = time.perf_counter() - begin

    def _wait_for(self, probe: bytes) -> None:
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline_s:
            if self._process.poll() is not None:
                raise ServerError(f"the server ended with {self._process.returncode}: {self._last_words()}")
            with suppress(OSError, wire.WireError):  # not yet
                if wire.parse(client.ask(self.address, probe)).status == 200:
                    return
            time.sleep(_POLL_S)
        raise ServerError(f"the server did not answer in {_START_TIMEOUT_S:g} s: {self._last_words()}")

    def _last_words(self) -> str:
        return " | ".join(self._log.read_text(errors="replace").strip().splitlines()[-5:])

    def processes(self) -> list[int]:
        """The ids of every process of the server."""
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if self._owns(pid)]

    def _owns(self, pid: int) -> bool:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
            environment = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            return False  # it has just ended, or is someone else's
        state, _, _, session = stat.rpartition(")")[2].split()[:4]
        marked = f"{_MARK}={self._mark}".encode() in environment
        return state != "Z" and (marked or int(session) == self._process.pid)

    def pss_bytes(self) -> int:
        """Memory of all processes, what they share divided among those who share it."""
        total = 0
        for pid in self.processes():
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
        return total

    def held_bytes(self) -> int:
        """Memory of all processes that is no file's; unlike PSS, other programs do not change it."""
        total = 0
        for pid in self.processes():
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            held = (line for line in lines if line.startswith(("Anonymous:", "Pss_Shmem:")))
            total += sum(int(line.split()[1]) for line in held) * 1024
        return total

    def cpu_s(self) -> float:
        """Processor time of all threads that live, to the nanosecond."""
        tasks = (task for pid in self.processes() for task in Path(f"/proc/{pid}/task").iterdir())
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9

    def terminate(self) -> None:
        """Send SIGTERM to the process that was started, as a service manager does first."""
        self._process.terminate()

    def ended(self) -> bool:
        """Whether the process that was started has ended."""
        return self._process.poll() is not None

    def wait(self, timeout_s: float) -> bool:
        """Whether the process that was started ends within ``timeout_s``."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def stop(self) -> None:
        """Ask it to end, and end what remains."""
        if not self.ended():
            self.terminate()
            self.wait(_STOP_TIMEOUT_S)
        self.kill()

    def kill(self) -> None:
        """End every process of the server now, and return when they are gone."""
        for _ in range(_KILL_ROUNDS):
            left = self.processes()
            if not left:
                break
            for pid in left:
                with suppress(ProcessLookupError):  # it ended by itself
                    os.kill(pid, signal.SIGKILL)
            time.sleep(_KILL_PAUSE_S)
        self._process.wait()


@contextmanager
def running(launch: Launch, log: Path, probes: Sequence[bytes]) -> Iterator[Server]:
    """A server for the length of a ``with`` block.

    Raises:
        ServerError: it did not start.
    """
    server = Server(launch, log, probes)
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """Run this process, and what it starts meanwhile, on one core; on the only one where there is one."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core} if core in before or len(before) > 1 else before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def free_port() -> int:
    """A port on loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
