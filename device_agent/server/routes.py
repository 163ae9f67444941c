"""The service over HTTP: what answers which path of the Open Inference Protocol v2."""

from __future__ import annotations

import asyncio
import json
import logging
from functools import partial
from typing import Any, Callable, Dict, Optional

from device_agent.batching.job import Job
from device_agent.server.connection import BINARY, JSON, Connection
from device_agent.server.content import compress, decompress
from device_agent.server.fields import (
    ProtocolError,
    error_body,
    load_json,
    load_parameters,
    shown,
)
from device_agent.server.interface import InferRequest
from device_agent.server.paths import Route, parse_path
from device_agent.server.protocol import ModelProtocol
from device_agent.server.request import Request, parse_length
from device_agent.server.service import INTERNAL_ERROR, InferenceService, Protocols

_CACHED_ROUTES = 256

_log = logging.getLogger(__name__)


class InferenceRoutes:
    """The handler of the serving port."""

    def __init__(self, service: InferenceService) -> None:
        self._service = service
        self._routes: Dict[bytes, Route] = {}
        self._protocols = Protocols(lambda interface: ModelProtocol(interface, service.regions.view))
        self._handlers: Dict[str, Callable[[Request, Connection, Route], None]] = {
            "infer": self._infer,
            "server_metadata": lambda request, connection, route: _respond_json(
                connection, service.server_metadata()
            ),
            "live": lambda request, connection, route: connection.respond(200, []),
            "ready": lambda request, connection, route: _respond_health(connection, service.ready),
            "model_ready": self._model_ready,
            "metadata": self._metadata,
            "config": self._model_config,
            "statistics": self._statistics,
            "all_statistics": self._statistics,
            "index": self._index,
            "load": self._load,
            "unload": self._unload,
            "region_status": self._region_status,
            "region_register": self._region_register,
            "region_unregister": self._region_unregister,
            "cuda_status": lambda request, connection, route: _respond_json(connection, []),
            "cuda_register": self._cuda_register,
            "cuda_unregister": lambda request, connection, route: connection.respond(200, []),
        }

    def __call__(self, request: Request, connection: Connection) -> None:
        """Answer a request, now or when its inference is done."""
        try:
            route = self._route(request)
            self._handlers[route.kind](request, connection, route)
        except ProtocolError as error:
            _respond_error(connection, error)

    def _route(self, request: Request) -> Route:
        route = self._routes.get(request.target)
        if route is None:
            route = parse_path(request.target)
            if route is None:
                raise ProtocolError(404, f"there is nothing at {shown(request.target.decode('latin-1'))}")
            if len(self._routes) < _CACHED_ROUTES:
                self._routes[request.target] = route
        if request.method != route.method:
            raise ProtocolError.wrong_method(request.method, route.method)
        return route

    def _body(self, request: Request) -> memoryview:
        """The body of a request, without its Content-Encoding."""
        coding = request.headers.get(b"content-encoding")
        return decompress(request.body, coding, self._service.max_body_bytes)

    # Inference

    def _infer(self, request: Request, connection: Connection, route: Route) -> None:
        service, headers = self._service, request.headers
        model = service.find(route.name or "", route.version)
        protocol = self._protocols.of(model)
        infer = protocol.decode(
            self._body(request), _json_bytes(headers.get(b"inference-header-content-length"))
        )
        on_done = partial(self._answer, connection, protocol, infer, headers.get(b"accept-encoding"))
        connection.cancel_with(service.submit(model, infer, on_done))

    def _answer(
        self,
        connection: Connection,
        protocol: ModelProtocol,
        infer: InferRequest,
        accepted: Optional[bytes],
        job: Job,
    ) -> None:
        """Send what came of a job. Must not raise: the other requests of its batch come after it."""
        name = protocol.interface.name
        try:
            answer = protocol.encode(infer, self._service.outputs_of(name, job))
            parts, headers = compress(answer.parts, accepted)
            content_type = JSON
            if answer.json_bytes is not None:
                content_type = BINARY
                headers += b"Inference-Header-Content-Length: %d\r\n" % answer.json_bytes
            connection.respond(200, parts, content_type, headers)
        except ProtocolError as error:
            _respond_error(connection, error)
        except Exception:
            _log.exception("the answer of model %s could not be written", name)
            _respond_error(connection, ProtocolError(500, INTERNAL_ERROR))

    # Documents

    def _model_ready(self, request: Request, connection: Connection, route: Route) -> None:
        _respond_health(connection, self._service.model_ready(route.name or "", route.version))

    def _metadata(self, request: Request, connection: Connection, route: Route) -> None:
        _respond_json(connection, self._service.model_metadata(route.name or "", route.version))

    def _model_config(self, request: Request, connection: Connection, route: Route) -> None:
        _respond_json(connection, self._service.model_config(route.name or "", route.version))

    def _statistics(self, request: Request, connection: Connection, route: Route) -> None:
        _respond_json(connection, self._service.statistics(route.name, route.version))

    # The repository extension

    def _index(self, request: Request, connection: Connection, route: Route) -> None:
        wanted = load_json(bytes(self._body(request)), "the request") if request.body else {}
        _respond_json(connection, self._service.index(bool(wanted.get("ready"))))

    def _load(self, request: Request, connection: Connection, route: Route) -> None:
        body = bytes(self._body(request))
        self._service.spawn(self._load_and_answer(route.name or "", body, connection))

    async def _load_and_answer(self, name: str, body: bytes, connection: Connection) -> None:
        try:
            # A model inside the request is megabytes of JSON, which the requests of others must not wait for.
            loop = asyncio.get_running_loop()
            config, files = await loop.run_in_executor(None, load_parameters, body)
            await self._service.load(name, config, files)
        except ProtocolError as error:
            _respond_error(connection, error)
        except Exception:
            _log.exception("model %s could not be loaded", name)
            _respond_error(connection, ProtocolError(500, INTERNAL_ERROR))
        else:
            connection.respond(200, [])

    def _unload(self, request: Request, connection: Connection, route: Route) -> None:
        self._service.unload(route.name or "")
        connection.respond(200, [])

    # The shared memory extension

    def _region_status(self, request: Request, connection: Connection, route: Route) -> None:
        _respond_json(connection, self._service.regions.status(route.name))

    def _region_register(self, request: Request, connection: Connection, route: Route) -> None:
        wanted = load_json(bytes(self._body(request)), "the request")
        self._service.regions.register(
            route.name or "", wanted.get("key"), wanted.get("offset", 0), wanted.get("byte_size")
        )
        connection.respond(200, [])

    def _region_unregister(self, request: Request, connection: Connection, route: Route) -> None:
        self._service.regions.unregister(route.name)
        connection.respond(200, [])

    def _cuda_register(self, request: Request, connection: Connection, route: Route) -> None:
        raise ProtocolError(400, "this server has no CUDA device to share memory with")


def _respond_error(connection: Connection, error: ProtocolError) -> None:
    headers = b"Retry-After: %d\r\n" % error.retry_after_s if error.status == 503 else b""
    if error.allowed:
        headers = b"Allow: %s\r\n" % error.allowed.encode()
    connection.respond(error.status, [error_body(error.message)], JSON, headers)


def _respond_json(connection: Connection, document: Any) -> None:
    connection.respond(200, [json.dumps(document).encode()])


def _respond_health(connection: Connection, good: bool) -> None:
    connection.respond(200 if good else 400, [])


def _json_bytes(value: Optional[bytes]) -> Optional[int]:
    if value is None:
        return None
    length = parse_length(value)
    if length is None:
        raise ProtocolError(400, "Inference-Header-Content-Length is not a size in bytes")
    return length
