"""The serving benchmark: its client counts rightly, and its scenarios run against the agent."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import client, open_loop, run, venvs, wire
from serving.bench import Bench, Rounds
from serving.closed_loop import ClosedLoop
from serving.models import write_models
from serving.peers.floors import AIOHTTP, ECHO, RAW
from serving.peers.ours import OURS
from serving.scenarios.ending import sigterm
from serving.scenarios.footprint import footprint
from serving.scenarios.open_loop import quantile
from serving.scenarios.swaps import swaps
from serving.server import Launch, free_port, running
from serving.table import render

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
REQUEST = wire.post("/x", b"", "text/plain")
GOOD = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
LAST = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok"
BUSY = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"
WRONG = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n"

Script = Callable[[int], "bytes | None"]


@contextmanager
def scripted(answer: Script, connections: int | None = None) -> Iterator[client.Address]:
    """A server of one thread that answers request number n with ``answer(n)``, or closes where that is None.

    After ``connections`` connections it takes no more.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()

    def serve() -> None:
        number = accepted = 0
        while connections is None or accepted < connections:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            accepted += 1
            if accepted == connections:
                listener.close()
            with peer:
                while peer.recv(len(REQUEST), socket.MSG_WAITALL):
                    data = answer(number)
                    number += 1
                    if data is None:
                        break
                    peer.sendall(data)
                    if data == LAST:
                        break

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield address
    finally:
        listener.close()


@pytest.fixture
def installed_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environments of ours and the floors are this interpreter's own, so nothing is installed."""
    if importlib.util.find_spec("aiohttp") is None:
        pytest.skip("aiohttp is not installed")
    home = tmp_path / "environments"
    home.mkdir()
    monkeypatch.setattr(venvs, "HOME", home)
    for peer in (OURS, RAW):
        peer.environment.directory.symlink_to(sys.prefix)
        peer.environment.stamp.write_text(json.dumps(peer.environment.wanted))


@pytest.fixture
def bench(installed_here: None, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """One short round of ours and a floor."""
    work = tmp_path_factory.mktemp("b")
    return Bench(work, write_models(work), [OURS, RAW], rounds=1, quick=True)


# The client


@given(st.binary(max_size=50), st.integers(200, 599), st.lists(st.integers(1, 20), min_size=1))
def test_answer_is_read_however_it_arrives(body: bytes, status: int, cuts: Sequence[int]) -> None:
    """An answer in pieces of any size is the answer that was sent."""
    data = b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body)
    near, far = socket.socketpair()
    with near, far:
        reader = client.Reader(near)
        position, seen = 0, []
        for cut in [*cuts, len(data)]:
            part = data[position : position + cut]
            position += len(part)
            if part:
                far.sendall(part)
                seen.append(reader.receive())
        assert [s for s in seen if s is not None] == [status]
        assert seen[-1] == status


def test_answers_of_another_length_are_read_too() -> None:
    """An answer that differs from the last in head and length is understood, though heads are remembered."""
    with (
        scripted(lambda number: (GOOD, GOOD, BUSY, LAST)[number]) as address,
        socket.create_connection(address) as connection,
    ):
        reader, seen = client.Reader(connection), []
        for _ in range(4):
            connection.sendall(REQUEST)
            seen.append(reader.receive())
        assert seen == [200, 200, 503, 200]
        assert reader.closes


def test_closed_loop_tells_refused_failed_and_lost_apart() -> None:
    """A 503 is refused, a 500 failed, a connection closed before its answer lost; nothing else is."""
    script = [GOOD, BUSY, WRONG, GOOD, None, GOOD, LAST, GOOD]

    def answer(number: int) -> bytes | None:
        return script[number] if number < len(script) else GOOD

    with scripted(answer) as address, ClosedLoop(address, [REQUEST]) as loop:
        loop.run(10, lambda: len(loop.outcome.latencies_s) >= 5)
        outcome = loop.collect()
    assert (len(outcome.refused_s), outcome.failed, outcome.lost) == (1, 1, 1)
    assert outcome.told_to_close == 1
    assert outcome.refused_connections == 0


def test_closed_loop_gives_up_when_nobody_listens() -> None:
    """Clients that are told to close and then turned away stop, and nothing counts as lost."""
    with scripted(lambda number: LAST, connections=1) as address, ClosedLoop(address, [REQUEST]) as loop:
        outcome = loop.run(10)
    assert (len(outcome.latencies_s), outcome.lost, outcome.refused_connections) == (1, 0, 1)


def test_open_loop_counts_from_when_a_request_was_due() -> None:
    """A stall shows in the latency of every request that was due meanwhile, not only of the one it hit."""
    stall_s = 0.3

    def answer(number: int) -> bytes:
        if number == 0:
            time.sleep(stall_s)
        return GOOD

    arrivals_s = [0.0, 0.01, 0.02, 0.03]
    with scripted(answer) as address:
        outcome = open_loop.send(address, REQUEST, arrivals_s, grace_s=5, connections=1)
    assert len(outcome.latencies_s) == 4
    assert all(
        latency_s >= stall_s - due_s - 0.001
        for latency_s, due_s in zip(outcome.latencies_s, arrivals_s, strict=True)
    )


def test_open_loop_tells_kinds_apart() -> None:
    """Each kind of request is counted by itself, whichever connection it went over."""
    with scripted(lambda number: BUSY if number % 2 else GOOD) as address:
        arrivals_s = [0.05 * number for number in range(4)]
        good, busy = open_loop.send_mixed(address, [REQUEST, REQUEST], arrivals_s, [0, 1, 0, 1], 5, 1)
    assert (len(good.latencies_s), len(good.refused_s)) == (2, 0)
    assert (len(busy.latencies_s), len(busy.refused_s)) == (0, 2)


def test_open_loop_reports_who_got_no_answer() -> None:
    """Requests without an answer at the end are neither forgotten nor waited for without end."""
    released = threading.Event()

    def answer(number: int) -> bytes:
        released.wait(10)
        return GOOD

    with scripted(answer) as address:
        outcome = open_loop.send(address, REQUEST, [0.0, 0.01], grace_s=0.2, connections=1)
        released.set()
    assert len(outcome.unanswered_s) == 2
    assert not outcome.latencies_s


@given(st.lists(st.floats(0, 10), min_size=1), st.sampled_from([0.5, 0.9, 0.99, 1.0]))
def test_quantile_is_the_least_that_covers_the_fraction(values: list[float], fraction: float) -> None:
    """At least the fraction lies at or below the quantile, and less than it strictly below."""
    found = quantile(values, fraction)
    assert sum(value <= found for value in values) >= fraction * len(values)
    assert sum(value < found for value in values) < fraction * len(values)


@given(st.floats(1, 1000), st.floats(0.5, 3), st.integers(0, 9))
def test_arrivals_ascend_and_repeat_with_their_seed(rate: float, seconds: float, seed: int) -> None:
    """All servers of a round meet the same arrivals."""
    times = open_loop.poisson(rate, seconds, seed)
    assert times == sorted(times) == open_loop.poisson(rate, seconds, seed)
    assert times[0] >= 0


def test_ratio_compares_within_a_round() -> None:
    """A machine that slows down between rounds does not move a ratio."""
    rounds = Rounds()
    for slow in (1.0, 2.0, 7.0):
        rounds.add("ours", 1 * slow)
        rounds.add("a", 2 * slow)
        rounds.add("b", 4 * slow)
    assert rounds.ratio("ours", ["a", "b"], "least") == pytest.approx(0.5)
    assert rounds.ratio("ours", ["a", "b"], "most") == pytest.approx(0.25)
    assert rounds.ratio("ours", ["absent"], "most") is None


def test_table_has_a_column_for_each_server() -> None:
    """A figure that was not measured is a hyphen, one without bound says never."""
    text = render("latency", {"p50": {"ours": 81.25, "triton": None}, "exit": {"triton": float("inf")}})
    assert [line.split() for line in text.splitlines()] == [
        ["latency", "ours", "triton"],
        ["p50", "81.2", "-"],
        ["exit", "-", "never"],
    ]


# Servers


def test_stop_ends_workers_that_left_the_session(tmp_path: Path) -> None:
    """A worker in a session of its own that ignores SIGTERM does not outlive the benchmark."""
    worker = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    serve = (
        "import subprocess, sys, http.server as h\n"
        f"subprocess.Popen([sys.executable, '-c', {worker!r}], start_new_session=True)\n"
        "h.HTTPServer(('127.0.0.1', int(sys.argv[1])), h.SimpleHTTPRequestHandler).serve_forever()\n"
    )
    port = free_port()
    launch = Launch([sys.executable, "-c", serve, str(port)], port, directory=tmp_path)
    with running(launch, tmp_path / "log", [wire.get("/")]) as server:
        assert len(server.processes()) == 2
        assert server.pss_bytes() > 0
        assert server.cpu_s() > 0
    assert server.processes() == []


def test_models_are_the_same_every_time(tmp_path: Path) -> None:
    """Runs on different days serve the same bytes."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = write_models(tmp_path / "a"), write_models(tmp_path / "b")
    assert {m.path.read_bytes() for m in first.values()} == {m.path.read_bytes() for m in second.values()}


# Scenarios, against the agent


def test_agent_ends_without_losing_a_request(bench: Bench) -> None:
    """SIGTERM under 16 clients: none lost, none failed, no process left, no new client taken."""
    result = sigterm(bench)
    for name in ("lost", "failed", "orphans", "accepts_after_1_s", "answers_after_1_s"):
        assert result.judged[f"sigterm_{name}"].value == 0
    assert not bench.absent


def test_agent_swaps_under_load(bench: Bench) -> None:
    """Versions change while clients ask, and no request fails."""
    result = swaps(bench)
    assert result.judged["swaps_failed_requests"].value == 0
    assert result.judged["swaps"].value == 4


def test_footprint_is_measured_for_every_server(bench: Bench) -> None:
    """Memory, start and processor time are there for ours and for the floor."""
    result = footprint(bench)
    assert all(set(row) == {"ours", "raw"} for row in result.table.values())
    assert all(value and value > 0 for row in result.table.values() for value in row.values())


def test_document_names_what_was_not_judged(
    installed_here: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without peers, targets against them are listed as not judged instead of met."""
    monkeypatch.setattr(sys, "argv", ["run.py", "--quick", "--json", "--only", "latency"])
    with pytest.raises(SystemExit):
        run.main()
    document = json.loads(capsys.readouterr().out)
    assert document["name"] == "serving"
    assert set(document["targets"]) == {"cnn_added_us"}
    assert "tiny_p50_over_tritons_best" in document["figures"]["not_judged"]
    row = document["figures"]["tables"]["latency"]["tiny p50 us"]
    assert set(row) == {"bare", "ours", ECHO.name, RAW.name, AIOHTTP.name}


def test_unknown_scenario_is_refused_with_the_known_ones() -> None:
    """A misspelt name ends with exit code 2 and the list of names."""
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "serving" / "run.py", "--only", "latencies"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "300"},
    )
    assert done.returncode == 2
    assert "shared_memory" in done.stderr
