"""The verdicts: one model, many devices. What profiles share is computed once."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import onnx
from onnx import ModelProto

from calibration import load_model as load_graph
from calibration.graph import LINEAR, opset
from edgekit import ort
from edgekit.builders import rtx
from edgekit.check.memory import USABLE_FRACTION, MemoryNeed, need
from edgekit.errors import BadInput
from edgekit.lowering.lower import Lowered, Refused, lower_shaped, prove_answers, with_shapes
from edgekit.lowering.tables import Table, dla_for_profile, for_profile
from edgekit.models import Model
from edgekit.profile import PRECISIONS, Profile
from edgekit.stages.export import portable

#: Longest that TensorRT-RTX's parser may take over one graph.
_ORACLE_TIMEOUT_S = 120


@dataclass(frozen=True)
class Dla:
    """What of a graph leaves the DLA, by the published table; nothing of it was executed.

    Attributes:
        source: of the table.
        nodes: of the graph.
        fallback: those that the GPU runs instead -> why.
    """

    source: str
    nodes: int
    fallback: dict[str, str]


@dataclass(frozen=True)
class Oracle:
    """What the parser of TensorRT-RTX itself says of the graph.

    ``version`` is null where it is not here; ``accepted`` also where it asks for a GPU to answer.
    """

    version: str | None
    accepted: bool | None
    why: str


@dataclass(frozen=True)
class Verdict:
    """Whether a model runs on a device.

    Attributes:
        profile: the device.
        verdict: ``runs`` as it is, ``lowered`` after rewriting, or ``refused``.
        runtime: and its versions.
        source: where the rules come from.
        changes: what lowering rewrites.
        difference: the largest between the graph and the lowered one, run by ONNX Runtime, as a share of
            the output's largest value; None where nothing was rewritten, or ONNX Runtime cannot run it.
        refused: nodes that the runtime does not take, and why.
        precisions: by precision, None where it can be had, else why not.
        memory: what is needed and what the device has.
        dla: None where the device has none, or its runtime does not reach it.
        oracle: for TensorRT-RTX.
    """

    profile: str
    verdict: Literal["runs", "lowered", "refused"]
    runtime: str
    source: str
    changes: tuple[str, ...] = ()
    difference: float | None = None
    refused: tuple[Refused, ...] = ()
    precisions: dict[str, str | None] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    dla: Dla | None = None
    oracle: Oracle | None = None


def check(model: Model, profiles: Sequence[Profile]) -> list[Verdict]:
    """Judge a model for each device.

    Raises:
        BadInput: the model cannot be exported or read, or a rewritten graph does not compute the same.
    """
    subject = _Subject(_graph(model), model)
    return [subject.verdict(device) for device in profiles]


def _graph(model: Model) -> ModelProto:
    if model.kind == "onnx" and model.path is not None:
        return load_graph(model.path)
    with tempfile.TemporaryDirectory(prefix="edgekit-") as temporary:
        path = Path(temporary, "model.onnx")
        portable(model, path)
        return onnx.load(str(path))


class _Subject:
    """A model under examination; answers are kept for the next device that asks the same."""

    def __init__(self, graph: ModelProto, model: Model) -> None:
        self._graph = graph
        self._model = model
        self._lowered: dict[str, tuple[Lowered, float | None]] = {}
        self._oracles: dict[str, Oracle] = {}

    def verdict(self, device: Profile) -> Verdict:
        table = for_profile(device)
        runtime = f"{device.runtime.name} {device.runtime.versions}"
        if device.runtime.name == "onnxruntime":
            found = self._by_onnxruntime(device, runtime)
        elif table is None:
            refused = (Refused("the graph", "runtime", "no table of operators reaches back that far"),)
            return Verdict(device.name, "refused", runtime, "none", refused=refused)
        else:
            found = self._by_table(device, runtime, table)
        memory = self._memory(device)
        return found if memory["fits"] else _does_not_fit(found, memory)

    def _by_onnxruntime(self, device: Profile, runtime: str) -> Verdict:
        refused: tuple[Refused, ...] = ()
        if opset(self._graph) > device.highest_opset:
            why = f"it reads opset {device.highest_opset} and older, the graph has {opset(self._graph)}"
            refused = (Refused("the graph", "opset", why),)
        elif self._session_error is not None:
            refused = (Refused("the graph", "load", self._session_error),)
        return Verdict(
            device.name,
            "refused" if refused else "runs",
            runtime,
            f"ONNX Runtime {ort.version()} itself, on this machine",
            refused=refused,
            precisions=self._precisions(device),
            memory=self._memory(device),
        )

    def _by_table(self, device: Profile, runtime: str, table: Table) -> Verdict:
        lowered, difference = self._lower(table)
        kind: Literal["runs", "lowered", "refused"] = "lowered" if lowered.changes else "runs"
        return Verdict(
            device.name,
            "refused" if lowered.refused else kind,
            runtime,
            table.source,
            lowered.changes,
            difference,
            lowered.refused,
            self._precisions(device),
            self._memory(device),
            self._dla(device, lowered.model),
            self._oracle(table, lowered.model) if device.runtime.name == "tensorrt_rtx" else None,
        )

    def _lower(self, table: Table) -> tuple[Lowered, float | None]:
        if table.name not in self._lowered:
            lowered = lower_shaped(self._graph, self._shaped, table)
            difference = None
            if lowered.changes and not lowered.refused and self._session_error is None:
                difference = prove_answers(self._answers, lowered.model, self._examples)
            self._lowered[table.name] = lowered, difference
        return self._lowered[table.name]

    @cached_property
    def _shaped(self) -> ModelProto:
        return with_shapes(self._graph)

    @cached_property
    def _examples(self) -> list[Any]:
        free = self._model.inputs[0].shape[0] == -1
        return [
            self._model.example(batch) for batch in ((1, 3) if free else (self._model.inputs[0].shape[0],))
        ]

    @cached_property
    def _session(self) -> ort.Session | BadInput:
        try:
            return ort.Session(bytes(self._graph.SerializeToString()))
        except BadInput as error:
            return error

    @property
    def _session_error(self) -> str | None:
        return self._session.why if isinstance(self._session, BadInput) else None

    @cached_property
    def _answers(self) -> list[Any]:
        """What the graph itself answers to the examples."""
        if isinstance(self._session, BadInput):
            raise self._session
        return [self._session.run(example) for example in self._examples]

    @cached_property
    def _need(self) -> MemoryNeed:
        return need(self._graph)

    def _memory(self, device: Profile) -> dict[str, Any]:
        usable = int(device.memory.size_bytes * USABLE_FRACTION)
        return {
            "weights_bytes": self._need.weights_bytes,
            "activations_bytes": self._need.activations_bytes,
            "unknown_tensors": self._need.unknown,
            "usable_bytes": usable,
            "fits": self._need.total_bytes <= usable,
        }

    def _precisions(self, device: Profile) -> dict[str, str | None]:
        found: dict[str, str | None] = {}
        products = any(node.op_type in LINEAR for node in self._graph.graph.node)
        for precision in PRECISIONS:
            why = None
            if precision not in device.precisions:
                why = "the profile does not list it"
            elif precision == "int8" and not products:
                why = "the graph has no convolution and no product that could be int8"
            elif (
                precision == "fp32" and device.runtime.name == "tensorrt_rtx" and device.accelerator.sm == 75
            ):
                why = "TensorRT-RTX has no float32 products on Turing"
            found[precision] = why
        return found

    def _dla(self, device: Profile, graph: ModelProto) -> Dla | None:
        table = dla_for_profile(device)
        if table is None:
            return None
        nodes = {node.name or node.output[0]: node.op_type for node in graph.graph.node}
        return Dla(table.source, len(graph.graph.node), table.fallback(nodes))

    def _oracle(self, table: Table, graph: ModelProto) -> Oracle:
        if table.name not in self._oracles:
            with tempfile.TemporaryDirectory(prefix="edgekit-") as temporary:
                path = Path(temporary, "model.onnx")
                onnx.save(graph, str(path))
                (answer,) = rtx.ask([rtx.Job(str(path))], timeout_s=_ORACLE_TIMEOUT_S)
            accepted = None if answer.version is None or answer.needs_gpu else answer.accepted
            self._oracles[table.name] = Oracle(answer.version, accepted, answer.why)
        return self._oracles[table.name]


def _does_not_fit(found: Verdict, memory: dict[str, Any]) -> Verdict:
    bytes_needed = memory["weights_bytes"] + memory["activations_bytes"]
    why = f"it needs {bytes_needed} bytes at batch 1, of which the device can give {memory['usable_bytes']}"
    return replace(found, verdict="refused", refused=(*found.refused, Refused("the graph", "memory", why)))
