"""Our reader of model configurations against Triton's own protobuf, on generated configurations."""

from __future__ import annotations

import json
from typing import Any

from google.protobuf import json_format, text_format
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2

from device_agent.repository import fields
from device_agent.repository.document import from_json, from_text
from device_agent.repository.fields import Field

Table = dict[str, Field]
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


def values_of(field: Field) -> st.SearchStrategy[Any]:
    """What a field may hold, in JSON."""
    if isinstance(field.kind, dict):
        one: st.SearchStrategy[Any] = messages_of(field.kind)
    elif isinstance(field.kind, tuple):
        one = st.sampled_from(field.kind)
    else:
        one = {"string": TEXTS, "bool": st.booleans(), "int": st.integers(0, 2**31 - 1)}[field.kind]
    if field.keyed:
        keys = st.integers(1, 9).map(str)
        return st.dictionaries(keys, one, max_size=2)
    return st.lists(one, max_size=2) if field.repeated else one


def messages_of(table: Table) -> st.SearchStrategy[dict[str, Any]]:
    """A message with any of its fields."""
    message = st.fixed_dictionaries({}, optional={name: values_of(f) for name, f in table.items()})
    return message.map(with_one_choice)


def with_one_choice(message: dict[str, Any]) -> dict[str, Any]:
    """Protobuf takes one of these fields."""
    for choice in ({"latest", "all", "specific"}, {"zero_data", "random_data", "input_data_file"}):
        for name in sorted(choice & set(message))[1:]:
            del message[name]
    return message


def shown(message: Any) -> Any:
    """A message in Triton's JSON form, 64-bit numbers as numbers."""
    return json.loads(json_format.MessageToJson(message, preserving_proto_field_name=True))


@settings(max_examples=150, deadline=None)
@given(messages_of(fields.MODEL_CONFIG), st.booleans())
def test_both_read_the_same(document: dict[str, Any], on_one_line: bool) -> None:
    """What protobuf writes as text or as JSON, our reader reads as protobuf does."""
    theirs = json_format.ParseDict(document, model_config_pb2.ModelConfig())
    text = text_format.MessageToString(theirs, as_one_line=on_one_line)
    from_ours = json_format.ParseDict(from_text(text, "t").document, model_config_pb2.ModelConfig())
    assert from_ours == theirs
    again = from_json(json.dumps(shown(theirs)), "j").document
    assert json_format.ParseDict(again, model_config_pb2.ModelConfig()) == theirs


def test_every_field_of_the_tables_is_tritons() -> None:
    """No name, type or list in our tables differs from Triton's, and no field of Triton's is overlooked."""
    known = {*fields.MODEL_CONFIG, *fields.REFUSED, *fields.WITHOUT_EFFECT}
    assert known == {f.name for f in model_config_pb2.ModelConfig.DESCRIPTOR.fields}
    check_table(fields.MODEL_CONFIG, model_config_pb2.ModelConfig.DESCRIPTOR)


def check_table(table: Table, descriptor: Any) -> None:
    """Compare a table with a message's descriptor, and what is inside it."""
    for name, field in table.items():
        theirs = descriptor.fields_by_name[name]
        inner = theirs.message_type
        if field.keyed:
            assert inner.GetOptions().map_entry, name
            inner = inner.fields_by_name["value"].message_type
        if isinstance(field.kind, dict):
            check_table(field.kind, inner)
        elif isinstance(field.kind, tuple):
            assert field.kind == tuple(value.name for value in theirs.enum_type.values), name
        else:
            kinds = {"string": str, "bool": bool, "int": int}
            assert field.keyed or field.repeated or type(theirs.default_value) is kinds[field.kind], name
