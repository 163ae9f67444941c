"""What is watched while the agent is soaked: memory, files, threads, and its own counters."""

from __future__ import annotations

import os
import re
import statistics
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from serving import client, wire
from serving.server import Server

_EVERY_S = 1.0


@dataclass(frozen=True)
class Held:
    """What the agent's process holds.

    Attributes:
        files: open file descriptors.
        sockets: those of them that are sockets.
        threads: its threads.
    """

    files: int
    sockets: int
    threads: int


def held(server: Server) -> Held:
    """Look at what the agent's process holds now."""
    (pid,) = server.processes()
    targets = []
    for entry in os.listdir(f"/proc/{pid}/fd"):
        try:
            targets.append(os.readlink(f"/proc/{pid}/fd/{entry}"))
        except FileNotFoundError:
            continue  # closed since
    sockets = sum(target.startswith("socket:") for target in targets)
    return Held(len(targets), sockets, len(os.listdir(f"/proc/{pid}/task")))


class MemoryWatch(threading.Thread):
    """Samples the agent's memory every second until told to stop."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self.samples: list[tuple[float, int]] = []
        self._server = server
        self._stopping = threading.Event()

    def run(self) -> None:
        """Sample until :meth:`stop`."""
        started_s = time.monotonic()
        while not self._stopping.wait(_EVERY_S):
            try:
                self.samples.append((time.monotonic() - started_s, self._server.pss_bytes()))
            except OSError:
                return  # it has ended, which others notice

    def stop(self) -> None:
        """Take no more samples."""
        self._stopping.set()
        self.join()

    def growth_fraction(self) -> float:
        """Growth from the second fifth of the time to the last: the first is the warm-up."""
        fifth = max(1, len(self.samples) // 5)
        early = statistics.median(pss for _, pss in self.samples[fifth : 2 * fifth] or self.samples)
        late = statistics.median(pss for _, pss in self.samples[-fifth:])
        return late / early - 1.0


class Counters:
    """The agent's page of metrics."""

    def __init__(self, address: client.Address) -> None:
        text = wire.parse(client.ask(address, wire.get("/metrics"))).body.decode()
        self._values: Counter[tuple[str, str]] = Counter()
        for name, labels, value in re.findall(r"^(\w+)\{([^}]*)\} (\S+)$", text, re.MULTILINE):
            model = re.search(r'model="([^"]*)"', labels)
            self._values[name, model.group(1) if model else ""] += float(value)  # type: ignore[assignment]

    def of(self, model: str, what: str) -> int:
        """A counter of a model, all its versions together, such as ``failed_total``."""
        return int(self._values[f"edgekit_inference_{what}", model])

    def ended(self, model: str) -> int:
        """Requests of a model that came to any end."""
        ends = (
            "total_seconds_count",
            "failed_total",
            "refused_total",
            "deadline_missed_total",
            "cancelled_total",
        )
        return sum(self.of(model, what) for what in ends)


def errors_logged(log: Path) -> tuple[int, int]:
    """How many failures of an engine the agent's log names, and how many tracebacks it has."""
    text = log.read_text(errors="replace")
    return len(re.findall(r"model fragile failed", text)), text.count("Traceback (most recent call last)")
