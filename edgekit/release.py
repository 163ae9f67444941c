"""From the chosen candidate to a bundle: its files, and the manifest that describes them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from device_agent import manifest_form
from device_agent.manifest import Contract as ManifestContract
from device_agent.manifest import EngineBuild, EngineEntry, Golden, Manifest, Step, TensorSpec, Tolerance
from edgekit import __version__, bundle, preprocess
from edgekit.artifact import Artifact, disk_full_is_an_error
from edgekit.models import Model
from edgekit.postprocess import Postprocess
from edgekit.preprocess import Preprocess
from edgekit.profile import Profile
from edgekit.recipe import Contract, Recipe
from edgekit.search import Candidate, Outcome
from edgekit.stages.quantize import SCALES_FILE
from edgekit.stages.registry import Sources
from edgekit.stages.verify import GOLDEN_INPUTS, GOLDEN_OUTPUTS

_GRAPH = "model.onnx"
_BEHIND = "postprocess.onnx"


def make_bundle(
    outcome: Outcome,
    sources: Sources,
    profile: Profile,
    recipe: Recipe,
    contract: Contract,
    description: Preprocess | None,
    out: Path,
    targets: Sequence[Artifact] = (),
) -> bundle.Bundle:
    """Write the bundle in both forms into ``out``.

    Args:
        outcome: with the chosen candidate.
        sources: what the run started from.
        profile: the device that it was searched for.
        recipe: the settings.
        contract: what was asked.
        description: how raw data becomes the model's inputs.
        out: the directory.
        targets: what was built of the chosen candidate for further profiles.

    Raises:
        BadInput: the disk is full, or ``out`` holds something else under the bundle's name.
    """
    chosen, model, behind = outcome.chosen, sources.model, sources.postprocess
    built = [chosen.engine, *targets]
    with disk_full_is_an_error(out), tempfile.TemporaryDirectory(prefix="edgekit-") as temporary:
        staging = Path(temporary)
        _copy_files(staging, chosen, built, description)
        if behind is not None:
            (staging / _BEHIND).write_bytes(behind.graph)
        manifest = Manifest(
            schema=1,
            name=recipe.release.name or model.name,
            version=recipe.release.version,
            profile=profile.name,
            architecture=profile.architecture,
            graph=_GRAPH,
            precision=chosen.precision,
            inputs=model.inputs,
            outputs=model.outputs if behind is None else behind.outputs + model.outputs,
            max_batch_size=chosen.engine.metadata["max_batch_size"],
            files=(),
            engines=_engines(chosen, built),
            builds=_builds(built),
            golden=Golden(
                f"golden/{GOLDEN_INPUTS}",
                f"golden/{GOLDEN_OUTPUTS}",
                {
                    name: Tolerance(**value)
                    for name, value in chosen.measurement.metadata["tolerances"].items()
                },
            ),
            contract=_contract(contract, outcome),
            preprocessing=preprocess.to_manifest(description),
            measurements=_reproducible(outcome),
            resources=bundle.resources_of(profile),
            composition=() if behind is None else _steps(model, behind),
            provenance={"edgekit": __version__, "model_digest": model.digest, "seed": recipe.seed},
        )
        return bundle.pack(staging, manifest, out)


def _steps(model: Model, behind: Postprocess) -> tuple[Step, ...]:
    """The model, and what is behind it, as one model; the model's own outputs stay outputs.

    They are what the golden outputs hold a device to: behind a non-maximum suppression, the smallest
    difference may be a box more or less.
    """
    return (
        Step("model", _GRAPH, _same(model.inputs), _same(model.outputs)),
        Step("postprocess", _BEHIND, _same(behind.inputs), _same(behind.outputs)),
    )


def _same(tensors: tuple[TensorSpec, ...]) -> dict[str, str]:
    return {tensor.name: tensor.name for tensor in tensors}


def _copy_files(
    staging: Path, chosen: Candidate, built: Sequence[Artifact], description: Preprocess | None
) -> None:
    for artifact in built:
        for entry in artifact.metadata["engines"]:
            plan = _plan(entry)
            for path in (entry["path"] if entry["built"] else None, *(plan.paths if plan else ())):
                if path is not None:
                    (staging / path).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(artifact.path / path, staging / path)
    if (chosen.engine.path / SCALES_FILE).exists():
        shutil.copyfile(chosen.engine.path / SCALES_FILE, staging / SCALES_FILE)
    (staging / "golden").mkdir()
    for name in (GOLDEN_INPUTS, GOLDEN_OUTPUTS):
        shutil.copyfile(chosen.measurement.path / name, staging / "golden" / name)
    for inside, source in preprocess.files(description).items():
        (staging / inside).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, staging / inside)


def _engines(chosen: Candidate, built: Sequence[Artifact]) -> tuple[EngineEntry, ...]:
    return tuple(
        EngineEntry(entry["builder"], entry["path"], chosen.precision, entry["fingerprint"])
        for artifact in built
        for entry in artifact.metadata["engines"]
        if entry["built"]
    )


def _builds(built: Sequence[Artifact]) -> tuple[EngineBuild, ...]:
    """How devices build their own; profiles that ask for the same build share one."""
    builds: list[EngineBuild] = []
    for artifact in built:
        for entry in artifact.metadata["engines"]:
            build = _plan(entry)
            if build is not None and build not in builds:
                builds.append(build)
    return tuple(builds)


def _plan(entry: Mapping[str, Any]) -> EngineBuild | None:
    return manifest_form.build(EngineBuild, entry["plan"], "plan") if entry["plan"] else None


def _contract(contract: Contract, outcome: Outcome) -> ManifestContract:
    latency = contract.latency
    return ManifestContract(
        size=contract.size,
        max_drop=contract.max_drop,
        latency_quantile=latency.quantile if latency else None,
        latency_ms=latency.ms if latency else None,
        met=not outcome.unmet,
    )


def _reproducible(outcome: Outcome) -> dict[str, Any]:
    """What the same inputs measure again: no timings (see ``device_agent.manifest``)."""
    keys = ("params", "macs", "size_bytes", "metric", "params_ratio", "size_ratio", "metric_drop")
    facts = outcome.chosen.facts
    original = {key: outcome.baseline[key] for key in ("params", "macs", "size_bytes", "metric")}
    return {"original": original, **{key: facts[key] for key in keys}}
