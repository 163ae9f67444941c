"""One connection's transfer: an offer, then what is missing, then the installation.

    -> {"op": "offer", "manifest_bytes": 2211, "signature_bytes": 1893, "chunks_bytes": 52020}
       and right after it that many bytes of manifest.json, of model.sig (0: not signed), of the chunk list
    <- {"ok": true, "result": {"missing": [[0, 17], [40, 2]], "missing_bytes": 291845}}
    -> {"op": "receive"}
       and right after it the missing chunks, in the order of their numbers
    <- {"received_bytes": 65536}
    <- {"ok": true, "result": {"received_bytes": 291845}}
    -> {"op": "install", "offered": true}

An offer may say how the bundle will be installed, ``activate`` and ``allow_downgrade`` as in ``install``.
The head is authenticated and the space is asked for before a chunk is stored. ``missing`` holds runs
``[first, count]`` of chunks, numbered through all files. A connection whose offer or body fails is closed.

Python 3.8.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Awaitable, Callable, Dict, Mapping, Optional

from device_agent import archive, manifest
from device_agent.directory import MAX_SIGNATURE_BYTES
from device_agent.disk import disk_errors
from device_agent.errors import BadInput
from device_agent.transfer import offer
from device_agent.transfer.incoming import Incoming
from device_agent.transfer.offer import Chunk
from device_agent.transfer.partial import Partial

Report = Callable[[Mapping[str, Any]], None]

OPERATIONS = ("offer", "receive")
_IDLE_TIMEOUT_S = 300.0


class Session:
    """What one connection offered.

    Args:
        incoming: shared by all connections.
        pool: of one thread, that touches the disk for all of them.
        reader: where the bytes after a request come from.
    """

    def __init__(self, incoming: Incoming, pool: ThreadPoolExecutor, reader: asyncio.StreamReader) -> None:
        self._incoming = incoming
        self._pool = pool
        self._reader = reader
        self._partial: Optional[Partial] = None

    async def offer(self, message: Mapping[str, Any]) -> Dict[str, Any]:
        """Take an offer and answer which chunks are missing.

        Raises:
            BadInput: it is malformed or not trusted.
            Refused: there is no space for it.
            ConnectionError: it never arrived in full.
        """
        sizes = [
            _size(message, "manifest_bytes", manifest.MAX_MANIFEST_BYTES),
            _size(message, "signature_bytes", MAX_SIGNATURE_BYTES),
        ]
        manifest_bytes, signature = [await self._read(size) for size in sizes]
        head = archive.head_of(manifest_bytes, signature or None)
        activate, allow_downgrade = _flag(message, "activate", True), _flag(message, "allow_downgrade", False)
        await self._on_disk(self._incoming.admit, head, activate, allow_downgrade)
        limit = offer.max_encoded_bytes(head.manifest)
        listed = await self._read(_size(message, "chunks_bytes", limit))
        files = await self._on_disk(offer.decode, listed, head.manifest)
        self.close()
        self._partial = await self._on_disk(self._incoming.open, head, files, self)
        missing = await self._on_disk(self._partial.missing_chunks)
        return {
            "missing": offer.runs_of(self._partial.missing()),
            "missing_bytes": sum(chunk.length_bytes for chunk in missing),
        }

    async def receive(self, report: Report) -> Dict[str, Any]:
        """Take the missing chunks, and report each that is on the disk: the host waits for that.

        Raises:
            BadInput: nothing was offered; or a chunk was damaged on its way.
            Refused: the disk failed, or another connection took over.
            ConnectionError: the connection broke; what arrived is kept.
        """
        partial = self._offered()
        received_bytes = 0
        for chunk in partial.missing_chunks():
            data = await self._read(chunk.length_bytes)
            await self._on_disk(self._store, partial, chunk, data)
            received_bytes += chunk.length_bytes
            report({"received_bytes": received_bytes})
        return {"received_bytes": received_bytes}

    async def install(self, install: Callable[[str], Awaitable[Any]]) -> Any:
        """Have the offered bundle, of which every chunk is here, installed.

        Args:
            install: installs the bundle at a path.

        Raises:
            BadInput: nothing was offered, or something is missing.
            Refused: another connection took over.
            AgentError: what the installation raises.
        """
        partial = self._offered()
        if not partial.complete:
            raise _bad_order("chunks are missing")
        await self._on_disk(self._incoming.begin_install, partial, self)
        installed = False
        try:
            result = await install(str(partial.directory))
            installed = True
        finally:
            await self._on_disk(self._incoming.end_install, partial, installed)
        return result

    def close(self) -> None:
        """Let another connection go on with what was offered here."""
        if self._partial is not None:
            self._incoming.release(self._partial, self)
            self._partial = None

    def _store(self, partial: Partial, chunk: Chunk, data: bytes) -> None:
        self._incoming.require_holder(partial, self)
        with disk_errors("the bundle cannot be received"):
            partial.take(chunk, data)

    def _offered(self) -> Partial:
        if self._partial is None:
            raise _bad_order("nothing was offered on this connection")
        return self._partial

    async def _read(self, size_bytes: int) -> bytes:
        try:
            return await asyncio.wait_for(self._reader.readexactly(size_bytes), _IDLE_TIMEOUT_S)
        except (asyncio.IncompleteReadError, asyncio.TimeoutError) as error:
            raise ConnectionError("the connection broke during a transfer") from error

    async def _on_disk(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)


def _size(message: Mapping[str, Any], key: str, limit_bytes: int) -> int:
    value = message.get(key)
    if type(value) is not int or not 0 <= value <= limit_bytes:
        raise BadInput(
            "the offer is malformed",
            f"{key!r} is not a number of bytes up to {limit_bytes}",
            "deploy with an edgekit of the agent's version",
        )
    return value


def _flag(message: Mapping[str, Any], key: str, default: bool) -> bool:
    value = message.get(key, default)
    if type(value) is not bool:
        raise BadInput(
            "the offer is malformed",
            f"{key!r} is neither true nor false",
            "deploy with an edgekit of the agent's version",
        )
    return value


def _bad_order(why: str) -> BadInput:
    return BadInput("nothing can be received or installed", why, "offer a bundle first: see docs/deploy.md")
