"""What the tests of registries share: a real registry, and what stands between it and a device.

``Registry`` is Debian's ``docker-registry``. ``Front`` is a real HTTP server in front of it (or of nothing)
that answers some requests itself, badly on purpose, and passes the others on; ``TokenService`` is the other
half of the Bearer flow.
"""

from __future__ import annotations

import base64
import http.client
import json
import shutil
import socket
import subprocess
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple
from urllib.parse import parse_qs, urlsplit

import pytest

from device_agent import archive
from device_agent.manifest import MANIFEST_NAME, SIGNATURE_NAME
from device_agent.oci.artifact import FILE_PATH, IMAGE_MANIFEST, MODEL_ARTIFACT, MODEL_CONFIG
from device_agent.oci.digests import digest_from, digest_of

PROGRAM = shutil.which("docker-registry")
needs_registry = pytest.mark.skipif(PROGRAM is None, reason="Debian's package docker-registry is missing")

Answer = Tuple[int, Dict[str, str], bytes]


def free_port() -> int:
    """A port of loopback that nothing listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Registry:
    """A real registry.

    Args:
        root: where it keeps its files, and may have kept them before.
        certificate: the certificate, whose key lies beside it, to speak TLS with; None: plain HTTP.
        address: of this machine, where it listens.
    """

    def __init__(self, root: Path, certificate: Optional[Path] = None, address: str = "127.0.0.1") -> None:
        self.host = f"{address}:{free_port()}"
        root.mkdir(parents=True, exist_ok=True)
        tls = ""
        if certificate is not None:
            tls = f", tls: {{certificate: {certificate}, key: {certificate.with_suffix('.key')}}}"
        (root / "config.yml").write_text(
            "version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\n"
            f"storage: {{filesystem: {{rootdirectory: {root / 'data'}}}}}\n"
            f"http: {{addr: '{self.host}', relativeurls: true{tls}}}\n"
        )
        with (root / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [str(PROGRAM), "serve", str(root / "config.yml")], stdout=log, stderr=log
            )
        self._wait(root)

    def _wait(self, root: Path) -> None:
        deadline_s = time.monotonic() + 20
        while time.monotonic() < deadline_s and self._process.poll() is None:
            try:
                request(self.host, "GET", "/v2/")
                return
            except OSError:
                time.sleep(0.02)
        raise AssertionError((root / "log").read_text())

    def push(self, bundle: Path, name: str = "models/model", tag: str = "stable") -> str:
        """Push a bundle's directory as ``edgekit push`` does, with this kit's own code; return its digest."""
        manifest, blobs = artifact_of(bundle)
        for data in blobs:
            status, headers, _ = request(self.host, "POST", f"/v2/{name}/blobs/uploads/")
            assert status == 202
            where = urlsplit(headers["Location"])
            path = f"{where.path}?{where.query}&digest={digest_of(data)}"
            assert request(self.host, "PUT", path, data)[0] == 201
        headers = {"Content-Type": IMAGE_MANIFEST}
        assert request(self.host, "PUT", f"/v2/{name}/manifests/{tag}", manifest, headers)[0] == 201
        return digest_of(manifest)

    def stop(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


def artifact_of(bundle: Path) -> Tuple[bytes, List[bytes]]:
    """The image manifest of a bundle's directory, and every blob that it refers to."""
    head = archive.read_head(bundle)
    names = [MANIFEST_NAME] + ([SIGNATURE_NAME] if head.signature is not None else [])
    blobs = {name: (bundle / name).read_bytes() for name in names}
    blobs.update({entry.path: (bundle / entry.path).read_bytes() for entry in head.manifest.files})
    document = {
        "schemaVersion": 2,
        "mediaType": IMAGE_MANIFEST,
        "artifactType": MODEL_ARTIFACT,
        "config": {"mediaType": MODEL_CONFIG, "digest": digest_of(b"{}"), "size": 2},
        "layers": [layer(name, data) for name, data in blobs.items()],
    }
    return json.dumps(document).encode(), [b"{}", *blobs.values()]


def layer(name: str, data: bytes) -> Dict[str, Any]:
    """A layer in an image manifest."""
    return {
        "mediaType": "application/vnd.cncf.model.weight.v1.raw",
        "digest": digest_of(data),
        "size": len(data),
        "annotations": {FILE_PATH: name},
    }


def request(
    host: str,
    method: str,
    path: str,
    body: Optional[bytes] = None,
    headers: Optional[Mapping[str, str]] = None,
) -> Answer:
    """One plain request."""
    connection = http.client.HTTPConnection(host, timeout=20)
    try:
        connection.request(method, path, body, dict(headers or {}))
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


class Front:
    """A real HTTP server; ``rules`` answer first, and what they leave goes to the registry behind it.

    Attributes:
        rules: called with each request's handler; one that returns True has answered.
        seen: method, path and headers of every request.
        sent_bytes: bytes of blobs that were passed on, by digest.
        cut_after_bytes: after how much of a blob the connection is cut; each is used once, on the next
            answer that is longer.
    """

    def __init__(self, behind: str = "") -> None:
        self.rules: List[Callable[[BaseHTTPRequestHandler], bool]] = []
        self.seen: List[Tuple[str, str, Dict[str, str]]] = []
        self.sent_bytes: Dict[str, int] = {}
        self.cut_after_bytes: List[int] = []
        front = self

        class Handler(BaseHTTPRequestHandler):
            def _serve(self) -> None:
                front.seen.append((self.command, self.path, dict(self.headers)))
                with suppress(ConnectionError):  # the client went away, as clients do
                    if not any(rule(self) for rule in list(front.rules)):
                        front._pass_on(self, behind)

            do_GET = do_HEAD = do_POST = do_PUT = _serve

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.host = f"127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End it."""
        self._server.shutdown()
        self._server.server_close()

    def paths(self, method: str = "GET") -> List[str]:
        """The paths that were asked for."""
        return [path for seen, path, _ in self.seen if seen == method]

    def authorizations(self) -> List[str]:
        """Every ``Authorization`` header that came."""
        return [headers["Authorization"] for _, _, headers in self.seen if "Authorization" in headers]

    def _pass_on(self, handler: BaseHTTPRequestHandler, behind: str) -> None:
        length = int(handler.headers.get("Content-Length") or 0)
        body = handler.rfile.read(length) if length else None
        headers = {k: v for k, v in handler.headers.items() if k.lower() not in ("host", "connection")}
        status, answer, data = request(behind, handler.command, handler.path, body, headers)
        handler.send_response(status)
        for name, value in answer.items():
            if name.lower() not in ("date", "connection", "transfer-encoding"):
                handler.send_header(name, value)
        handler.end_headers()
        if "/blobs/sha256:" in handler.path and handler.command == "GET":
            if self.cut_after_bytes and len(data) > self.cut_after_bytes[0]:
                data = data[: self.cut_after_bytes.pop(0)]
            digest = handler.path.rpartition("/")[2]
            self.sent_bytes[digest] = self.sent_bytes.get(digest, 0) + len(data)
        handler.wfile.write(data)


def answer(
    handler: BaseHTTPRequestHandler,
    status: int,
    body: bytes = b"",
    headers: Optional[Mapping[str, str]] = None,
) -> bool:
    """Answer a request; True, as a rule must return."""
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)
    return True


class TokenService:
    """A front that lets nobody in without a token, and the service that gives one for user and password."""

    def __init__(self, front: Front, username: str = "", password: str = "") -> None:
        self.tokens: List[str] = []
        self.asked: List[Dict[str, List[str]]] = []
        self._want = ""
        if username:
            self._want = "Basic " + base64.b64encode(f"{username}:{password}".encode()).decode()
        self._front = front
        front.rules.append(self._guard)

    def expire(self) -> None:
        """Take every token back."""
        self.tokens.clear()

    def _guard(self, handler: BaseHTTPRequestHandler) -> bool:
        sent = handler.headers.get("Authorization", "")
        if handler.path.startswith("/token"):
            return self._give(handler, sent)
        if sent in [f"Bearer {token}" for token in self.tokens]:
            return False
        challenge = f'Bearer realm="http://{self._front.host}/token",service="kit",scope="repository:a:pull"'
        handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        return answer(handler, 401, b"{}", {"WWW-Authenticate": challenge})

    def _give(self, handler: BaseHTTPRequestHandler, sent: str) -> bool:
        self.asked.append(parse_qs(urlsplit(handler.path).query))
        if sent != self._want:
            return answer(handler, 401, b"{}")
        self.tokens.append(f"token-{len(self.asked)}")
        return answer(handler, 200, json.dumps({"token": self.tokens[-1]}).encode())


def blob_path(sha256: str) -> str:
    """The end of a blob's address."""
    return f"/blobs/{digest_from(sha256)}"
