"""TOML for plain data; the standard library only reads it."""

from __future__ import annotations

import json
from typing import Any


def toml_text(table: dict[str, Any]) -> str:
    """Write tables, arrays, strings, integers, floats and booleans as TOML that reads back equal.

    Keys have to be bare ones: letters, digits, ``_`` and ``-``.
    """
    lines: list[str] = []
    _write_table(table, (), lines)
    return "\n".join(lines).lstrip("\n") + "\n"


def _write_table(table: dict[str, Any], path: tuple[str, ...], lines: list[str]) -> None:
    """Plain values first, then the tables below: TOML has no way back up."""
    for key, value in table.items():
        if not _is_table(value) and not _is_table_array(value):
            lines.append(f"{key} = {_value(value)}")
    for key, value in table.items():
        if _is_table(value):
            lines += ["", f"[{'.'.join((*path, key))}]"]
            _write_table(value, (*path, key), lines)
        elif _is_table_array(value):
            for item in value:
                lines += ["", f"[[{'.'.join((*path, key))}]]"]
                _write_table(item, (*path, key), lines)


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)


def _is_table_array(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's string escapes are TOML's, once DEL is escaped too.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
