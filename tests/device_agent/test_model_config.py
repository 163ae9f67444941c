"""Triton's model configurations: the text format, the fields, the checks, and what the graph adds."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from typing import Any, Dict, List

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_agent.manifest import TensorSpec
from device_agent.repository.completion import complete, specs
from device_agent.repository.document import ConfigError, from_json, from_text
from device_agent.repository.model_config import ModelConfig, VersionPolicy, read
from device_agent.repository.text_format import Scalar, TextFormatError, parse

FULL = """
# as people write it
name: "m" platform: 'onnxruntime_onnx'
max_batch_size: 0x8
input [ { name: "x", data_type: TYPE_FP32; dims: [ 3, -1 ] reshape: { shape: [ 3, -1 ] } }, { name: "n" data_type: TYPE_INT64 dims: 1 } ]
output < name: "y" data_type: 11 dims: 2 dims: 2 label_filename: "labels" ".txt" >
version_policy: { specific { versions: [ 1, 3 ] } }
instance_group [ { count: 2 kind: KIND_GPU } ]
dynamic_batching {
  preferred_batch_size: [ 4, 8 ] max_queue_delay_microseconds: 100 priority_levels: 2 default_priority_level: 2
  default_queue_policy { timeout_action: DELAY default_timeout_microseconds: 5000 allow_timeout_override: true }
  priority_queue_policy { key: 1 value { max_queue_size: 3 } }
}
parameters { key: "intra_op_thread_count" value { string_value: "2" } }
optimization { graph { level: 1 } }
model_warmup [ { name: "w" batch_size: 2 inputs { key: "x" value { data_type: TYPE_FP32 dims: [ 3, 1 ] zero_data: true } } } ]
"""  # noqa: E501

IMAGE = TensorSpec("x", "FP32", (-1, 3, -1))
SCORES = TensorSpec("y", "FP32", (-1, 10))


def config_of(text: str, name: str = "m") -> ModelConfig:
    """A checked configuration."""
    return read(from_text(text, "config.pbtxt"), name)


def test_every_field_that_is_honoured_is_read() -> None:
    """Names, numbers in any base, lists in any form, maps, joined strings and comments mean what they say."""
    config = config_of(FULL)
    assert config.max_batch_size == 8
    assert [(t.name, t.dtype, t.dims, t.reshape) for t in config.inputs] == [
        ("x", "FP32", (3, -1), (3, -1)),
        ("n", "INT64", (1,), None),
    ]
    assert (config.outputs[0].dims, config.outputs[0].label_filename) == ((2, 2), "labels.txt")
    assert config.outputs[0].dtype == "FP32"
    assert config.version_policy == VersionPolicy(None, (1, 3))
    assert config.threads == 2
    assert config.dynamic_batching is not None
    assert config.dynamic_batching["priority_queue_policy"] == {"1": {"max_queue_size": 3}}
    assert config.dynamic_batching["default_queue_policy"]["timeout_action"] == "DELAY"
    assert config.warmups[0].inputs["x"].source == "zero_data"
    assert any("optimization" in note for note in config.notes)
    assert any("GPU" in note for note in config.notes)


def test_the_json_form_says_the_same() -> None:
    """What the agent shows as a model's configuration can be given back in a load request."""
    document = from_text(FULL, "config.pbtxt").document
    assert from_json(json.dumps(document), "request").document == document
    as_strings = {**document, "max_batch_size": "8", "version_policy": None}
    assert from_json(json.dumps(as_strings), "request").document["max_batch_size"] == 8


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ('platform: "ensemble"', "platform"),
        ('backend: "tensorrt"', "backend"),
        ('name: "other"', "directory"),
        ("sequence_batching { }", "sequence_batching"),
        ("ensemble_scheduling { step { model_name: 'a' } }", "ensemble_scheduling"),
        ("model_transaction_policy { decoupled: true }", "model_transaction_policy"),
        ("batch_input { kind: BATCH_ELEMENT_COUNT }", "batch_input"),
        ("max_batch_size: -1", "max_batch_size"),
        ("max_batch_size: 'four'", "max_batch_size"),
        ("max_batch_sizes: 4", "max_batch_size"),
        ("max_batch_size: 1 max_batch_size: 2", "max_batch_size"),
        ("input { data_type: TYPE_FP32 }", "no name"),
        ("input { name: 'x' data_type: FP32 }", "TYPE_FP32"),
        ("input { name: 'x' dims: 0 }", "dims"),
        ("input { name: 'x' dims: [2, 3] reshape { shape: [5] } }", "reshape"),
        ("input { name: 'x' allow_ragged_batch: true }", "allow_ragged_batch"),
        ("input { name: 'x' dims: 1 } dynamic_batching { }", "dynamic_batching"),
        ("output { name: 'y' label_filename: '../secrets' }", "label_filename"),
        ("default_model_filename: '/etc/passwd'", "default_model_filename"),
        ("version_policy { all {} latest {} }", "version_policy"),
        ("version_policy { latest { num_versions: 0 } }", "version_policy"),
        (
            "parameters { key: 'intra_op_thread_count' value { string_value: 'many' } }",
            "intra_op_thread_count",
        ),
        ("parameters: 5", "parameters"),
        ("model_warmup { inputs { key: 'x' value { data_type: TYPE_FP32 dims: 1 } } }", "zero_data"),
        ("input { name: 'x' ", "'}'"),
        ("name 'm'", "':'"),
        ("name: }", "value"),
        ("dims: 1abc", "line 1"),
        ('\n\n name: "\\q"', "line 3"),
        ("name: [ 'a' 'b'", "']'"),
        ("[ext.name]: 1", "field's name"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(text: str, names: str) -> None:
    """A configuration is served as it says, or not at all, and the error names the field or the line."""
    with pytest.raises(ConfigError) as refusal:
        config_of(text)
    assert names in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 3


def test_nesting_and_length_are_bounded() -> None:
    """A configuration cannot exhaust the device."""
    with pytest.raises(TextFormatError, match="nested"):
        parse("a {" * 100)
    with pytest.raises(TextFormatError, match="characters"):
        parse("#" * (1024 * 1024 + 1))


def test_a_long_number_is_read_in_time() -> None:
    """Digits that turn out to be no number are refused after one look at each, not one for each pair."""
    started_s = time.process_time()
    with pytest.raises(TextFormatError, match="line 1"):
        parse("max_batch_size: " + "1" * 20_000 + "x")
    assert time.process_time() - started_s < 2.0


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text: str) -> None:
    """No text makes the parser fail in another way."""
    with suppress(ConfigError):
        assert isinstance(config_of(text), ModelConfig)


@given(
    st.dictionaries(
        st.sampled_from(["name", "max_batch_size", "input", "parameters", "version_policy"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
            ),
        ),
    )
)
def test_any_json_is_read_or_refused(raw: Dict[str, Any]) -> None:
    """No configuration in a load request makes the reader fail in another way."""
    with suppress(ConfigError):
        assert isinstance(read(from_json(json.dumps(raw), "request"), "m"), ModelConfig)


@given(st.text(max_size=50))
def test_strings_survive_their_escapes(text: str) -> None:
    """What another program writes into a string is read back, byte by byte escaped or not."""
    utf8 = text.encode("utf-8", "replace")
    expected = utf8.decode()
    octal = "".join(f"\\{byte:03o}" for byte in utf8)
    assert parse(f'a: "{octal}"') == {"a": [Scalar("string", expected, 1)]}
    hexadecimal = "".join(f"\\x{byte:02x}" for byte in utf8)
    assert parse(f"a: '{hexadecimal}'") == {"a": [Scalar("string", expected, 1)]}


@given(st.lists(st.integers(1, 50), unique=True), st.integers(1, 5))
def test_version_policies_choose_as_they_say(available: List[int], latest: int) -> None:
    """The highest so many, the ones named, or all; always ascending."""
    assert VersionPolicy(latest).choose(available) == sorted(available)[-latest:]
    assert VersionPolicy(None).choose(available) == sorted(available)
    assert VersionPolicy(None, (2, 40)).choose(available) == [v for v in (2, 40) if v in available]


# Completion


def test_without_a_file_everything_comes_from_the_graph() -> None:
    """As Triton completes it: free first axes become a batch of up to four, batched dynamically."""
    config = complete(ModelConfig("m"), [IMAGE], [SCORES])
    assert (config.max_batch_size, config.dynamic_batching) == (4, {})
    assert specs(config.inputs, config.max_batch_size) == (IMAGE,)
    assert config.document["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": [3, -1]}]
    assert config.document["platform"] == "onnxruntime_onnx"


def test_a_fixed_first_axis_is_no_batch() -> None:
    """Such a graph is served one request at a time, with its whole shape in the configuration."""
    fixed = TensorSpec("x", "FP32", (1, 3))
    config = complete(ModelConfig("m"), [fixed], [SCORES])
    assert (config.max_batch_size, config.dynamic_batching) == (0, None)
    assert specs(config.inputs, 0) == (fixed,)


def test_a_configuration_with_tensors_is_taken_at_its_word() -> None:
    """With inputs and outputs given, max_batch_size 0 means no batch, though the graph has a free axis."""
    text = 'input { name: "x" data_type: TYPE_FP32 dims: [-1, 3, 8] } output { name: "y" dims: [-1, 10] }'
    config = complete(config_of(text), [IMAGE], [SCORES])
    assert config.max_batch_size == 0
    assert config.inputs[0].dims == (-1, 3, 8)


def test_a_tensor_without_sizes_is_shown_with_one() -> None:
    """A graph that gives a number a row is served with dims [1], as Triton has no empty dims."""
    config = complete(ModelConfig("m"), [IMAGE], [TensorSpec("y", "FP32", (-1,))])
    assert (config.outputs[0].dims, config.outputs[0].reshape) == ((1,), ())


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ('max_batch_size: 4 input { name: "z" dims: 3 }', "no input 'z'"),
        ('input { name: "x" dims: [-1, 4, 8] } output { name: "y" }', "'x' has dims"),
        ('max_batch_size: 4 output { name: "y" data_type: TYPE_INT8 dims: 10 }', "'y' is INT8"),
    ],
)
def test_a_contradiction_with_the_graph_is_refused(text: str, names: str) -> None:
    """Names, types and sizes are those of the graph, or the model is not served."""
    with pytest.raises(ConfigError, match=names):
        complete(config_of(text), [IMAGE], [SCORES])


def test_a_batch_needs_a_graph_that_can() -> None:
    """max_batch_size on a graph with a fixed first axis is refused."""
    with pytest.raises(ConfigError, match="max_batch_size is 4"):
        complete(config_of("max_batch_size: 4"), [TensorSpec("x", "FP32", (1, 3))], [SCORES])
