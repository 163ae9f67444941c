"""One connection to an agent: requests and answers as JSON lines, chunks as plain bytes after a request.

The requests are described in ``docs/lifecycle.md`` and ``docs/deploy.md``.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import IO, Any

from edgekit.errors import DeviceRefused, EdgekitError, Missing

Report = Callable[[Mapping[str, Any]], None]

# What may be on its way without the device having stored it, which is what a broken link costs at most: less
# than a hundredth of the transfer, or one chunk where that is more.
_WINDOWS_A_TRANSFER = 128
_MAX_WINDOW_BYTES = 512 * 1024
_MAX_NOISE_LINES = 200


class LinkLost(Missing):
    """The connection to a device broke; what it received is kept there."""


class Connection:
    """Requests to one agent.

    Args:
        reader: the answers.
        writer: the requests.
        why_lost: what to raise where the other end goes away.
    """

    def __init__(self, reader: IO[bytes], writer: IO[bytes], why_lost: Callable[[], EdgekitError]) -> None:
        self._reader = reader
        self._writer = writer
        self._why_lost = why_lost

    def greeting(self) -> Mapping[str, Any]:
        """Read what ``edgekit-agent connect`` says first; skip what a login shell prints before.

        Raises:
            DeviceRefused: the device has nobody to connect to, and says why.
            EdgekitError: the other end is no agent, or went away.
        """
        for _ in range(_MAX_NOISE_LINES):
            line = self._reader.readline(65536)
            if not line:
                break
            answer = _parse(line)
            if answer is None:
                continue
            if answer.get("ok") is False:
                raise refusal(answer)
            if "edgekit" in answer:
                return answer
        raise self._why_lost()

    def ask(self, message: Mapping[str, Any], body: bytes = b"", report: Report = lambda _: None) -> Any:
        """Send a request, and wait for its result.

        Args:
            message: the request.
            body: bytes that follow it.
            report: called with each line that comes before the result.

        Raises:
            DeviceRefused: the device's answer is an error.
            EdgekitError: the connection broke.
        """
        self._send(json.dumps(dict(message)).encode() + b"\n" + body)
        return self._result(report)

    def stream(
        self, message: Mapping[str, Any], parts: Iterable[bytes], size_bytes: int, report: Report
    ) -> Any:
        """Send a request and a long body, never more than a window ahead of what the device stored.

        Args:
            message: the request.
            parts: the body.
            size_bytes: its size.
            report: called with each line that comes before the result.

        Raises:
            DeviceRefused: the device's answer is an error; the rest of the body is not sent.
            EdgekitError: the connection broke.
        """
        window = _Window(min(size_bytes // _WINDOWS_A_TRANSFER, _MAX_WINDOW_BYTES))

        def watch(line: Mapping[str, Any]) -> None:
            window.stored(int(line.get("received_bytes", 0)))
            report(line)

        self._send(json.dumps(dict(message)).encode() + b"\n")
        sender = threading.Thread(target=self._send_all, args=(parts, window), daemon=True)
        sender.start()
        try:
            return self._result(watch)
        finally:
            window.close()
            sender.join()

    def close_writer(self) -> None:
        """Say that nothing more comes."""
        with suppress(OSError):
            self._writer.close()

    def _send(self, data: bytes) -> None:
        try:
            self._writer.write(data)
            self._writer.flush()
        except (OSError, ValueError):
            pass  # the answer, or its absence, says why

    def _send_all(self, parts: Iterable[bytes], window: _Window) -> None:
        with suppress(OSError, ValueError):  # as above
            for part in parts:
                if not window.wait_for(len(part)):
                    return
                self._writer.write(part)
                self._writer.flush()

    def _result(self, report: Report) -> Any:
        for line in iter(self._read_line, b""):
            answer = _parse(line)
            if answer is None:
                continue
            if answer.get("ok") is True:
                return answer.get("result")
            if answer.get("ok") is False:
                raise refusal(answer)
            report(answer)
        raise self._why_lost()

    def _read_line(self) -> bytes:
        try:
            return self._reader.readline()
        except (OSError, ValueError):
            return b""


class _Window:
    """How far the sender may be ahead."""

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._changed = threading.Condition()
        self._sent_bytes = self._stored_bytes = 0
        self._open = True

    def wait_for(self, size_bytes: int) -> bool:
        """Wait until so much more may be sent; False if there is no use any more."""
        with self._changed:
            self._changed.wait_for(lambda: not self._open or self._admits(size_bytes))
            self._sent_bytes += size_bytes
            return self._open

    def stored(self, total_bytes: int) -> None:
        with self._changed:
            self._stored_bytes = total_bytes
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._open = False
            self._changed.notify_all()

    def _admits(self, size_bytes: int) -> bool:
        ahead_bytes = self._sent_bytes - self._stored_bytes
        return ahead_bytes == 0 or ahead_bytes + size_bytes <= self._size_bytes


def refusal(answer: Mapping[str, Any]) -> DeviceRefused:
    """The error that a device answered."""
    return DeviceRefused(*(str(answer.get(key, "")) for key in ("what", "why", "fix")))


def _parse(line: bytes) -> Mapping[str, Any] | None:
    try:
        answer = json.loads(line)
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None
