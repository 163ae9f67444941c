"""Protobuf's text format, as ``config.pbtxt`` files use it, without protobuf. Pure functions.

Follows the "Text Format Language Specification" of Protocol Buffers: fields, nested messages in braces or
angle brackets, lists in square brackets, adjacent strings that join, comments after ``#``. What the fields
mean is left to the caller; extensions and ``Any`` are refused. Text and nesting are bounded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Dict, Iterator, List, Optional, Union

MAX_TEXT_BYTES = 1024 * 1024
MAX_DEPTH = 32

_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\n\f\v]+|\#[^\n]*)
    |(?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
    |(?P<number>-?[ \t]*(?:0[xX][0-9a-fA-F]+
                          |(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?[fF]?)(?![\w.]))
    |(?P<name>-?[A-Za-z_][A-Za-z0-9_]*)
    |(?P<mark>[{}\[\]<>:;,])""",
    re.VERBOSE,
)
_ESCAPE = re.compile(
    r"\\(?:(?P<octal>[0-7]{1,3})|x(?P<hex>[0-9a-fA-F]{1,2})|u(?P<u>[0-9a-fA-F]{4})|U(?P<U>[0-9a-fA-F]{8})"
    r"|(?P<char>.))"
)
_ESCAPED = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
_LITERAL = "\\'\"?"
_CLOSING = {"{": "}", "<": ">"}


class TextFormatError(ValueError):
    """The text is not in protobuf's text format; the message names the line."""


@dataclass(frozen=True)
class Scalar:
    """A value that is no message.

    Attributes:
        kind: ``string``, ``number`` or ``name`` (an enumerator, ``true``, ``false``, ``inf``).
        text: a string's content; else what is written.
        line: where it stands, counted from 1.
    """

    kind: str
    text: str
    line: int


Message = Dict[str, List["Value"]]
Value = Union[Scalar, Message]


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    line: int


def parse(text: str) -> Message:
    """Parse a message.

    Returns:
        The values of each field, in the order of the text; lists are flattened into their field.

    Raises:
        TextFormatError: naming the line that is wrong.
    """
    if len(text) > MAX_TEXT_BYTES:
        raise TextFormatError(f"it has more than {MAX_TEXT_BYTES} characters")
    return _Reader(_tokens(text)).fields(closing="", depth=0)


def _tokens(text: str) -> Iterator[_Token]:
    position, line = 0, 1
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise TextFormatError(
                f"line {line}: {text[position : position + 20].splitlines()[0]!r} is unexpected"
            )
        kind = str(match.lastgroup)
        if kind == "string":
            yield _Token(kind, _unescape(match.group()[1:-1], line), line)
        elif kind != "space":
            yield _Token(kind, match.group(), line)
        line += match.group().count("\n")
        position = match.end()
    yield _Token("end", "", line)


def _unescape(text: str, line: int) -> str:
    """Undo a string's escapes; octal and hexadecimal ones are bytes of UTF-8."""
    parts: List[bytes] = []
    position = 0
    for match in _ESCAPE.finditer(text):
        parts.append(text[position : match.start()].encode("utf-8", "surrogatepass"))
        parts.append(_escaped_bytes(match, line))
        position = match.end()
    parts.append(text[position:].encode("utf-8", "surrogatepass"))
    try:
        return b"".join(parts).decode("utf-8")
    except UnicodeDecodeError as error:
        raise TextFormatError(f"line {line}: a string is not UTF-8") from error


def _escaped_bytes(match: re.Match[str], line: int) -> bytes:
    octal, hexadecimal, char = match.group("octal"), match.group("hex"), match.group("char")
    code = match.group("u") or match.group("U")
    if octal is not None:
        return bytes([int(octal, 8) & 0xFF])
    if hexadecimal is not None:
        return bytes([int(hexadecimal, 16)])
    if code is not None:
        if int(code, 16) > 0x10FFFF:
            raise TextFormatError(f"line {line}: \\U{code} is no character")
        return chr(int(code, 16)).encode("utf-8", "surrogatepass")
    if char in _LITERAL:
        return char.encode()
    if char in _ESCAPED:
        return _ESCAPED[char].encode()
    raise TextFormatError(f"line {line}: \\{char} is no escape")


class _Reader:
    """Recursive descent over the tokens."""

    def __init__(self, tokens: Iterator[_Token]) -> None:
        self._tokens = tokens
        self._next = next(tokens)

    def fields(self, closing: str, depth: int) -> Message:
        """Read fields up to ``closing``; an empty one is the end of the text."""
        if depth > MAX_DEPTH:
            raise self._error(f"messages are nested more than {MAX_DEPTH} deep")
        message: Message = {}
        while not self._at_end_of(closing):
            name = self._take()
            if name.kind != "name":
                raise self._error(f"a field's name is expected, not {name.text!r}", name)
            message.setdefault(name.text, []).extend(self._values(name, depth))
            if self._next.text in (",", ";") and self._next.kind == "mark":
                self._take()
        self._take()  # the closing mark; nothing at the end of the text
        return message

    def _at_end_of(self, closing: str) -> bool:
        if self._next.kind == "end":
            if closing:
                raise self._error(f"the text ends where '{closing}' is expected")
            return True
        return self._is(closing)

    def _values(self, name: _Token, depth: int) -> List[Value]:
        has_colon = self._is(":")
        if has_colon:
            self._take()
        if self._is("["):
            return self._list(depth)
        if not has_colon and not (self._is("{") or self._is("<")):
            raise self._error(f"':' or '{{' is expected after '{name.text}'")
        return [self._value(depth)]

    def _list(self, depth: int) -> List[Value]:
        self._take()
        values: List[Value] = []
        while not self._is("]"):
            values.append(self._value(depth))
            if self._is(","):
                self._take()
            elif not self._is("]"):
                raise self._error("',' or ']' is expected in a list")
        self._take()
        return values

    def _value(self, depth: int) -> Value:
        token = self._take()
        if token.kind == "mark" and token.text in _CLOSING:
            return self.fields(_CLOSING[token.text], depth + 1)
        if token.kind not in ("string", "number", "name"):
            raise self._error(f"a value is expected, not {token.text!r}", token)
        text = token.text
        while token.kind == "string" and self._next.kind == "string":
            text += self._take().text
        return Scalar(token.kind, text, token.line)

    def _is(self, mark: str) -> bool:
        return self._next.kind == "mark" and self._next.text == mark

    def _take(self) -> _Token:
        token = self._next
        if token.kind != "end":
            self._next = next(self._tokens)
        return token

    def _error(self, text: str, token: Optional[_Token] = None) -> TextFormatError:
        return TextFormatError(f"line {(token or self._next).line}: {text}")
