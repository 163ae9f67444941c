"""A client's connection: everything has a time limit, and what does not come in time is a hang."""

from __future__ import annotations

import asyncio
import socket
import struct
from dataclasses import dataclass
from types import TracebackType

from serving.client import Address
from serving.wire import Answer, parse, parse_head

HANG_S = 20.0
_LIMIT_BYTES = 1 << 22


class Closed(Exception):
    """The agent closed the connection without an answer."""


class Hang(Exception):
    """Nothing came for so long that nothing will."""


@dataclass
class Link:
    """A connection; use it in an ``async with`` block."""

    address: Address

    async def __aenter__(self) -> Link:
        self._reader, self._writer = await self._in_time(
            asyncio.open_connection(*self.address, limit=_LIMIT_BYTES)
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.transport.abort() if kind else self._writer.close()

    async def send(self, data: bytes) -> None:
        """Write, and wait until it is on its way.

        Raises:
            Closed: the agent is not there any more.
        """
        try:
            self._writer.write(data)
            await self._in_time(self._writer.drain())
        except OSError as error:
            raise Closed from error

    def send_blindly(self, data: bytes) -> None:
        """Write as much as the kernel takes, and do not wait."""
        self._writer.write(data)

    def end(self) -> None:
        """Close the sending side."""
        self._writer.write_eof()

    def reset(self) -> None:
        """Go away in the rudest manner: the agent gets a reset."""
        sock: socket.socket = self._writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    async def receive(self) -> Answer:
        """Read the next answer; an interim one is passed over.

        Raises:
            Closed: the connection ended before it.
            Hang: it does not come.
        """
        try:
            head = await self._in_time(self._reader.readuntil(b"\r\n\r\n"))
            if head.startswith(b"HTTP/1.1 100 "):
                return await self.receive()
            announced = parse_head(head)
            size = announced.total_bytes - announced.head_bytes if announced else 0
            return parse(head + await self._in_time(self._reader.readexactly(size)))
        except (asyncio.IncompleteReadError, OSError) as error:
            raise Closed from error

    async def receive_all(self) -> list[Answer]:
        """Read every answer until the agent closes."""
        answers = []
        try:
            while True:
                answers.append(await self.receive())
        except Closed:
            return answers

    @staticmethod
    async def _in_time(awaitable):  # type: ignore[no-untyped-def]  # gives back what it is given
        try:
            return await asyncio.wait_for(awaitable, HANG_S)
        except asyncio.TimeoutError:
            raise Hang from None
