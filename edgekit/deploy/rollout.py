"""Deploy to many devices, in waves, each of which must succeed before the next begins."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from edgekit.deploy import remote, waves
from edgekit.deploy.inventory import Device
from edgekit.deploy.payload import Payload
from edgekit.deploy.record import COMMITTED, DEPLOYING, FAILED, UNREACHABLE, Outcome, Record
from edgekit.deploy.ssh import SshOptions
from edgekit.errors import EdgekitError, Missing

Progress = Callable[[str], None]

_LOOK_EVERY_S = 0.2


@dataclass(frozen=True)
class Plan:
    """How a rollout goes.

    Attributes:
        devices: in the order in which they have their turn.
        waves: such as ``1,10%,100%``.
        max_failures: no device more is begun once more than so many failed or could not be reached.
        parallel: how many are updated at the same time.
        retry_failed: give devices that failed in an earlier run another turn.
    """

    devices: tuple[Device, ...]
    waves: str = "100%"
    max_failures: int = 0
    parallel: int = 8
    retry_failed: bool = False


@dataclass(frozen=True)
class Result:
    """What became of a rollout.

    Attributes:
        bundle: the bundle's digest.
        record: where it is written down.
        waves: the number of devices of each wave.
        complete: whether every device of every wave committed the bundle.
        interrupted: whether Ctrl-C ended it.
        devices: the outcome of each device by its name; None: it had no turn.
    """

    bundle: str
    record: Path
    waves: list[int]
    complete: bool
    interrupted: bool
    devices: dict[str, Outcome | None]

    def document(self) -> dict[str, Any]:
        """A form for JSON."""
        return {**asdict(self), "record": str(self.record)}

    @property
    def failed(self) -> list[Outcome]:
        """The devices that failed or could not be reached."""
        return [o for o in self.devices.values() if o is not None and o.state in (FAILED, UNREACHABLE)]


def run(payload: Payload, plan: Plan, record: Record, options: SshOptions, progress: Progress) -> Result:
    """Bring a bundle to the devices of a plan.

    Ctrl-C once ends what is only being transferred, and waits for installations that began; twice leaves
    those too, which the devices finish by themselves.

    Raises:
        BadInput: the waves are malformed.
        KeyboardInterrupt: Ctrl-C was pressed a second time.
    """
    sizes = waves.sizes(plan.waves, len(plan.devices))
    rollout = _Rollout(payload, plan, record, options, progress)
    start = 0
    for number, size in enumerate(sizes, 1):
        devices = plan.devices[start : start + size]
        start += size
        progress(f"wave {number} of {len(sizes)}: {size} of {len(plan.devices)} devices")
        if not rollout.wave(devices):
            break
    outcomes = {device.name: record.of(device) for device in plan.devices}
    reached = [record.of(device) for device in plan.devices[: sum(sizes)]]
    return Result(
        payload.digest,
        record.path,
        sizes,
        all(outcome is not None and outcome.state == COMMITTED for outcome in reached),
        rollout.interrupted,
        outcomes,
    )


class _Rollout:
    """The devices that run, and what stops the others from beginning."""

    def __init__(
        self, payload: Payload, plan: Plan, record: Record, options: SshOptions, progress: Progress
    ) -> None:
        self._payload = payload
        self._plan = plan
        self._record = record
        self._options = options
        self._progress = progress
        self._cancelled = threading.Event()
        self._failures = 0
        self._lock = threading.Lock()

    @property
    def interrupted(self) -> bool:
        return self._cancelled.is_set()

    def wave(self, devices: tuple[Device, ...]) -> bool:
        """Update the devices of one wave; return whether the next may begin."""
        with (
            ThreadPoolExecutor(self._plan.parallel, thread_name_prefix="deploy") as pool,
            _first_interrupt(self._cancel),
        ):
            running = {pool.submit(self._turn, device) for device in devices}
            try:
                while running:
                    done, running = wait(running, _LOOK_EVERY_S)
                    for future in done:
                        future.result()
            except KeyboardInterrupt:  # the second one
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return not self.interrupted and not self._too_many()

    def _cancel(self) -> None:
        self._cancelled.set()
        self._progress("interrupted: waiting for the devices that are being updated")

    def _turn(self, device: Device) -> None:
        before = self._record.of(device)
        if before is not None and before.state == COMMITTED:
            return
        if before is not None and before.state == FAILED and not self._plan.retry_failed:
            self._count(before)
            return
        if self._cancelled.is_set() or self._too_many():
            return
        self._record.set(device, Outcome(device.name, DEPLOYING))
        outcome = self._deploy(device)
        self._record.set(device, outcome)
        self._count(outcome)
        self._progress(f"{device.name}: {outcome.state}" + (f": {outcome.what}" if outcome.what else ""))

    def _deploy(self, device: Device) -> Outcome:
        def progress(text: str) -> None:
            self._progress(f"{device.name}: {text}")

        try:
            remote.deploy(self._payload, device.address, self._options, progress, self._cancelled)
        except remote.Cancelled as error:
            return Outcome(device.name, DEPLOYING, error.what, error.why, error.fix)
        except Missing as error:
            return Outcome(device.name, UNREACHABLE, error.what, error.why, error.fix)
        except EdgekitError as error:
            return Outcome(device.name, FAILED, error.what, error.why, error.fix)
        return Outcome(device.name, COMMITTED)

    def _count(self, outcome: Outcome) -> None:
        with self._lock:
            self._failures += outcome.state in (FAILED, UNREACHABLE)

    def _too_many(self) -> bool:
        with self._lock:
            return self._failures > self._plan.max_failures


@contextmanager
def _first_interrupt(told: Callable[[], None]) -> Iterator[None]:
    """Be told of the first Ctrl-C in a ``with`` block, wherever it comes; the second one raises.

    Only the main thread hears of signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def hear(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        told()

    before = signal.signal(signal.SIGINT, hear)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
