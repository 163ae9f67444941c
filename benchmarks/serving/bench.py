"""What every scenario is given, and what it gives back."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from serving import client, venvs
from serving.models import Model
from serving.peers.base import APPS, Peer, app_environment, verify
from serving.peers.floors import ECHO
from serving.peers.floors import ENVIRONMENT as BARE_ENVIRONMENT
from serving.peers.triton import DELAY, DYNAMIC
from serving.server import SERVER_CORE, Server, ServerError, on_core, running

#: Figure -> server -> value; None: not measured.
Table = dict[str, dict[str, float | None]]


@dataclass(frozen=True)
class Judged:
    """A figure that has a target."""

    value: float | None
    comparison: str
    bound: float


@dataclass
class Result:
    """What a scenario found.

    Attributes:
        table: what it measured, a row for each figure.
        judged: what the project promises.
        notes: what a reader should know.
    """

    table: Table = field(default_factory=dict)
    judged: dict[str, Judged] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class Bench:
    """A run of the benchmark.

    Attributes:
        work: a short temporary directory.
        models: ``tiny``, ``cnn`` and ``mlp``.
        peers: the servers to compare, ours first.
        rounds: how often each measurement is repeated, interleaved with the others'.
        quick: whether measurements are cut short.
        absent: why a server that was asked for is missing.
    """

    work: Path
    models: Mapping[str, Model]
    peers: Sequence[Peer]
    rounds: int
    quick: bool
    absent: dict[str, str] = field(default_factory=dict)
    _started: int = 0

    def seconds(self, full: float) -> float:
        """How long a measurement takes in this run."""
        return full / 5 if self.quick else full

    def count(self, full: int) -> int:
        """How many requests a measurement takes in this run."""
        return max(full // 5, 20) if self.quick else full

    def find(self, prefix: str) -> list[str]:
        """Names of the peers that start with ``prefix`` and are here."""
        return [p.name for p in self.peers if p.name.startswith(prefix) and p.name not in self.absent]

    def directory(self, name: str) -> Path:
        """A fresh directory."""
        self._started += 1
        directory = self.work / f"{name}-{self._started}"
        directory.mkdir()
        return directory

    @contextmanager
    def start(self, peer: Peer, models: Sequence[Model]) -> Iterator[Server]:
        """A server with ``models``, checked to answer each rightly.

        Raises:
            ServerError: it does not start or answers wrongly.
            EnvironmentFailed: it cannot be installed.
        """
        venvs.prepare(peer.environment)
        directory = self.directory(peer.name)
        launch = peer.launch(directory, models)
        probes = [peer.request(model) for model in models]
        with running(launch, directory / "server.log", probes) as server:
            for model in models:
                verify(peer, server, model, client.ask)
            yield server

    @contextmanager
    def fleet(self, peers: Sequence[Peer], models: Sequence[Model]) -> Iterator[dict[Peer, Server]]:
        """All of ``peers`` at once, idle until asked; who fails is left out and named in ``absent``."""
        with ExitStack() as stack:
            servers: dict[Peer, Server] = {}
            for peer in peers:
                say(f"  starting {peer.name}")
                try:
                    servers[peer] = stack.enter_context(self.start(peer, models))
                except (ServerError, venvs.EnvironmentFailed, subprocess.SubprocessError) as error:
                    self.leave_out(peer, error)
            try:
                yield servers
            finally:
                for server in servers.values():
                    server.terminate()  # all at once; the stack then waits for each

    def servers(self) -> list[Peer]:
        """The peers that run models: all but the one that shows the client's own limit."""
        return [peer for peer in self.peers if peer is not ECHO]

    def products(self) -> list[Peer]:
        """One setting of each server, for what a setting does not change; without those that failed."""
        return [
            peer for peer in self.servers() if peer not in (DYNAMIC, DELAY) and peer.name not in self.absent
        ]

    def leave_out(self, peer: Peer, why: Exception) -> None:
        """Go on without a peer that does not run here."""
        self.absent[peer.name] = str(why)
        say(f"  {peer.name} is left out: {why}")

    @contextmanager
    def bare(self) -> Iterator[Bare]:
        """``session.run`` without a server, on the servers' core."""
        venvs.prepare(BARE_ENVIRONMENT)
        bare = Bare(list(self.models.values()))
        try:
            yield bare
        finally:
            bare.close()


class Bare:
    """A process that runs the models when it is told to."""

    def __init__(self, models: Sequence[Model]) -> None:

        with on_core(SERVER_CORE):
            self._process = subprocess.Popen(
                [BARE_ENVIRONMENT.python, APPS / "bare_app.py"], text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                env={**os.environ, "OMP_NUM_THREADS": "1", **app_environment(models)},
            )  # fmt: skip

    def run(self, model: str, runs: int) -> float:
        """The median seconds of ``runs`` runs of one row."""
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("the process has no pipes")
        self._process.stdin.write(f"{model} {runs}\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


class Rounds:
    """Values of each server, one a round."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}

    def add(self, name: str, value: float) -> None:
        """The next round's value."""
        self._values.setdefault(name, []).append(value)

    def of(self, name: str) -> list[float]:
        """All rounds."""
        return self._values.get(name, [])

    def medians(self, factor: float = 1.0) -> dict[str, float | None]:
        """The median of each server, times ``factor``."""
        return {name: factor * statistics.median(values) for name, values in self._values.items()}

    def worst(self) -> dict[str, float | None]:
        """The largest of each server."""
        return {name: max(values) for name, values in self._values.items()}

    def ratio(self, name: str, others: Sequence[str], best: str) -> float | None:
        """The median over the rounds of ``name`` over the best of ``others`` in the same round.

        Args:
            name: the numerator.
            others: the candidates for the denominator.
            best: ``least`` or ``most``.
        """
        present = [self._values[other] for other in others if other in self._values]
        if not present or name not in self._values:
            return None
        choose = min if best == "least" else max
        columns = zip(self._values[name], *present, strict=True)
        return float(statistics.median(mine / choose(theirs) for mine, *theirs in columns))


def settle(server: Server) -> None:
    """Wait until a server has nothing left to do, at most ten seconds."""
    for _ in range(50):
        before_s = server.cpu_s()
        time.sleep(0.2)
        if server.cpu_s() - before_s < 0.02:
            return


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)
