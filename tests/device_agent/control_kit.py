"""The control socket of an agent in this process, for the tests of what is asked over it."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from pathlib import Path
from typing import Any, Callable, Dict, List

from device_agent.lifecycle import Lifecycle
from device_agent.server import control
from device_agent.signature import Trust
from device_agent.store import Store
from storage_kit import FakeModels


class RunningControl:
    """The control socket of an agent, served by an event loop on another thread."""

    def __init__(self, root: Path) -> None:
        self.path = root / "run" / "control.sock"
        self.models = FakeModels()
        self._store = Store(root / "state")
        self._lifecycle = Lifecycle(self._store, Trust(root / "keys"), self.models)  # type: ignore[arg-type]  # double
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._thread.start()
        assert self._ready.wait(10)

    async def _serve(self) -> None:
        server = await control.start(self.path, self._lifecycle)
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._ready.set()
        await self._stop.wait()
        server.close()

    def close(self) -> None:
        """Stop serving."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        self._store.close()

    def ask(self, message: Dict[str, Any], on_state: Callable[[str], None] = lambda state: None) -> Any:
        """Send one request the way the command line does."""
        return control.request(self.path, message, on_state)

    def send(self, data: bytes) -> List[Dict[str, Any]]:
        """Send raw bytes, and return every answer until the agent closes."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(10)
            client.connect(str(self.path))
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            with client.makefile("rb") as lines:
                return [json.loads(line.decode()) for line in lines]
