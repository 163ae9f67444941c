"""Dataclasses from TOML tables, strictly: a key that is not known and a value of another type are errors."""

from __future__ import annotations

import difflib
from dataclasses import Field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Dict, List, Mapping, Tuple, Type, TypeVar

from device_agent.errors import BadInput

_T = TypeVar("_T")

_KINDS: Dict[str, Tuple[Tuple[Type[Any], ...], str]] = {
    "Path": ((str,), "a string"),
    "str": ((str,), "a string"),
    "bool": ((bool,), "true or false"),
    "Optional[bool]": ((bool,), "true or false"),
    "int": ((int,), "a whole number"),
    "Optional[int]": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
}


def fill(defaults: _T, raw: Mapping[str, Any], source: str, prefix: str) -> _T:
    """Copy a dataclass with the values of a TOML table, each checked against the field's type.

    A field that is a mapping names in its metadata what its entries are: ``entries``, a default instance, and
    ``key``, the type of its keys where that is not ``str``. A field that is None at first names the dataclass
    that it may be, likewise by a default instance: ``table``.

    Args:
        defaults: a dataclass instance.
        raw: the table.
        source: the file, named in errors.
        prefix: the table's own name and a dot; empty for the whole file.

    Raises:
        BadInput: a key is unknown or a value has a wrong type.
    """
    known = {f.name: f for f in fields(defaults)}  # type: ignore[arg-type]  # always a dataclass instance
    changes: Dict[str, Any] = {}
    for key, value in raw.items():
        if key not in known:
            raise _unknown_key(prefix + key, [prefix + k for k in known], source)
        changes[key] = _value(known[key], getattr(defaults, key), value, source, prefix + key)
    return replace(defaults, **changes)  # type: ignore[type-var]  # always a dataclass instance


def wrong_type(name: str, expected: str, value: Any, source: str) -> BadInput:
    """The error for the value of a key; ``expected`` says what it should be."""
    return BadInput(f"{source} cannot be used", f"'{name}' is {value!r}", f"make '{name}' {expected}")


def _value(known: Field[Any], current: Any, value: Any, source: str, name: str) -> Any:
    nested = known.metadata.get("table", current)
    if is_dataclass(nested):
        return fill(nested, _table(value, source, name), source, name + ".")
    if "entries" in known.metadata:
        entries, key_type = known.metadata["entries"], known.metadata.get("key", str)
        return {
            _key(key_type, key, source, name): fill(
                entries, _table(table, source, f"{name}.{key}"), source, f"{name}.{key}."
            )
            for key, table in _table(value, source, name).items()
        }
    if known.type == "Tuple[int, ...]":
        if not isinstance(value, list):
            raise wrong_type(name, "a list of whole numbers", value, source)
        return tuple(_scalar("int", name, item, source) for item in value)
    if known.type == "Tuple[str, ...]":
        if not isinstance(value, list):
            raise wrong_type(name, "a list of strings", value, source)
        return tuple(_scalar("str", name, item, source) for item in value)
    return _scalar(str(known.type), name, value, source)


def _table(value: Any, source: str, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise wrong_type(name, "a table", value, source)
    return value


def _key(key_type: Type[Any], key: str, source: str, name: str) -> Any:
    if key_type is int and not key.isdecimal():
        raise wrong_type(f"{name}.{key}", "a table named by a whole number", key, source)
    return key_type(key)


def _scalar(kind: str, name: str, value: Any, source: str) -> Any:
    accepted, text = _KINDS[kind]
    if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in accepted):
        raise wrong_type(name, text, value, source)
    if kind == "Path":
        return Path(value)
    return float(value) if kind == "float" else value


def _unknown_key(name: str, known: List[str], source: str) -> BadInput:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    fix = f"did you mean '{close[0]}'?" if close else "choose one of: " + ", ".join(sorted(known))
    return BadInput(f"{source} cannot be used", f"the key '{name}' is unknown", fix)
