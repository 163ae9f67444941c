"""What answers what: the paths of the Open Inference Protocol v2, on the loaded models."""

from __future__ import annotations

import asyncio
import json
import logging
from functools import partial
from typing import Any, Callable, Dict, Optional, Tuple

from device_agent import __version__
from device_agent.batching.batcher import DeadlineExceeded, Job, QueueFull
from device_agent.config import Config
from device_agent.engines.base import InputError
from device_agent.errors import AgentError
from device_agent.metrics import Metrics
from device_agent.models import LoadedModel, Models
from device_agent.server.connection import BINARY, JSON, Connection, Request
from device_agent.server.content import compress, decompress
from device_agent.server.documents import model_config, model_metadata, model_statistics
from device_agent.server.fields import ProtocolError, error_body, load_json
from device_agent.server.paths import Route, parse_path
from device_agent.server.protocol import InferRequest, ModelProtocol
from device_agent.server.shared_memory import Regions

EXTENSIONS = [
    "binary_tensor_data",
    "model_configuration",
    "model_repository",
    "statistics",
    "system_shared_memory",
]

_log = logging.getLogger(__name__)


class InferenceRoutes:
    """The handler of the serving port.

    Attributes:
        ready: whether every model that should serve has been loaded.
    """

    def __init__(self, models: Models, metrics: Metrics, config: Config) -> None:
        self.ready = False
        self._models = models
        self._metrics = metrics
        self._config = config
        self._regions = Regions()
        self._routes: Dict[bytes, Route] = {}
        self._unloaded: Dict[str, LoadedModel] = {}  # by a client; what it may load again
        self._protocols: Dict[str, Tuple[LoadedModel, ModelProtocol]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._handlers: Dict[str, Callable[[Request, Connection, Route], None]] = {
            "infer": self._infer,
            "server_metadata": self._server_metadata,
            "live": lambda request, connection, route: connection.respond(200, []),
            "ready": lambda request, connection, route: connection.respond(200 if self.ready else 400, []),
            "model_ready": self._model_ready,
            "metadata": self._metadata,
            "config": self._model_config,
            "statistics": self._statistics,
            "all_statistics": self._all_statistics,
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
                raise ProtocolError(404, f"there is nothing at {request.target.decode('latin-1')!r}")
            if len(self._routes) < 256:
                self._routes[request.target] = route
        if request.method != route.method:
            raise ProtocolError(405, f"use {route.method} here, not {request.method}")
        return route

    def _loaded(self, route: Route) -> Tuple[LoadedModel, ModelProtocol]:
        name = route.name or ""
        loaded = self._models.get(name)
        if loaded is None:
            raise ProtocolError(404, f"model '{name}' is not found")
        if route.version is not None and route.version != loaded.version:
            raise ProtocolError(
                404, f"model '{name}' has no version {route.version}; it has {loaded.version}"
            )
        known = self._protocols.get(name)
        if known is None or known[0] is not loaded:
            known = self._protocols[name] = (loaded, _protocol_of(loaded, self._regions))
        return known

    # Inference

    def _infer(self, request: Request, connection: Connection, route: Route) -> None:
        loaded, protocol = self._loaded(route)
        headers = request.headers
        body = decompress(request.body, headers.get(b"content-encoding"), self._config.limits.max_body_bytes)
        infer = protocol.decode(body, _json_bytes(headers.get(b"inference-header-content-length")))
        on_done = partial(_answer, connection, protocol, infer, headers.get(b"accept-encoding"))
        job = Job(infer.inputs, infer.rows, infer.batch_key, on_done, infer.timeout_s)
        try:
            loaded.batcher.submit(job)
        except QueueFull:
            raise ProtocolError(
                503, f"model '{protocol.name}' has as many requests waiting as it may"
            ) from None
        except DeadlineExceeded as error:
            raise _job_error(protocol, error) from None
        connection.on_cancel = partial(loaded.batcher.cancel, job)

    # Documents

    def _server_metadata(self, request: Request, connection: Connection, route: Route) -> None:
        _respond_json(connection, {"name": "edgekit-agent", "version": __version__, "extensions": EXTENSIONS})

    def _model_ready(self, request: Request, connection: Connection, route: Route) -> None:
        try:
            self._loaded(route)
        except ProtocolError:
            connection.respond(400, [])
        else:
            connection.respond(200, [])

    def _metadata(self, request: Request, connection: Connection, route: Route) -> None:
        loaded, protocol = self._loaded(route)
        _respond_json(connection, model_metadata(protocol, loaded.engine.runtime))

    def _model_config(self, request: Request, connection: Connection, route: Route) -> None:
        loaded, protocol = self._loaded(route)
        delay_us = self._config.batching.max_queue_delay_us
        _respond_json(connection, model_config(protocol, loaded.engine.runtime, loaded.batchable, delay_us))

    def _statistics(self, request: Request, connection: Connection, route: Route) -> None:
        loaded, _ = self._loaded(route)
        _respond_json(connection, {"model_stats": [self._statistics_of(loaded)]})

    def _all_statistics(self, request: Request, connection: Connection, route: Route) -> None:
        stats = [self._statistics_of(loaded) for loaded in self._models.serving()]
        _respond_json(connection, {"model_stats": stats})

    def _statistics_of(self, loaded: LoadedModel) -> Dict[str, Any]:
        name = loaded.manifest.name
        return model_statistics(name, loaded.version, self._metrics.of_model(name, loaded.digest))

    # The repository extension

    def _index(self, request: Request, connection: Connection, route: Route) -> None:
        wanted = load_json(bytes(request.body), "the request") if request.body else {}
        entries = [_index_entry(loaded, "READY", "") for loaded in self._models.serving()]
        if not wanted.get("ready"):
            unloaded = [m for name, m in sorted(self._unloaded.items()) if self._models.get(name) is None]
            entries += [_index_entry(model, "UNAVAILABLE", "unloaded") for model in unloaded]
        _respond_json(connection, entries)

    def _load(self, request: Request, connection: Connection, route: Route) -> None:
        name = route.name or ""
        if self._models.get(name) is not None:
            connection.respond(200, [])
        elif name in self._unloaded:
            self._spawn(self._reload(self._unloaded[name], connection))
        else:
            raise ProtocolError(400, f"model '{name}' is not installed on this device")

    async def _reload(self, known: LoadedModel, connection: Connection) -> None:
        loop = asyncio.get_running_loop()
        prepare = partial(self._models.prepare, known.directory, known.manifest, known.digest)
        try:
            loaded = await loop.run_in_executor(None, prepare)
        except AgentError as error:
            message = f"model '{known.manifest.name}' does not load: {error.what}: {error.why}"
            _respond_error(connection, ProtocolError(400, message))
            return
        # Another load, or an installation, may have been quicker; then that one stays.
        replaced = loaded if self._models.get(known.manifest.name) else self._models.switch(loaded)
        connection.respond(200, [])
        if replaced is not None:
            await self._models.retire(replaced)

    def _unload(self, request: Request, connection: Connection, route: Route) -> None:
        loaded = self._models.unload(route.name or "")
        self._protocols.pop(route.name or "", None)
        connection.respond(200, [])
        if loaded is not None:
            self._unloaded[loaded.manifest.name] = loaded
            self._spawn(self._models.retire(loaded))

    # The shared memory extension

    def _region_status(self, request: Request, connection: Connection, route: Route) -> None:
        _respond_json(connection, self._regions.status(route.name))

    def _region_register(self, request: Request, connection: Connection, route: Route) -> None:
        wanted = load_json(bytes(request.body), "the request")
        self._regions.register(
            route.name or "", wanted.get("key"), wanted.get("offset", 0), wanted.get("byte_size")
        )
        connection.respond(200, [])

    def _region_unregister(self, request: Request, connection: Connection, route: Route) -> None:
        self._regions.unregister(route.name)
        connection.respond(200, [])

    def _cuda_register(self, request: Request, connection: Connection, route: Route) -> None:
        raise ProtocolError(400, "this server has no CUDA device to share memory with")

    def _spawn(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)  # the loop itself keeps only a weak reference
        task.add_done_callback(self._tasks.discard)


def _answer(
    connection: Connection, protocol: ModelProtocol, infer: InferRequest, accepted: Optional[bytes], job: Job
) -> None:
    """Send what came of a job. Must not raise: the other requests of its batch come after it."""
    try:
        if job.error is not None or job.outputs is None:
            raise _job_error(protocol, job.error)
        answer = protocol.encode(infer, job.outputs)
        parts, headers = compress(answer.parts, accepted)
        content_type = JSON
        if answer.json_bytes is not None:
            content_type = BINARY
            headers += b"Inference-Header-Content-Length: %d\r\n" % answer.json_bytes
        connection.respond(200, parts, content_type, headers)
    except ProtocolError as error:
        _respond_error(connection, error)
    except Exception:
        _log.exception("the answer of model %s could not be written", protocol.name)
        _respond_error(connection, ProtocolError(500, "the agent failed; its log has the cause"))


def _job_error(protocol: ModelProtocol, error: Optional[Exception]) -> ProtocolError:
    if isinstance(error, InputError):
        return ProtocolError(400, str(error))
    if isinstance(error, DeadlineExceeded):
        return ProtocolError(503, "the request cannot run within its timeout")
    _log.error("model %s failed: %s", protocol.name, error)
    return ProtocolError(500, f"model '{protocol.name}' failed: {error}")


def _respond_error(connection: Connection, error: ProtocolError) -> None:
    headers = b"Retry-After: 1\r\n" if error.status == 503 else b""
    connection.respond(error.status, [error_body(error.message)], JSON, headers)


def _respond_json(connection: Connection, document: Any) -> None:
    connection.respond(200, [json.dumps(document).encode()])


def _json_bytes(value: Optional[bytes]) -> Optional[int]:
    if value is None:
        return None
    if not value.isdigit():
        raise ProtocolError(400, "Inference-Header-Content-Length is not a size in bytes")
    return int(value)


def _protocol_of(loaded: LoadedModel, regions: Regions) -> ModelProtocol:
    manifest = loaded.manifest
    return ModelProtocol(
        manifest.name,
        loaded.version,
        manifest.inputs,
        manifest.outputs,
        manifest.max_batch_size,
        regions.view,
    )


def _index_entry(loaded: LoadedModel, state: str, reason: str) -> Dict[str, str]:
    return {"name": loaded.manifest.name, "version": loaded.version, "state": state, "reason": reason}
