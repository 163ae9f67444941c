"""The form of a manifest: strict JSON, and strict types.

A key that is not known or occurs twice, a number that is not finite, half a character, a wrong type: each is
an error that says where. What the fields may hold is said by the dataclasses' own annotations.

Standard library only; Python 3.8.
"""

from __future__ import annotations

import collections.abc
import json
import math
from dataclasses import fields, is_dataclass
from functools import lru_cache
from typing import Any, Dict, List, Mapping, Tuple, Type, TypeVar, Union, get_args, get_origin, get_type_hints

from device_agent import json_text
from device_agent.errors import ManifestError

_T = TypeVar("_T")


def malformed(why: str) -> ManifestError:
    """The error for whatever is wrong with a manifest."""
    return ManifestError(
        "manifest.json is not a valid bundle manifest",
        why,
        "make the bundle again with `edgekit compress`",
    )


def parse(data: bytes) -> Dict[str, Any]:
    """Read one JSON object.

    Raises:
        ManifestError: it is none, or none that every reader reads alike.
    """
    try:
        raw = json_text.loads(
            data,
            parse_constant=_no_constant,
            parse_float=_finite,
            object_pairs_hook=_no_duplicates,
        )
        json.dumps(raw, ensure_ascii=False).encode("utf-8")  # an escape can smuggle in half a character
    except ValueError as error:
        raise malformed(f"it is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise malformed("the top level is not an object")
    return raw


def build(cls: Type[_T], raw: Any, where: str) -> _T:
    """Turn a JSON object into the frozen dataclass ``cls``; every key must be known, every type exact.

    Args:
        cls: its fields may be of ``str``, ``int``, ``float``, ``bool``, ``Any``, dataclasses, and
            ``Optional``, ``Mapping[str, ...]`` and ``Tuple[..., ...]`` of these.
        raw: what JSON holds.
        where: names ``raw`` in errors.

    Raises:
        ManifestError: a key is missing or unknown, or a value has another type.
    """
    if not isinstance(raw, dict):
        raise malformed(f"{where} is not an object")
    hints = _hints(cls)  # type: ignore[arg-type]  # a class is hashable
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]  # cls is always a dataclass here
    unknown = sorted(set(raw) - set(known))
    if unknown:
        raise malformed(f"{where} has the unknown key {unknown[0]!r}")
    values = {key: _value(hints[key], value, f"{where}.{key}") for key, value in raw.items()}
    try:
        return cls(**values)
    except TypeError as error:
        raise malformed(f"{where}: {error}") from error


@lru_cache(maxsize=None)
def _hints(cls: Type[Any]) -> Mapping[str, Any]:
    return get_type_hints(cls)  # which compiles every annotation, each time


def _value(hint: Any, value: Any, where: str) -> Any:
    if is_dataclass(hint):
        return build(hint, value, where)  # type: ignore[arg-type]  # a class, not an instance
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Union:  # only Optional occurs
        return None if value is None else _value(arguments[0], value, where)
    if origin is tuple:
        items = _list(value, where, _json_type(arguments[0]))
        return tuple(_value(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(items))
    if origin is collections.abc.Mapping:
        if not isinstance(value, dict):
            raise malformed(f"{where} is not an object")
        return {key: _value(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    return value if hint is Any else _scalar(hint, value, where)


def _scalar(hint: Any, value: Any, where: str) -> Any:
    allowed = (int, float) if hint is float else (hint,)
    if not isinstance(value, allowed) or (isinstance(value, bool) and hint is not bool):
        raise malformed(f"{where} has the wrong type: {type(value).__name__}")
    return value


def _json_type(hint: Any) -> Type[Any]:
    kind: Type[Any] = dict if is_dataclass(hint) else hint
    return kind


def _list(value: Any, where: str, kind: Type[Any]) -> List[Any]:
    if not isinstance(value, list) or not all(type(item) is kind for item in value):
        raise malformed(f"{where} is not a list of {kind.__name__}")
    return value


def _no_constant(value: str) -> None:
    raise ValueError(f"{value} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is too large")
    return value


def _no_duplicates(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(keys) != len(set(keys)):
        raise ValueError(f"an object has the key {max(keys, key=keys.count)!r} twice")
    return dict(pairs)
