"""The fields of a request's JSON, each read and checked for its type. Pure functions.

Each raises ProtocolError with status 400 for a value of another type.
"""

from __future__ import annotations

import base64
import json
import math
import reprlib
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Optional, Tuple

from device_agent import json_text

_FILE_PREFIX = "file:"  # of the parameters of a load request that carry files

# No tensor is longer in any direction; beyond it, numpy and Python's own conversions raise errors of theirs.
_MAX_SIZE = 2**63 - 1

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100
_SHORT.maxlist = 16
_SHORT.maxlevel = 2


class ProtocolError(Exception):
    """A request that is answered with an error.

    Attributes:
        status: the HTTP status.
        message: what the client is told.
        allowed: with status 405, the method that the path takes.
        retry_after_s: with status 503, when to try again; whole seconds, as the header wants them.
    """

    def __init__(self, status: int, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.allowed = ""
        self.retry_after_s = max(1, math.ceil(retry_after_s))

    @classmethod
    def wrong_method(cls, used: str, allowed: str) -> ProtocolError:
        """A 405, which names the method that the path takes (RFC 9110, section 15.5.6)."""
        error = cls(405, f"use {allowed} here, not {used}")
        error.allowed = allowed
        return error


@dataclass(frozen=True)
class SharedPart:
    """A part of a registered shared memory region: its name, and a place in it in bytes."""

    region: str
    offset: int
    byte_size: int


def error_body(message: str) -> bytes:
    """The body of every error answer."""
    return json.dumps({"error": message}).encode()


def shown(value: Any) -> str:
    """A client's value for an error's text: cut short, however long or deeply nested it is."""
    return _SHORT.repr(value)


def is_size(value: Any) -> bool:
    """Whether a JSON value is a whole number that can be a size, in bytes or elements."""
    return type(value) is int and 0 <= value <= _MAX_SIZE


def load_json(body: bytes, what: str) -> Mapping[str, Any]:
    """Parse a JSON object.

    Raises:
        ProtocolError: 400: not UTF-8, not JSON, nested beyond reason, or not an object.
    """
    try:
        value = json_text.loads(body)
    except ValueError as error:
        raise ProtocolError(400, f"{what} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ProtocolError(400, f"{what} is not a JSON object")
    return value


def object_field(parent: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """An object among the fields of ``parent``; empty where it is absent or null."""
    value = parent.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ProtocolError(400, f"'{key}' of {where} is not an object")
    return value


def objects_field(parent: Mapping[str, Any], key: str) -> List[Mapping[str, Any]]:
    """A list of objects among the fields of ``parent``."""
    value = parent.get(key)
    if not isinstance(value, list) or any(not isinstance(item, dict) for item in value):
        raise ProtocolError(400, f"the request has no list of objects '{key}'")
    return value


def id_field(request: Mapping[str, Any]) -> Optional[str]:
    """The client's own name for its request; None: it gave none."""
    value = request.get("id")
    if value is not None and not isinstance(value, str):
        raise ProtocolError(400, "'id' is not a string")
    return value or None


def timeout_s(parameters: Mapping[str, Any]) -> Optional[float]:
    """The request's ``timeout``, given in microseconds, in seconds; None: it has none."""
    value = parameters.get("timeout")
    if value is None or value == 0:
        return None
    if not is_size(value):
        raise ProtocolError(400, "'timeout' is not a whole number of microseconds")
    return float(value) / 1e6


def priority(parameters: Mapping[str, Any]) -> int:
    """The request's ``priority``, 1 being the highest; 0: it has none."""
    value = parameters.get("priority", 0)
    if not is_size(value):
        raise ProtocolError(400, "'priority' is not a whole number")
    return int(value)


def shared_part(parameters: Mapping[str, Any], where: str) -> Optional[SharedPart]:
    """Where in shared memory a tensor lies, by its parameters; None: it is not there."""
    region = parameters.get("shared_memory_region")
    if region is None:
        return None
    offset = parameters.get("shared_memory_offset", 0)
    size = parameters.get("shared_memory_byte_size", -1)
    if not isinstance(region, str) or not is_size(offset) or not is_size(size):
        raise ProtocolError(400, f"{where}: its place in shared memory is not a region, an offset and a size")
    return SharedPart(region, offset, size)


def binary_size(item: Mapping[str, Any], parameters: Mapping[str, Any], name: str) -> Optional[int]:
    """Size of an input's raw data behind the JSON, in bytes; None: its data is in the JSON."""
    size = parameters.get("binary_data_size")
    if size is None:
        return None
    if not is_size(size):
        raise ProtocolError(400, f"input '{name}': binary_data_size is not a size in bytes")
    if "data" in item:
        raise ProtocolError(400, f"input '{name}' has both data and binary_data_size")
    return int(size)


def load_parameters(body: bytes) -> Tuple[Optional[str], Dict[str, bytes]]:
    """What a load request brings along: a configuration in JSON, and files in base64 by path."""
    wanted = load_json(body, "the request") if body else {}
    parameters = object_field(wanted, "parameters", "the request")
    config = parameters.get("config")
    if config is not None and not isinstance(config, str):
        raise ProtocolError(400, "the parameter 'config' is not a string of JSON")
    files: Dict[str, bytes] = {}
    for key, value in parameters.items():
        if not key.startswith(_FILE_PREFIX):
            continue
        try:
            files[key[len(_FILE_PREFIX) :]] = base64.b64decode(value, validate=True)
        except (TypeError, ValueError) as error:
            raise ProtocolError(400, f"the parameter {shown(key)} is not base64") from error
    return config, files
