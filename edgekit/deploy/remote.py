"""Deploy a bundle to one device over SSH.

A link that breaks during the transfer is made again, and the transfer goes on where it broke. One that breaks
during the installation changes nothing on the device, which goes on; its outcome is asked for afterwards.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from edgekit.deploy import ssh
from edgekit.deploy.connection import Connection, LinkLost
from edgekit.deploy.local import Deployment
from edgekit.deploy.payload import Payload
from edgekit.deploy.ssh import SshAddress, SshOptions
from edgekit.errors import DeviceRefused, EdgekitError, Missing

Progress = Callable[[str], None]

_FIRST_PAUSE_S = 1.0
_TRIES_WITHOUT_PROGRESS = 4
_ASK_EVERY_S = 2.0


class Cancelled(EdgekitError):
    """The transfer was given up; the device stays on what it serves."""

    exit_code = 130


def deploy(
    payload: Payload,
    address: SshAddress,
    options: SshOptions,
    progress: Progress,
    cancelled: threading.Event | None = None,
) -> Deployment:
    """Bring a bundle to a device and wait until it is committed there.

    Args:
        payload: the bundle.
        address: the device.
        options: how ssh is started.
        progress: called with each state, and with how much was sent.
        cancelled: once set, no more is sent; an installation that began is waited for.

    Raises:
        Missing: the device cannot be reached, or has no agent.
        DeviceRefused: it refused the bundle or went back to what it served before.
        Cancelled: it was given up before the installation began.
    """
    return _Delivery(payload, address, options, progress, cancelled or threading.Event()).run()


class _Delivery:
    """One bundle on its way to one device."""

    def __init__(
        self,
        payload: Payload,
        address: SshAddress,
        options: SshOptions,
        progress: Progress,
        cancelled: threading.Event,
    ) -> None:
        self._payload = payload
        self._address = address
        self._options = options
        self._progress = progress
        self._cancelled = cancelled
        self._installing = False
        self._stored_bytes = 0

    def run(self) -> Deployment:
        tries = 0
        while True:
            stored_bytes = self._stored_bytes
            try:
                with ssh.connect(self._address, self._options) as connection:
                    return self._await_end(connection) if self._installing else self._deliver(connection)
            except LinkLost as error:
                self._refuse_cancelled()
                tries = 1 if self._stored_bytes > stored_bytes else tries + 1
                self._pause(tries, error)
            except Missing as error:
                if tries == 0:
                    raise  # it was never reached, so this is no link that broke
                tries += 1
                self._pause(tries, error)

    def _pause(self, tries: int, error: Missing) -> None:
        if tries >= _TRIES_WITHOUT_PROGRESS:
            raise error
        self._progress(f"{error.what}: {error.why}; trying again")
        self._cancelled.wait(_FIRST_PAUSE_S * 2 ** (tries - 1))

    def _deliver(self, connection: Connection) -> Deployment:
        there = _find(connection.ask({"op": "agent"}), self._payload.manifest.name)
        if there is not None and _serves(there, self._payload.digest):
            return self._deployment(there["fallback"], unchanged=True)
        self._transfer(connection)
        self._refuse_cancelled()
        self._installing = True
        message = {"op": "install", "offered": True, "activate": True}
        result = connection.ask(message, report=lambda line: self._progress(str(line.get("state"))))
        return Deployment(str(self._address), **result)

    def _transfer(self, connection: Connection) -> None:
        message, body = self._payload.offer()
        offered = connection.ask(message, body)
        missing_bytes = int(offered["missing_bytes"])
        total_bytes = sum(entry.size_bytes for entry in self._payload.manifest.files)
        self._progress(f"sending {_size(missing_bytes)} of {_size(total_bytes)}")
        if missing_bytes == 0:
            return
        meter = _Meter(missing_bytes, self._progress)

        def report(line: Mapping[str, Any]) -> None:
            received_bytes = int(line.get("received_bytes", 0))
            self._stored_bytes = max(self._stored_bytes, received_bytes)
            meter.show(received_bytes)
            if self._cancelled.is_set():
                connection.close_writer()

        chunks = self._payload.chunks(offered["missing"])
        connection.stream({"op": "receive"}, chunks, missing_bytes, report)

    def _await_end(self, connection: Connection) -> Deployment:
        """Ask, after a link broke, how the installation that it began has ended."""
        while True:
            model = _find(connection.ask({"op": "agent"}), self._payload.manifest.name)
            last = None if model is None else model["last_operation"]
            if model is None or last is None or last["digest"] != self._payload.digest:
                self._installing = False  # the request never arrived
                return self._deliver(connection)
            if last["failure"] is not None:
                raise DeviceRefused(*(str(last["failure"][key]) for key in ("what", "why", "fix")))
            if last["state"] == last["goal"]:
                return self._deployment(model["fallback"])
            self._progress(str(last["state"]))
            self._cancelled.wait(_ASK_EVERY_S)

    def _deployment(self, previous: str | None, *, unchanged: bool = False) -> Deployment:
        manifest = self._payload.manifest
        return Deployment(
            str(self._address),
            manifest.name,
            self._payload.digest,
            manifest.version,
            "committed",
            previous,
            signer=None,
            unchanged=unchanged,
        )

    def _refuse_cancelled(self) -> None:
        if self._cancelled.is_set() and not self._installing:
            raise Cancelled(
                f"the transfer to {self._address} was given up",
                "Ctrl-C",
                "run the same command again: what the device received is kept",
            )


class _Meter:
    """Shows every tenth of a transfer."""

    def __init__(self, total_bytes: int, progress: Progress) -> None:
        self._total_bytes = total_bytes
        self._progress = progress
        self._tenths = 0

    def show(self, bytes_done: int) -> None:
        tenths = 10 * bytes_done // self._total_bytes
        if tenths > self._tenths:
            self._tenths = tenths
            self._progress(f"sent {10 * tenths}%")


def _find(agent: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    return next((model for model in agent["models"] if model["name"] == name), None)


def _serves(model: Mapping[str, Any], digest: str) -> bool:
    return model["active"] == model["serving"] == digest and digest in model["committed"]


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB" if size_bytes >= 100_000 else f"{size_bytes / 1e3:.1f} kB"
