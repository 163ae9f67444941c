"""Read a model configuration, from protobuf text or from JSON, into one document. Pure functions.

A configuration arrives as ``config.pbtxt`` or as the ``config`` parameter of a load request. Both become
Triton's JSON form here, with its own field names, every value of the type that its field has.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Optional, Protocol, Tuple

from device_agent import json_text
from device_agent.errors import BadInput
from device_agent.repository.fields import MODEL_CONFIG, REFUSED, SCHEDULERS, WITHOUT_EFFECT, Field
from device_agent.repository.text_format import Scalar, TextFormatError, Value, parse

Document = Dict[str, Any]

_MAX_CHARACTERS = 100  # of a whole number of 64 bits, in any base and with zeros in front
_SHOWN_CHARACTERS = 200  # of a field's name


class ConfigError(BadInput):
    """A model configuration is wrong, or asks for what this agent does not do."""


@dataclass(frozen=True)
class Parsed:
    """A configuration in its JSON form.

    Attributes:
        document: the fields that are read.
        ignored: names of the hints that have no effect here.
    """

    document: Document
    ignored: Tuple[str, ...]


def from_text(text: str, source: str) -> Parsed:
    """Read a ``config.pbtxt``.

    Args:
        text: its content.
        source: names it in errors.

    Raises:
        ConfigError: not protobuf text, an unknown field, a wrong type, or a field that is refused.
    """
    try:
        message = parse(text)
    except TextFormatError as error:
        raise ConfigError(
            f"{source} is not a model configuration", str(error), "correct the line that is named"
        ) from error
    return _read(message, _TextForm(source))


def from_json(text: str, source: str) -> Parsed:
    """Read a configuration in protobuf's JSON form, with Triton's field names; see :func:`from_text`."""
    try:
        raw = json_text.loads(text.encode())
        json.dumps(raw, ensure_ascii=False).encode()  # half a character, which JSON can carry, is no text
    except ValueError as error:
        raise ConfigError(
            f"{source} is not a model configuration", f"it is not JSON: {error}", "send a JSON object"
        ) from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{source} is not a model configuration", "it is no object", "send a JSON object")
    return _read({name: value for name, value in raw.items() if value is not None}, _JsonForm(source))


def _read(message: Mapping[str, Any], form: _Form) -> Parsed:
    for name, reason in REFUSED.items():
        if message.get(name) or (name in message and name in SCHEDULERS):
            raise ConfigError(
                f"{form.source} cannot be served",
                f"the field '{name}': {reason}",
                f"remove '{name}', or serve the model elsewhere",
            )
    unread = {*WITHOUT_EFFECT, *REFUSED}
    fields = {name: value for name, value in message.items() if name not in unread}
    ignored = tuple(name for name in WITHOUT_EFFECT if message.get(name))
    return Parsed(_message(fields, MODEL_CONFIG, form, ""), ignored)


# Messages


class _Form(Protocol):
    """How one of the two forms writes what both can say."""

    source: str

    def values(self, raw: Any, field: Field) -> List[Any]:
        """The values of a field."""

    def entry(self, raw: Any, where: str) -> Tuple[str, Any]:
        """Key and value of an entry of a map."""

    def scalar(self, raw: Any, field: Field, where: str) -> Any:
        """A value that is no message."""


def _message(message: Any, table: Mapping[str, Field], form: _Form, prefix: str) -> Document:
    if not isinstance(message, dict):
        raise _wrong(prefix.rstrip("."), "a message", form.source)
    document: Document = {}
    for name, raw in message.items():
        field, where = table.get(name), prefix + name
        if field is None:
            raise _unknown(where, [prefix + known for known in table], form.source)
        values = form.values(raw, field)
        if field.keyed:
            pairs = [form.entry(value, where) for value in values]
            document[name] = {key: _value(value, field, form, where) for key, value in pairs}
        elif field.repeated:
            document[name] = [_value(value, field, form, where) for value in values]
        elif len(values) != 1:
            raise _wrong(where, "given once", form.source)
        else:
            document[name] = _value(values[0], field, form, where)
    return document


def _value(raw: Any, field: Field, form: _Form, where: str) -> Any:
    if isinstance(field.kind, dict):
        return _message(raw, field.kind, form, where + ".")
    return form.scalar(raw, field, where)


class _TextForm:
    """A parsed ``config.pbtxt``: every field is a list of values."""

    def __init__(self, source: str) -> None:
        self.source = source

    def values(self, raw: List[Value], field: Field) -> List[Any]:
        return raw

    def entry(self, raw: Value, where: str) -> Tuple[str, Any]:
        keys = raw.get("key", []) if isinstance(raw, dict) and set(raw) <= {"key", "value"} else []
        if not isinstance(raw, dict) or len(keys) != 1 or not isinstance(keys[0], Scalar):
            raise _wrong(where, "made of entries with a key and a value", self.source)
        return keys[0].text, raw.get("value", [{}])[0]

    def scalar(self, raw: Value, field: Field, where: str) -> Any:
        kind = raw.kind if isinstance(raw, Scalar) else "message"
        if isinstance(raw, Scalar):
            if field.kind == "string" == kind:
                return raw.text
            if field.kind == "bool" and raw.text in _TEXT_BOOLS and kind != "string":
                return _TEXT_BOOLS[raw.text]
            if field.kind == "int" and kind == "number":
                return _integer("".join(raw.text.split()), field, self.source, where)
            if isinstance(field.kind, tuple) and kind != "string":
                return _enumerator(raw.text, field.kind, self.source, where)
        raise _wrong(where, _expected(field), self.source)


class _JsonForm:
    """Protobuf's JSON form, where 64-bit numbers may be strings and null is an absent field."""

    def __init__(self, source: str) -> None:
        self.source = source

    def values(self, raw: Any, field: Field) -> List[Any]:
        if field.keyed and isinstance(raw, dict):
            return list(raw.items())
        if (field.keyed or field.repeated) and raw is None:
            return []
        return raw if field.repeated and isinstance(raw, list) else [raw]

    def entry(self, raw: Any, where: str) -> Tuple[str, Any]:
        if not isinstance(raw, tuple):
            raise _wrong(where, "an object", self.source)
        return str(raw[0]), raw[1]

    def scalar(self, raw: Any, field: Field, where: str) -> Any:
        if (field.kind == "string" and isinstance(raw, str)) or (
            field.kind == "bool" and isinstance(raw, bool)
        ):
            return raw
        if field.kind == "int" and type(raw) in (int, str):
            return _integer(str(raw), field, self.source, where)
        if isinstance(field.kind, tuple) and type(raw) in (int, str):
            return _enumerator(str(raw), field.kind, self.source, where)
        raise _wrong(where, _expected(field), self.source)


# Scalars

_TEXT_BOOLS = {
    "true": True,
    "True": True,
    "t": True,
    "1": True,
    "false": False,
    "False": False,
    "f": False,
    "0": False,
}


def _integer(text: str, field: Field, source: str, where: str) -> int:
    if len(text) > _MAX_CHARACTERS:  # Python refuses thousands, or takes seconds for them
        raise _wrong(where, _expected(field), source)
    digits = text.lstrip("-")
    try:
        is_octal = len(digits) > 1 and digits.startswith("0") and digits.isdecimal()
        value = int(text, 8) if is_octal else int(text, 0)
    except ValueError as error:
        raise _wrong(where, _expected(field), source) from error
    if not -(2**63) <= value < 2**64:
        raise _wrong(where, "a number of 64 bits", source)
    return value


def _enumerator(text: str, names: Tuple[str, ...], source: str, where: str) -> str:
    if text in names:
        return text
    number = decimal(text)
    if number is not None and number < len(names):
        return names[number]
    raise _wrong(where, "one of " + ", ".join(names), source)


def decimal(text: str) -> Optional[int]:
    """A number in decimal digits; None: it is none, or longer than one of 64 bits."""
    return int(text) if text.isdecimal() and len(text) <= _MAX_CHARACTERS else None


def _expected(field: Field) -> str:
    if isinstance(field.kind, tuple):
        return "one of " + ", ".join(field.kind)
    names: Mapping[Any, str] = {
        "string": "a string in quotes",
        "int": "a whole number",
        "bool": "true or false",
    }
    return names.get(field.kind if isinstance(field.kind, str) else None, "a message in braces")


def _unknown(where: str, known: List[str], source: str) -> ConfigError:
    where = where[:_SHOWN_CHARACTERS]
    close: Optional[str] = next(iter(difflib.get_close_matches(where, known, n=1, cutoff=0.5)), None)
    return ConfigError(
        f"{source} cannot be served",
        f"the field '{where}' is unknown",
        f"did you mean '{close}'?" if close else "remove it, or correct its name",
    )


def _wrong(where: str, expected: str, source: str) -> ConfigError:
    where = where[:_SHOWN_CHARACTERS]
    return ConfigError(
        f"{source} cannot be served", f"the field '{where}' is not {expected}", f"correct '{where}'"
    )
