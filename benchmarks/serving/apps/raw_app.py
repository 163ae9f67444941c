"""A floor: sockets and ``session.run`` on one thread, and nothing else. ``raw_app.py PORT [--echo]``.

Understands just what the benchmark's client sends: whole requests of one kind on a kept connection. With
``--echo`` the model runs once and its answer is sent again, which shows what the client alone can ask.
"""

from __future__ import annotations

import select
import socket
import sys

import numpy as np
from onnx_models import OnnxModel, open_models

MODELS = open_models()
RECEIVE_BYTES = 1 << 16


class Client:
    """A connection, and what came on it so far."""

    def __init__(self, sock: socket.socket, echo: bool) -> None:
        self.sock = sock
        self._echo = echo
        self._known: bytes | None = None
        self._data = b""
        self._head = b""
        self._model: OnnxModel | None = None
        self._total_bytes = 0

    def read(self) -> bool:
        """Take what came; whether the connection lives on."""
        part = self.sock.recv(RECEIVE_BYTES)
        if not part:
            return False
        self._data = self._data + part if self._data else part
        if self._model is None or not self._data.startswith(self._head):
            self._parse()
        if self._model is not None and len(self._data) >= self._total_bytes:
            self._answer(self._model)
        return True

    def _parse(self) -> None:
        end = self._data.find(b"\r\n\r\n") + 4
        if end < 4:
            return
        self._head = self._data[:end]
        first, *lines = self._head.decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines if line)
        self._model = MODELS[first.split(" ")[1].split("/")[3]]
        self._total_bytes = end + int(headers["content-length"])

    def _answer(self, model: OnnxModel) -> None:
        if self._known is None or not self._echo:
            body = self._data[len(self._head) : self._total_bytes]
            rows = np.frombuffer(body, dtype=np.float32).reshape(1, *model.shape)
            self._known = model.run(rows).tobytes()
        self._data = self._data[self._total_bytes :]
        self.sock.sendall(
            b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(self._known), self._known)
        )


def main() -> None:
    """Serve until killed."""
    listener = socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=1024)
    poll = select.epoll()
    poll.register(listener, select.EPOLLIN)
    clients: dict[int, Client] = {}
    while True:
        for descriptor, _ in poll.poll():
            if descriptor == listener.fileno():
                sock, _ = listener.accept()
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                clients[sock.fileno()] = Client(sock, "--echo" in sys.argv)
                poll.register(sock, select.EPOLLIN)
                continue
            try:
                alive = clients[descriptor].read()
            except OSError:
                alive = False
            if not alive:
                clients.pop(descriptor).sock.close()


if __name__ == "__main__":
    main()
