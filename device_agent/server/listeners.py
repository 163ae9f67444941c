"""The end of asyncio's listeners, in which no client is lost."""

from __future__ import annotations

import asyncio
from typing import Sequence

_TURN_S = 0.005


async def stop_accepting(servers: Sequence[asyncio.Server]) -> None:
    """Close listeners; when this returns, what they had accepted is connected.

    asyncio makes a connection's transport one turn of the loop after it was accepted, and drops it where
    the server has been closed in between.
    """
    loop = asyncio.get_running_loop()
    for server in servers:
        for listener in server.sockets:
            loop.remove_reader(listener.fileno())
    await asyncio.sleep(0)
    for server in servers:
        server.close()
    await asyncio.sleep(_TURN_S)
