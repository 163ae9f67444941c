"""The paths of the protocol. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Optional
from urllib.parse import unquote


@dataclass(frozen=True)
class Route:
    """A parsed path.

    Attributes:
        kind: which handler.
        method: the HTTP method that it takes.
        name: of the model or the shared memory region; None: the path names none.
        version: of the model; None: the path names none.
    """

    kind: str
    method: str = "GET"
    name: Optional[str] = None
    version: Optional[str] = None


_FIXED = {
    "v2": Route("server_metadata"),
    "v2/health/live": Route("live"),
    "v2/health/ready": Route("ready"),
    "v2/models/stats": Route("all_statistics"),
    "v2/repository/index": Route("index", "POST"),
}
_OF_MODEL = {
    "": "metadata",
    "ready": "model_ready",
    "config": "config",
    "stats": "statistics",
    "infer": "infer",
}
_SHARED = {"systemsharedmemory": "region", "cudasharedmemory": "cuda"}


def parse_path(target: bytes) -> Optional[Route]:
    """Find the route of a request target; None: there is none."""
    path = unquote(target.decode("latin-1").partition("?")[0]).strip("/")
    if path in _FIXED:
        return _FIXED[path]
    head, *rest = path.split("/")
    if head != "v2" or not rest:
        return None
    room, *rest = rest
    if room == "models" and rest:
        return _model_route(rest[0], rest[1:])
    if room == "repository":
        return _repository_route(rest)
    if room in _SHARED:
        return _shared_memory_route(_SHARED[room], rest)
    return None


def _model_route(model: str, rest: List[str]) -> Optional[Route]:
    version: Optional[str] = None
    if len(rest) >= 2 and rest[0] == "versions":
        version, rest = rest[1], rest[2:]
    if len(rest) > 1 or (rest and rest[0] not in _OF_MODEL):
        return None
    kind = _OF_MODEL[rest[0] if rest else ""]
    return Route(kind, "POST" if kind == "infer" else "GET", model, version)


def _repository_route(rest: List[str]) -> Optional[Route]:
    if len(rest) == 3 and rest[0] == "models" and rest[2] in ("load", "unload"):
        return Route(rest[2], "POST", rest[1])
    return None


def _shared_memory_route(kind: str, rest: List[str]) -> Optional[Route]:
    name: Optional[str] = None
    if len(rest) == 3 and rest[0] == "region":
        name, rest = rest[1], rest[2:]
    if rest == ["status"]:
        return Route(f"{kind}_status", "GET", name)
    if rest == ["unregister"] or (rest == ["register"] and name is not None):
        return Route(f"{kind}_{rest[0]}", "POST", name)
    return None
