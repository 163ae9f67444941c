"""The files of the profiles that ship, and how one file builds on another."""

from __future__ import annotations

import sys
from importlib.resources import files
from typing import Any

from edgekit.errors import BadInput, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def names() -> list[str]:
    """Names of the profiles that ship with edgekit, sorted."""
    shipped = files("edgekit") / "profiles"
    return sorted(entry.name[: -len(".toml")] for entry in shipped.iterdir() if entry.name.endswith(".toml"))


def text(name: str) -> str:
    """The file of a profile that ships."""
    return (files("edgekit") / "profiles" / f"{name}.toml").read_text(encoding="utf-8")


def extended(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """A profile's tables, over those of the profile that it extends where it extends one.

    Raises:
        BadInput: it extends something that does not ship, or that extends another one.
    """
    own = dict(raw)
    base = own.pop("extends", None)
    return own if base is None else _merged(_base(base, where), own)


def _base(name: Any, where: str) -> dict[str, Any]:
    """What the profile that another one extends says. It may extend none itself, so there are no circles."""
    if name not in names():
        raise BadInput(
            f"the profile {where} extends '{name}'",
            "a profile can extend one that ships with edgekit",
            nearest(str(name), names()),
        )
    raw = tomllib.loads(text(name))
    if "extends" in raw:
        raise BadInput(
            f"the profile {where} extends '{name}'",
            f"'{name}' itself extends '{raw['extends']}'",
            f"extend '{raw['extends']}' and say all that differs",
        )
    return raw


def _merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """``own`` over ``base``: tables key by key, everything else as a whole."""
    merged = dict(base)
    for key, value in own.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged
