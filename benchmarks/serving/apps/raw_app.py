"""A floor: sockets and ``session.run`` on one thread, and nothing else. ``raw_app.py PORT [--echo]``.

Understands just what the benchmark's client sends: whole requests of one kind on a kept connection. With
``--echo`` no model runs, which shows what the client alone can ask.
"""

import select
import socket
import sys

import numpy as np
from onnx_models import open_models

MODELS = open_models()
RECEIVE_BYTES = 1 << 18


class Client:
    """A connection, and what came on it so far."""

    def __init__(self, sock, echo):
        self.sock = sock
        self.echo = echo
        self.data = b""
        self.head = None
        self.model = None
        self.total_bytes = 0

    def read(self):
        """Take what came; whether the connection lives on."""
        part = self.sock.recv(RECEIVE_BYTES)
        if not part:
            return False
        self.data = self.data + part if self.data else part
        if self.head is None or not self.data.startswith(self.head):
            self._parse()
        if self.head is not None and len(self.data) >= self.total_bytes:
            self._answer()
        return True

    def _parse(self):
        end = self.data.find(b"\r\n\r\n") + 4
        if end < 4:
            return
        self.head = self.data[:end]
        first, *lines = self.head.decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines if line)
        self.model = MODELS[first.split(" ")[1].split("/")[3]]
        self.total_bytes = end + int(headers.get("content-length", 0))

    def _answer(self):
        body = self.data[len(self.head) : self.total_bytes]
        self.data = self.data[self.total_bytes :]
        if not self.echo:
            rows = np.frombuffer(body, dtype=np.float32).reshape(1, *self.model.shape)
            body = self.model.run(rows).tobytes()
        self.sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))


def main():
    """Serve until killed."""
    listener = socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=1024)
    poll = select.epoll()
    poll.register(listener, select.EPOLLIN)
    clients = {}
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


main()
