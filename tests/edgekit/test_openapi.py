"""``docs/openapi.yaml``: whole, true to the published protocol, and true of a running agent."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import schemathesis
import yaml
from hypothesis import HealthCheck, settings
from onnx import TensorProto, helper, numpy_helper
from repository_agent import agent_on

from device_agent.config import Config
from device_agent.metrics import Metrics
from device_agent.models import Models
from device_agent.server.paths import parse_path
from device_agent.server.routes import InferenceRoutes
from device_agent.server.service import InferenceService

DOCUMENT = Path(__file__).parents[2] / "docs" / "openapi.yaml"
EXAMPLES = int(os.environ.get("EDGEKIT_OPENAPI_EXAMPLES", "4"))  # generated for each operation

schema = schemathesis.openapi.from_path(str(DOCUMENT))
CONTENT: dict[str, Any] = yaml.safe_load(DOCUMENT.read_text())
OPERATIONS = [
    (method, path) for path, item in CONTENT["paths"].items() for method in item if method != "parameters"
]

#: Whether a request that fits the document succeeds depends on the models that are installed; the agent reads
#: past what it does not know, as Triton does; and a timeout that cannot be kept is a 503.
NOT_PROMISED = [
    schemathesis.checks.positive_data_acceptance,
    schemathesis.checks.negative_data_rejection,
    schemathesis.checks.not_a_server_error,
]

#: Facts of the Open Inference Protocol's published REST specification, version 2: what must be there, and
#: which keys an answer must have.
PUBLISHED = {
    ("get", "/v2/health/live"): set(),
    ("get", "/v2/health/ready"): set(),
    ("get", "/v2"): {"name", "version", "extensions"},
    ("get", "/v2/models/{model}/versions/{version}/ready"): set(),
    ("get", "/v2/models/{model}/versions/{version}"): {"name", "platform"},
    ("post", "/v2/models/{model}/versions/{version}/infer"): {"model_name", "outputs"},
}


def resolved(node: Any) -> Any:
    """A node of the document behind its reference."""
    while isinstance(node, dict) and "$ref" in node:
        target: Any = CONTENT
        for part in node["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        node = target
    return node


@pytest.mark.parametrize("operation", PUBLISHED, ids=" ".join)
def test_the_published_protocol_is_in_it(operation: tuple[str, str]) -> None:
    """Every operation of the published specification, with the keys that its answers must have."""
    method, path = operation
    answer = resolved(CONTENT["paths"][path][method]["responses"]["200"])
    required = answer.get("content", {}).get("application/json", {}).get("schema", {}).get("required", [])
    assert PUBLISHED[operation] <= set(required)


def test_every_route_is_in_it_and_nothing_else() -> None:
    """What the agent answers is described, and what is described is answered, with the same methods."""
    routes = InferenceRoutes(InferenceService(Models(Config(), Metrics()), Metrics(), Config()))
    described = set()
    for method, path in OPERATIONS:
        route = parse_path(re.sub(r"\{\w+\}", "name", path).encode())
        assert route is not None, path
        assert route.method == method.upper(), path
        described.add(route.kind)
    assert described == set(routes._handlers)  # the table itself is what must not have grown unseen


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An agent that serves ``model`` from a repository in which clients may load and unload."""
    root = tmp_path_factory.mktemp("openapi")
    directory = root / "models" / "model" / "1"
    directory.mkdir(parents=True)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["scores"])],
        "model",
        [value("x", TensorProto.FLOAT, ["n", 8])],
        [value("scores", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(np.ones((8, 4), np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, directory / "model.onnx")
    explicit = ("--model-control-mode", "explicit", "--load-model", "model")
    with agent_on(root / "models", root, *explicit) as http:
        yield f"http://{http}"


@schema.parametrize()
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_a_running_agent_answers_as_described(case: Any, address: str) -> None:
    """Generated requests, right and wrong: status, content type and body are those of the document."""
    response = case.call(base_url=address)
    assert response.status_code < 500 or (response.status_code == 503 and "retry-after" in response.headers)
    case.validate_response(response, excluded_checks=NOT_PROMISED)
