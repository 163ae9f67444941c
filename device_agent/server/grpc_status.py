"""Errors as gRPC says them: a status code, a text, and when to come back."""

from __future__ import annotations

from typing import Any, Callable, Dict, NoReturn

import grpc

from device_agent.server.fields import ProtocolError
from device_agent.server.grpc_messages import SCHEMA

RETRY_AFTER_S = 1

#: Told the name of the status code of every error.
CountError = Callable[[str], None]

# What Triton answers where it would answer with this status over HTTP.
_CODES: Dict[int, grpc.StatusCode] = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.UNAVAILABLE,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
}
_MAX_TEXT_BYTES = 2048  # clients drop the headers of a call, its status with them, beyond 8 KiB
_RETRY_INFO = "type.googleapis.com/google.rpc.RetryInfo"


def code_of(error: ProtocolError) -> grpc.StatusCode:
    """The status code of an error; ``INTERNAL`` for what is the server's fault."""
    return _CODES.get(error.status, grpc.StatusCode.INTERNAL)


def without_frames(error: ProtocolError) -> ProtocolError:
    """An error to keep beyond its handler.

    Its traceback knows the frames that it went through, and with them the request's memory. A frame that
    keeps the error would keep itself, and a client's shared memory, until garbage is collected.
    """
    return error.with_traceback(None)


async def abort(context: Any, error: ProtocolError, count_error: CountError) -> NoReturn:
    """End a call with an error; ``UNAVAILABLE`` says when to try again.

    Clients with a retry policy heed ``grpc-retry-pushback-ms`` by themselves; others find a ``RetryInfo``
    (google.rpc, "error_details.proto") in the details of the status.
    """
    code = code_of(error)
    count_error(code.name)
    # A client's own words are in it. gRPC would never end a call whose text it cannot encode.
    text = error.message.encode("utf-8", "replace")[:_MAX_TEXT_BYTES].decode("utf-8", "ignore")
    metadata = _retry_metadata(text) if code is grpc.StatusCode.UNAVAILABLE else ()
    await context.abort(code, text, metadata)
    raise error  # not reached: abort raises


def _retry_metadata(text: str) -> Any:
    value = SCHEMA.encode("RetryInfo", {"retry_delay": {"seconds": RETRY_AFTER_S}})
    status = {
        "code": grpc.StatusCode.UNAVAILABLE.value[0],
        "message": text,
        "details": [{"type_url": _RETRY_INFO, "value": value}],
    }
    return (
        ("grpc-retry-pushback-ms", str(RETRY_AFTER_S * 1000)),
        ("grpc-status-details-bin", SCHEMA.encode("Status", status)),
    )
