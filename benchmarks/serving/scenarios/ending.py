"""SIGTERM while 16 clients ask without pause, and go on asking."""

from __future__ import annotations

import time
from dataclasses import dataclass

from serving.bench import Bench, Judged, Result, Rounds, say
from serving.client import Outcome, ask
from serving.closed_loop import ClosedLoop
from serving.peers.base import Peer
from serving.server import Server, ServerError
from serving.venvs import EnvironmentFailed

_CLIENTS = 16
_BEFORE_S = 1.0
_AFTER_S = 6.0
_PROBE_AFTER_S = 1.0
_PROBE_TIMEOUT_S = 1.0
_EXIT_TIMEOUT_S = 6.0
_ORPHAN_GRACE_S = 1.0


def sigterm(bench: Bench) -> Result:
    """What is lost, what fails, what stays behind, and how long the end takes."""
    figures = {name: Rounds() for name in _Ending.__dataclass_fields__}
    for number in range(bench.rounds):
        say(f"  round {number + 1} of {bench.rounds}")
        for peer in bench.products():
            try:
                ending = _end(bench, peer)
            except (ServerError, EnvironmentFailed) as error:
                bench.leave_out(peer, error)
                continue
            for name, rounds in figures.items():
                rounds.add(peer.name, float(getattr(ending, name)))
    result = Result({name.replace("_", " "): rounds.worst() for name, rounds in figures.items()})
    for name, comparison, bound in (
        ("lost", "==", 0), ("failed", "==", 0), ("orphans", "==", 0), ("accepts_after_1_s", "==", 0),
        ("answers_after_1_s", "==", 0),
        ("exit_after_last_answer_s", "<=", 2.0),
    ):  # fmt: skip
        result.judged[f"sigterm_{name}"] = Judged(figures[name].worst().get("ours"), comparison, bound)
    result.notes.append("sigterm: the worst round; a server that had not ended after 12 s was killed")
    return result


@dataclass(frozen=True)
class _Ending:
    """How a server ended.

    Attributes:
        lost: requests that were sent whole and never answered.
        failed: answers other than 200.
        told_to_close: connections that ended with an announced close.
        orphans: processes that outlived the one that was started.
        accepts_after_1_s: whether a new connection was answered a second after SIGTERM.
        answers_after_1_s: how many requests on old connections were still answered after that second.
        exit_after_sigterm_s: the time to the end.
        exit_after_last_answer_s: the time from the last answer to the end.
    """

    lost: int
    failed: int
    told_to_close: int
    orphans: int
    accepts_after_1_s: bool
    answers_after_1_s: int
    exit_after_sigterm_s: float
    exit_after_last_answer_s: float


class _Watch:
    """Looked at by the client between answers: probes once, and notes when the server ends."""

    def __init__(self, server: Server, request: bytes, outcome: Outcome) -> None:
        self.accepts = False
        self.answers_before_probe: int | None = None
        self._outcome = outcome
        self.ended_s: float | None = None
        self._server = server
        self._request = request
        self._probe_s = time.perf_counter() + _PROBE_AFTER_S

    def __call__(self) -> bool:
        now = time.perf_counter()
        if self.ended_s is None and self._server.ended():
            self.ended_s = now
        if self.ended_s is None and now > self._probe_s:
            self._probe_s = float("inf")
            self.answers_before_probe = len(self._outcome.latencies_s)
            try:
                ask(self._server.address, self._request, _PROBE_TIMEOUT_S)
                self.accepts = True
            except OSError:
                self.accepts = False
        return self.ended_s is not None


def _end(bench: Bench, peer: Peer) -> _Ending:
    model = bench.models["cnn"]
    request = peer.request(model)
    with (
        bench.start(peer, [model]) as server,
        ClosedLoop(server.address, [request] * _CLIENTS) as loop,
    ):
        loop.run(bench.seconds(_BEFORE_S))
        told_s = time.perf_counter()
        server.terminate()
        watch = _Watch(server, request, loop.outcome)
        outcome = loop.run(_AFTER_S, watch)
        loop.collect()
        before = watch.answers_before_probe
        if server.wait(_EXIT_TIMEOUT_S):
            ended_s = watch.ended_s or time.perf_counter()
            time.sleep(_ORPHAN_GRACE_S)
            orphans = len(server.processes())
        else:
            ended_s, orphans = float("inf"), 0
        return _Ending(
            outcome.lost,
            outcome.failed + len(outcome.refused_s),
            outcome.told_to_close,
            orphans,
            watch.accepts,
            0 if before is None else len(outcome.latencies_s) - before,
            ended_s - told_s,
            ended_s - outcome.last_answer_s,
        )
