"""JSON that came from outside, with bounds on how deeply it may be nested and how long its numbers may be.

Python raises RecursionError for a document that is nested too deeply, but 3.8 can end the process instead
("Fatal Python error: Cannot recover from stack overflow"): if a callback of the garbage collector meets the
recursion limit while the parser is near it, the parser is let through and goes on until the interpreter gives
up. A client must not be able to do that, so the depth is known before the parser starts.

Reading a whole number takes time with the square of its digits. Python refuses more than 4300 of them, but
only since 3.8.14, and devices have older ones: Ubuntu 20.04, and so JetPack 5, has 3.8.10.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

MAX_DEPTH = 64
MAX_DIGITS = 4300

_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_LONG_NUMBER = re.compile(rb"(?<![0-9])[0-9]{%d}" % (MAX_DIGITS + 1))
_PYTHON_BOUNDS_DIGITS = hasattr(sys, "set_int_max_str_digits")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_AS_ONE_KIND = bytes.maketrans(b"{}", b"[]")


def loads(data: bytes, **hooks: Any) -> Any:
    """Parse one JSON document in UTF-8.

    Args:
        data: the document.
        hooks: see :func:`json.loads`: ``parse_float``, ``parse_constant``, ``object_pairs_hook``.

    Raises:
        ValueError: it is not UTF-8, not JSON, nested more than ``MAX_DEPTH`` deep, or has a number with more
            than ``MAX_DIGITS`` digits in a row.
    """
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH and not _is_shallow(data):
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    if not _PYTHON_BOUNDS_DIGITS and _has_long_number(data):
        raise ValueError(f"it has a number of more than {MAX_DIGITS} digits")
    return json.loads(data.decode("utf-8"), **hooks)


def _has_long_number(data: bytes) -> bool:
    if len(data) <= MAX_DIGITS or not _LONG_NUMBER.search(data):
        return False
    return _LONG_NUMBER.search(_STRING.sub(b"", data)) is not None


def _is_shallow(data: bytes) -> bool:
    """Whether JSON is at most ``MAX_DEPTH`` deep; of what is none, whether parsers get twice as far at most.

    Each round takes away the innermost pairs. Brackets that pair with nothing, or with another kind, are not
    JSON, but a parser may go that deep before it says so.
    """
    brackets = _STRING.sub(b"", data).translate(_AS_ONE_KIND, _NO_BRACKETS)
    for _ in range(MAX_DEPTH):
        shorter = brackets.replace(b"[]", b"")
        if len(shorter) == len(brackets):
            break
        brackets = shorter
    return b"[]" not in brackets and brackets.count(b"[") <= MAX_DEPTH
