"""The gRPC listener: ``inference.GRPCInferenceService``, imported only where it is switched on."""

from __future__ import annotations

import asyncio
import inspect
import logging
import socket
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Callable, Dict, Mapping, Optional, Tuple
from urllib.parse import unquote

import grpc
import grpc.aio

from device_agent.config import Address, Limits
from device_agent.server.fields import ProtocolError
from device_agent.server.grpc_inference import GrpcInference
from device_agent.server.grpc_messages import SCHEMA
from device_agent.server.grpc_relay import GrpcRelay
from device_agent.server.grpc_status import CountError, abort, without_frames
from device_agent.server.service import INTERNAL_ERROR, InferenceService
from device_agent.server.wire import WireError

if TYPE_CHECKING:
    from device_agent.server.access import Access

SERVICE = "inference.GRPCInferenceService"

_DRAIN_GRACE_S = 0.25
_FILE_PREFIX = "file:"

Values = Mapping[str, Any]
# The kinds of request and response, and what makes one of the other.
Call = Tuple[str, str, Callable[[Values], Any]]

_log = logging.getLogger(__name__)


class GrpcServer:
    """A listener for gRPC."""

    def __init__(
        self,
        service: InferenceService,
        limits: Limits,
        count_error: CountError,
        access: Optional[Access] = None,
    ) -> None:
        """Create a server that does not listen yet; call it on the event loop.

        Args:
            service: what answers.
            limits: what a client may cost.
            count_error: told the status code of every failed request.
            access: who may come in; None: everybody, without TLS.
        """
        self._access = access
        self._limits = limits
        self._relay: Optional[GrpcRelay] = None
        self._inference = GrpcInference(service, count_error)
        self._server = grpc.aio.server(
            options=_options(limits), maximum_concurrent_rpcs=limits.max_connections
        )
        answers: Dict[str, Any] = {
            name: partial(_answer, call, count_error) for name, call in _calls(service).items()
        }
        methods = {
            name: grpc.unary_unary_rpc_method_handler(self._guarded(answer))
            for name, answer in {**answers, "ModelInfer": self._inference.infer}.items()
        }
        methods["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(
            self._guarded(self._inference.stream)
        )
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))

    async def start(self, address: Address) -> str:
        """Listen.

        Returns:
            ``host:port`` as bound.

        Raises:
            OSError: the address is taken, or not this machine's.
        """
        host = f"[{address.host}]" if ":" in address.host else address.host
        try:
            where = f"{host}:{address.port}"
            if self._access is None:
                port = self._server.add_insecure_port(where)
            else:
                port = self._server.add_secure_port(where, _credentials(self._access))
        except RuntimeError as error:
            raise OSError(f"gRPC cannot bind it: {error}") from error
        await self._server.start()
        return f"{host}:{port}"

    async def start_on(self, listener: socket.socket) -> None:
        """Serve a TCP socket that the service manager opened and keeps open after the agent."""
        context = None if self._access is None else self._access.context_for("h2")
        self._relay = GrpcRelay(self._limits, context)
        self._server.add_insecure_port(self._relay.address)
        await self._server.start()
        await self._relay.serve(listener)

    async def drain(self, timeout_s: float) -> bool:
        """Refuse what is new, or leave it to the next agent; answer what was accepted; close.

        Calls are refused for a moment before connections are told to end (GOAWAY): gRPC drops calls that
        arrive while that message is under way, and their clients would learn no more than "cancelled". On a
        socket of the service manager's they are told before, and no call is refused.

        Returns:
            Whether every accepted request was answered in time.
        """
        started_s = time.monotonic()
        if self._relay is not None:
            await self._relay.let_go(timeout_s)
        self._inference.refuse()
        await asyncio.sleep(min(_DRAIN_GRACE_S, timeout_s))
        self._inference.end_streams()
        await self._server.stop(max(0.0, started_s + timeout_s - time.monotonic()))
        if self._relay is not None:
            await self._relay.close()
        return time.monotonic() - started_s < timeout_s

    def _guarded(self, answer: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        access, count_error = self._access, self._inference.count_error
        if access is None:
            return answer

        async def guarded(request: Any, context: Any) -> Any:
            metadata = dict(context.invocation_metadata() or ())
            authorization = metadata.get("authorization")
            refusal = access.refusal(
                None if authorization is None else authorization.encode("latin-1", "replace"),
                _address_of(context.peer()),
            )
            if refusal is not None:
                error = ProtocolError(refusal.status, refusal.message, refusal.retry_after_s)
                await abort(context, error, count_error)
            return await answer(request, context)

        return guarded


def _address_of(peer: str) -> str:
    """The address in what gRPC calls a peer: ``ipv4:192.0.2.1:50000``, ``ipv6:%5B2001:db8::1%5D:50000``.

    Or the relay's name for a client, ``unix-abstract:[2001:db8::1]:0f3c``.
    """
    return unquote(peer.partition(":")[2]).rpartition(":")[0].strip("[]")


def _credentials(access: Access) -> Any:
    """TLS that takes a renewed certificate with the next connection."""

    def current() -> Any:
        key, certificate, client_ca = access.pem()
        return grpc.ssl_server_certificate_configuration(((key, certificate),), client_ca)

    return grpc.dynamic_ssl_server_credentials(
        current(), current, require_client_authentication=access.needs_certificate
    )


def _options(limits: Limits) -> Tuple[Tuple[str, int], ...]:
    return (
        ("grpc.max_receive_message_length", limits.max_body_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_connection_idle_ms", round(limits.idle_timeout_s * 1e3)),
        ("grpc.server_handshake_timeout_ms", round(limits.header_timeout_s * 1e3)),
        ("grpc.so_reuseport", 0),  # else a second agent would take the port too, and half of the requests
    )


async def _answer(call: Call, count_error: CountError, message: bytes, context: Any) -> bytes:
    request_kind, response_kind, function = call
    try:
        values = function(SCHEMA.decode(request_kind, memoryview(message)))
        if inspect.isawaitable(values):
            values = await values
        return SCHEMA.encode(response_kind, values or {})
    except WireError as error:
        failure = ProtocolError(400, f"the request is not a {request_kind}: {error}")
    except ProtocolError as error:
        failure = without_frames(error)
    except Exception:
        _log.exception("a %s failed", request_kind)
        failure = ProtocolError(500, INTERNAL_ERROR)
    await abort(context, failure, count_error)


def _calls(service: InferenceService) -> Dict[str, Call]:
    """Every call but those of inference, by name."""
    regions = service.regions
    return {
        "ServerLive": ("Empty", "ServerLiveResponse", lambda _: {"live": True}),
        "ServerReady": ("Empty", "ServerReadyResponse", lambda _: {"ready": service.ready}),
        "ServerMetadata": ("Empty", "ServerMetadataResponse", lambda _: service.server_metadata()),
        "ModelReady": (
            "ModelReadyRequest",
            "ModelReadyResponse",
            lambda request: {"ready": service.model_ready(*_model_of(request))},
        ),
        "ModelMetadata": (
            "ModelMetadataRequest",
            "ModelMetadataResponse",
            lambda request: service.model_metadata(*_model_of(request)),
        ),
        "ModelConfig": (
            "ModelConfigRequest",
            "ModelConfigResponse",
            lambda request: {"config": service.model_config(*_model_of(request))},
        ),
        "ModelStatistics": (
            "ModelStatisticsRequest",
            "ModelStatisticsResponse",
            lambda request: service.statistics(request.get("name") or None, request.get("version") or None),
        ),
        "RepositoryIndex": (
            "RepositoryIndexRequest",
            "RepositoryIndexResponse",
            lambda request: {"models": service.index(request.get("ready", False))},
        ),
        "RepositoryModelLoad": ("RepositoryModelLoadRequest", "Empty", partial(_load, service)),
        "RepositoryModelUnload": (
            "RepositoryModelUnloadRequest",
            "Empty",
            lambda request: service.unload(request.get("model_name", "")),
        ),
        "SystemSharedMemoryStatus": (
            "SystemSharedMemoryStatusRequest",
            "SystemSharedMemoryStatusResponse",
            lambda request: {
                "regions": {region["name"]: region for region in regions.status(request.get("name") or None)}
            },
        ),
        "SystemSharedMemoryRegister": (
            "SystemSharedMemoryRegisterRequest",
            "Empty",
            lambda request: regions.register(
                request.get("name", ""),
                request.get("key", ""),
                request.get("offset", 0),
                request.get("byte_size", 0),
            ),
        ),
        "SystemSharedMemoryUnregister": (
            "SystemSharedMemoryUnregisterRequest",
            "Empty",
            lambda request: regions.unregister(request.get("name") or None),
        ),
        "CudaSharedMemoryStatus": ("Empty", "Empty", lambda _: None),
        "CudaSharedMemoryRegister": ("Empty", "Empty", _refuse_cuda),
        "CudaSharedMemoryUnregister": ("Empty", "Empty", lambda _: None),
    }


def _model_of(request: Values) -> Tuple[str, Any]:
    return request.get("name", ""), request.get("version") or None


async def _load(service: InferenceService, request: Values) -> None:
    parameters = request["parameters"]
    config = parameters.get("config", {}).get("string_param")
    files = {
        key[len(_FILE_PREFIX) :]: bytes(choice.get("bytes_param", b""))
        for key, choice in parameters.items()
        if key.startswith(_FILE_PREFIX)
    }
    # A client that gives up ends its call, but not what it began: half a load would hold memory for nobody.
    await asyncio.shield(service.load(request.get("model_name", ""), config, files))


def _refuse_cuda(request: Values) -> None:
    raise ProtocolError(400, "this server has no CUDA device to share memory with")
