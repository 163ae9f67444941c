"""The plan: which stages run on what, checked before any work, with the key of every artifact.

A key is a digest of everything that goes into an artifact: the stage's code (its module and every module of
this project that it imports, however far down), its settings, the keys or digests of its inputs, the parts
of the profile that it looks at, and the versions of the libraries that it uses. All keys are known before the
first stage runs, so ``--dry-run`` can say what is there already.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from edgekit import ort
from edgekit.errors import BadInput
from edgekit.measure import accuracy
from edgekit.measure.device import Device
from edgekit.models import Model
from edgekit.profile import Profile
from edgekit.recipe import Contract, Recipe
from edgekit.source_code import closure
from edgekit.stages.registry import STAGES, Sources, Stage, validate_config

#: Share of the parameters to keep, where the model can be pruned and nothing else is asked.
DEFAULT_SIZE = 0.35
#: Candidates for ``--precision auto``, in the order of preference: the smaller file first.
PRECISION_ORDER = ("int8", "fp16", "fp32")
_OWN_PACKAGES = ("edgekit", "calibration", "host_trainer", "device_agent")


@dataclass(frozen=True)
class Step:
    """One stage's turn.

    Attributes:
        name: unique in the plan, such as ``quantize.int8``.
        stage: its row in the registry.
        config: its settings, JSON.
        inputs: role -> name of the step that makes it.
        key: of the artifact.
        profile: whose device it is for, where that is not the plan's own.
        optional: whether the plan has other ways where this step is not possible.
    """

    name: str
    stage: Stage
    config: Mapping[str, Any]
    inputs: Mapping[str, str]
    key: str
    profile: Profile | None = None
    optional: bool = False


@dataclass(frozen=True)
class Plan:
    """Steps in an order in which they can run.

    Attributes:
        steps: all of them.
        original: name of the step that builds the unchanged model's engine.
        candidates: precision -> (name of the engine's step, name of its measurement's step). A run of the
            plan may be without some of them; the last one never depends on an optional step.
        targets: precision -> names of the steps that build for further profiles.
        size: largest share of parameters to keep; 1.0: no pruning.
        metric: what is measured.
    """

    steps: tuple[Step, ...]
    original: str
    candidates: Mapping[str, tuple[str, str]]
    targets: Mapping[str, tuple[str, ...]]
    size: float
    metric: str

    @property
    def pruned(self) -> bool:
        """Whether its candidates are made from a pruned model."""
        return any(step.name == "prune" for step in self.steps)


def make_plan(
    sources: Sources,
    profile: Profile,
    recipe: Recipe,
    metric: str,
    further: tuple[Profile, ...] = (),
    latency_share: float | None = None,
) -> Plan:
    """Lay out the stages for a recipe and check that they chain.

    Args:
        sources: what the run starts from.
        profile: the device that the recipe is for.
        recipe: settings and contract.
        metric: from ``accuracy.choose``.
        further: other devices that the same bundle serves; everything up to the engines is shared.
        latency_share: largest share of the latency that pruning may leave; None: only the size counts.

    Raises:
        BadInput: the recipe, the model and the profile contradict each other.
    """
    _check_batch_axis(sources.model)
    precisions = _precisions(recipe, profile)
    size = _size(recipe.contract, sources)
    builder = _Builder(sources, profile)
    original, exported = _graphs(builder, recipe, size, latency_share)
    build = {"max_batch_size": recipe.export.max_batch_size}
    reference = builder.add("build.original", "build", build, {"graph": original})
    candidates, targets = {}, {}
    others = [device for device in further if device.runtime.name != "onnxruntime"]
    keep_float = profile.runtime.name != "onnxruntime" or bool(others)
    for precision in precisions:
        graph = exported
        if precision != "fp32":
            optional = precision != precisions[-1]
            graph = _quantized(builder, precision, recipe, metric, original, exported, keep_float, optional)
        inputs = {"graph": graph, "plain": exported}
        engine = builder.add(f"build.{precision}", "build", build, inputs)
        targets[precision] = tuple(
            builder.add(
                f"build.{precision}.{device.name}", "build", {**build, "fallback": False}, inputs, device
            )
            for device in others
        )
        verified = builder.add(
            f"verify.{precision}",
            "verify",
            {
                "measure": recipe.measure.model_dump(),
                "metric": metric,
                "metric_source": accuracy.source(metric),
                "threads": _threads(recipe),
            },
            {"original": reference, "candidate": engine},
        )
        candidates[precision] = (engine, verified)
    return Plan(tuple(builder.steps), reference, candidates, targets, size, metric)


def _graphs(builder: _Builder, recipe: Recipe, size: float, latency_share: float | None) -> tuple[str, str]:
    """Add the steps up to the two graphs: the unchanged model's, and the one to make candidates from."""
    export = {"export": recipe.export.model_dump()}
    original = builder.add("export.original", "export", export, {})
    if recipe.contract.latency is not None and builder.prunable:
        settings = {"measured": builder.reachable, "threads": _threads(recipe)}
        builder.add("staircase", "staircase", settings, {})
    if size == 1.0 and latency_share is None:
        return original, original
    model: dict[str, str] = {}
    for number in range(1, recipe.prune.steps + 1):
        model = {"model": _cut_and_recovered(builder, recipe, size, latency_share, model, number)}
    return original, builder.add("export.pruned", "export", export, model)


def _cut_and_recovered(
    builder: _Builder,
    recipe: Recipe,
    size: float,
    latency_share: float | None,
    model: Mapping[str, str],
    number: int,
) -> str:
    """Add a cut of ``model`` (nothing: the original), what is measured for it, and the recovery after it.

    The last of the cuts reaches the size; those before it take the same share of what is left each.
    """
    steps = recipe.prune.steps
    suffix = "" if number == steps else f".{number}"
    settings = {"prune": recipe.prune.model_dump(), "seed": recipe.seed}
    inputs = dict(model)
    if latency_share is not None:
        inputs["latency"] = "staircase"
        latency_share **= number / steps
    if recipe.prune.allocation == "sensitivity":
        sensitivity = {**settings, "threads": _threads(recipe)}
        inputs["sensitivity"] = builder.add(f"sensitivity{suffix}", "sensitivity", sensitivity, model)
    cut = {**settings, "size": size ** (number / steps), "latency_share": latency_share}
    pruned = builder.add(f"prune{suffix}", "prune", cut, inputs)
    part = recipe.recover.part(number, steps).model_dump()
    recover = {"recover": part, "seed": recipe.seed, "threads": _threads(recipe)}
    return builder.add(f"recover{suffix}", "recover", recover, {"model": pruned})


def _quantized(
    builder: _Builder,
    precision: str,
    recipe: Recipe,
    metric: str,
    original: str,
    exported: str,
    keep_float: bool,
    optional: bool,
) -> str:
    """Add the step that makes a graph in another precision; INT8 is told what it may lose of the metric."""
    if precision != "int8":
        config: dict[str, Any] = {"precision": precision, "quantize": None, "bound": None}
        return builder.add(
            f"quantize.{precision}", "quantize", config, {"graph": exported}, optional=optional
        )
    bound = None
    if recipe.contract.max_drop is not None:
        bound = {
            "max_drop": recipe.contract.max_drop,
            "metric": metric,
            "metric_source": accuracy.source(metric),
        }
    config = {
        "precision": precision,
        "quantize": recipe.quantize.model_dump(),
        "bound": bound,
        "keep_float": keep_float,
    }
    inputs = {"graph": exported} if bound is None else {"graph": exported, "original": original}
    return builder.add("quantize.int8", "quantize", config, inputs, optional=optional)


class _Builder:
    """Collects steps, checking each against the registry and computing its key."""

    def __init__(self, sources: Sources, profile: Profile) -> None:
        self.steps: list[Step] = []
        self.reachable = measured_on_target(sources.device, profile)
        self.prunable = sources.model.kind == "torch"
        self._sources = sources
        self._profile = profile
        self._made: dict[str, Step] = {}

    def add(
        self,
        name: str,
        stage_name: str,
        config: Mapping[str, Any],
        inputs: Mapping[str, str],
        profile: Profile | None = None,
        optional: bool = False,
    ) -> str:
        stage = STAGES[stage_name]
        for role, source in inputs.items():
            kind = self._made[source].stage.produces
            if kind not in stage.consumes.get(role, ()):
                raise ValueError(f"{name}: {stage_name} does not take {kind!r} as {role!r}")
        plain = validate_config(stage, config).model_dump(mode="json")
        key = self._key(stage, plain, inputs, profile or self._profile)
        step = Step(name, stage, plain, inputs, key, profile, optional)
        self.steps.append(step)
        self._made[name] = step
        return name

    def _key(
        self, stage: Stage, config: Mapping[str, Any], inputs: Mapping[str, str], profile: Profile
    ) -> str:
        device = profile.model_dump(mode="json")
        ingredients = {
            "code": code_digest(stage.module, *stage.loads),
            "config": config,
            "inputs": {role: self._made[name].key for role, name in inputs.items()},
            "sources": {name: self._sources.digest(name) for name in stage.reads},
            "profile": {name: device[name] for name in stage.profile},
            "tools": {name: _version(name) for name in stage.libraries},
        }
        return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def measured_on_target(device: Device, profile: Profile) -> bool:
    """Whether a latency measured there is one of the profile: the same runtime and kind of processor."""
    return profile.runtime.name == "onnxruntime" and profile.architecture == device.machine()


def _check_batch_axis(model: Model) -> None:
    """Every input needs the batch as its first axis: free, or fixed at one row."""
    firsts = {spec.shape[:1] for spec in model.inputs}
    if firsts not in ({(-1,)}, {(1,)}):
        shapes = ", ".join(f"'{spec.name}' is {list(spec.shape)}" for spec in model.inputs)
        raise BadInput(
            f"the model {model.name} has no batch axis that edgekit can use",
            f"{shapes} (-1: any size); the first axis of every input has to be free, or 1",
            "export it with a free batch axis first",
        )


def _threads(recipe: Recipe) -> int:
    return recipe.threads or ort.default_threads()


def _precisions(recipe: Recipe, profile: Profile) -> tuple[str, ...]:
    wanted = PRECISION_ORDER if recipe.precision == "auto" else (recipe.precision,)
    possible = tuple(precision for precision in wanted if precision in profile.precisions)
    if not possible:
        raise BadInput(
            f"the profile {profile.name} cannot run {recipe.precision}",
            f"it runs {', '.join(profile.precisions)}",
            "choose one of these with --precision, or auto",
        )
    return possible


def _size(contract: Contract, sources: Sources) -> float:
    """Share of the parameters to keep.

    Raises:
        BadInput: a size below 1 is asked of a model that cannot be pruned.
    """
    prunable = sources.model.kind == "torch"
    if contract.size is None:
        return DEFAULT_SIZE if prunable else 1.0
    if contract.size < 1 and not prunable:
        form = {"onnx": "an ONNX graph", "exported": "a torch.export program"}[sources.model.kind]
        raise BadInput(
            f"size {contract.size:g} contradicts the model",
            f"{form} has no modules to prune",
            "give the torch model (a Hugging Face directory or module:factory), or --size 1",
        )
    return contract.size


@cache
def code_digest(*modules: str) -> str:
    """SHA-256 over the sources of some modules and of every own module that they import, transitively."""
    digest = hashlib.sha256()
    for name, path in sorted(closure(modules, _source).items()):
        digest.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _source(name: str) -> Path | None:
    if name.partition(".")[0] not in _OWN_PACKAGES:
        return None
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # ``from module import function``: the function is no module
        return None
    return Path(spec.origin) if spec is not None and spec.origin is not None else None
