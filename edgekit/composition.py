"""Pack several graphs as one model: preprocessing, model and postprocessing, or an encoder and a decoder.

The device runs the steps one after the other in one process and hands each tensor on without a copy; to its
clients they are one model (``device_agent/composition``). The bundle's golden outputs are those of the whole
chain, computed here with ONNX Runtime.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from device_agent.composition.plan import PlanError, order
from device_agent.manifest import Contract, Golden, Manifest, Step, TensorSpec, Tolerance
from edgekit import __version__, bundle, ort
from edgekit.errors import BadInput
from edgekit.profile import Profile
from edgekit.tensors import Arrays, spec_of, write_npz

if TYPE_CHECKING:
    from onnx import ModelProto, ValueInfoProto

_INPUTS, _OUTPUTS = "golden/inputs.npz", "golden/outputs.npz"


@dataclass(frozen=True)
class StepFile:
    """One graph of a composition.

    Attributes:
        name: for messages, and for its file in the bundle.
        graph: an ONNX file; external data is taken in.
        inputs: which tensor of the composition an input of the graph is; one that is not named here is the
            tensor of its own name.
        outputs: what tensor an output of the graph becomes; likewise.
    """

    name: str
    graph: Path
    inputs: Mapping[str, str] = field(default_factory=dict)
    outputs: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Release:
    """What the manifest says of a composition besides its steps.

    Attributes:
        name: the model's name on the device.
        version: increases with every release.
        main: name of the step that ``precision`` is about.
        precision: ``fp32``, ``fp16`` or ``int8``.
        max_batch_size: the largest batch that every step runs; 1 where a batch axis is fixed.
        tolerance_fraction: of an output's largest golden value: how far a device's result may be off.
    """

    name: str
    version: int
    main: str
    precision: str = "fp32"
    max_batch_size: int = 1
    tolerance_fraction: float = 1e-3


def pack_composition(
    steps: Sequence[StepFile],
    golden_inputs: Arrays,
    outputs: Sequence[str],
    release: Release,
    profile: Profile,
    out: Path,
) -> bundle.Bundle:
    """Make a bundle of several graphs.

    Args:
        steps: in any order.
        golden_inputs: an array for each tensor that no step makes, batch axis first.
        outputs: the tensors that clients get.
        release: what the manifest says besides.
        profile: the device.
        out: as ``bundle.pack``.

    Raises:
        BadInput: the steps do not fit together, a graph does not load, or as ``bundle.pack``.
    """
    models = {step.name: _load(step) for step in steps}
    wired = [_wired(step, models[step.name]) for step in steps]
    ordered = ordered_steps(wired, list(golden_inputs), outputs)
    if release.main not in models:
        raise BadInput(
            f"there is no step {release.main!r}",
            "it is named as the main step",
            f"one of: {', '.join(models)}",
        )
    tensors = Chained(ordered, {name: model.SerializeToString() for name, model in models.items()}).run(
        golden_inputs
    )
    golden_outputs = {name: tensors[name] for name in outputs}
    specs = _specs(ordered, models)
    with tempfile.TemporaryDirectory(prefix="edgekit-") as temporary:
        staging = Path(temporary)
        _stage(staging, ordered, models)
        (staging / "golden").mkdir()
        write_npz(staging / _INPUTS, golden_inputs)
        write_npz(staging / _OUTPUTS, golden_outputs)
        manifest = Manifest(
            schema=1,
            name=release.name,
            version=release.version,
            profile=profile.name,
            architecture=profile.architecture,
            graph=_path(release.main),
            precision=release.precision,
            inputs=tuple(specs[name] for name in golden_inputs),
            outputs=tuple(specs[name] for name in outputs),
            max_batch_size=release.max_batch_size,
            files=(),
            engines=(),
            golden=Golden(_INPUTS, _OUTPUTS, _tolerances(golden_outputs, release.tolerance_fraction)),
            contract=Contract(),
            provenance={"edgekit": __version__},
            composition=tuple(ordered),
            resources=bundle.resources_of(profile),
        )
        return bundle.pack(staging, manifest, out)


class Chained:
    """Steps that run as one model, in ONNX Runtime on this machine."""

    def __init__(
        self, steps: Sequence[Step], graphs: Mapping[str, Path | bytes], threads: int | None = None
    ) -> None:
        """Load the graphs.

        Args:
            steps: in the order in which they run.
            graphs: of each step, a file or a serialized model.
            threads: as of ``ort.Session``.

        Raises:
            BadInput: ONNX Runtime does not accept a graph.
        """
        self._steps = [(step, ort.Session(graphs[step.name], threads)) for step in steps]

    def run(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """All tensors by name, those between the steps too; raises BadInput as ``trace``."""
        tensors = dict(inputs)
        for _ in self._run(tensors):
            pass
        return tensors

    def trace(self, inputs: Arrays) -> Iterator[tuple[Step, Arrays]]:
        """Each step with the inputs that its graph gets.

        Raises:
            BadInput: a step does not run on what the steps before it give.
        """
        return self._run(dict(inputs))

    def _run(self, tensors: dict[str, np.ndarray[Any, Any]]) -> Iterator[tuple[Step, Arrays]]:
        for step, session in self._steps:
            taken = {own: tensors[name] for own, name in step.inputs.items()}
            try:
                made = session.run(taken)
            except Exception as error:  # ONNX Runtime's own exceptions share no base class
                raise BadInput(
                    f"step '{step.name}' does not run on the golden inputs",
                    str(error).strip().splitlines()[0],
                    "make the shapes and types of the steps fit each other",
                ) from error
            tensors.update({name: made[own] for own, name in step.outputs.items()})
            yield step, taken


def ordered_steps(steps: Sequence[Step], inputs: Sequence[str], outputs: Sequence[str]) -> tuple[Step, ...]:
    """The steps in the order in which they run.

    Raises:
        BadInput: they do not make a model of these inputs and outputs.
    """
    try:
        return order(steps, inputs, outputs)
    except PlanError as error:
        raise BadInput(
            "the steps do not make a model", str(error), "correct the steps' names of tensors"
        ) from error


def _path(step: str) -> str:
    return f"steps/{step}.onnx"


def _load(step: StepFile) -> ModelProto:
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        return onnx.load(step.graph)
    except (OSError, DecodeError, onnx.checker.ValidationError) as error:
        raise BadInput(
            f"the graph of step '{step.name}' cannot be read",
            str(error),
            f"give an ONNX file, not {step.graph}",
        ) from error


def _wired(step: StepFile, model: ModelProto) -> Step:
    own_inputs, own_outputs = [info.name for info in _inputs(model)], [o.name for o in model.graph.output]
    for kind, names, own in (("input", step.inputs, own_inputs), ("output", step.outputs, own_outputs)):
        strange = sorted(set(names) - set(own))
        if strange:
            raise BadInput(
                f"step '{step.name}' has no {kind} '{strange[0]}'",
                f"its {kind}s are {', '.join(own)}",
                "name one of those",
            )
    return Step(
        step.name,
        _path(step.name),
        {name: step.inputs.get(name, name) for name in own_inputs},
        {name: step.outputs.get(name, name) for name in own_outputs},
    )


def _inputs(model: ModelProto) -> list[ValueInfoProto]:
    constants = {tensor.name for tensor in model.graph.initializer}
    return [info for info in model.graph.input if info.name not in constants]


def _specs(steps: Sequence[Step], models: Mapping[str, ModelProto]) -> dict[str, TensorSpec]:
    specs: dict[str, TensorSpec] = {}
    for step in steps:
        model = models[step.name]
        for names, infos in ((step.inputs, _inputs(model)), (step.outputs, model.graph.output)):
            for info in infos:
                name = names[info.name]
                specs.setdefault(name, replace(spec_of(info), name=name))
    return specs


def _stage(staging: Path, steps: Sequence[Step], models: Mapping[str, ModelProto]) -> None:
    for step in steps:
        path = staging / step.graph
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(models[step.name].SerializeToString())


def _tolerances(golden: Arrays, fraction: float) -> dict[str, Tolerance]:
    """A share of each output's largest value; nothing where values are exact."""
    return {
        name: Tolerance(
            fraction * max(float(np.abs(array).max(initial=0)), 1e-6) if array.dtype.kind == "f" else 0.0, 0.0
        )
        for name, array in golden.items()
    }
