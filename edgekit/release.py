"""From the chosen candidate to a bundle: its files, and the manifest that describes them."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from device_agent.manifest import Contract as ManifestContract
from device_agent.manifest import EngineEntry, Golden, Manifest, Tolerance
from edgekit import __version__, bundle, preprocess
from edgekit.artifact import disk_full_is_an_error
from edgekit.models import Model
from edgekit.preprocess import Preprocess
from edgekit.profile import Profile
from edgekit.recipe import Contract, Recipe
from edgekit.search import Candidate, Outcome
from edgekit.stages.quantize import SCALES_FILE
from edgekit.stages.verify import GOLDEN_INPUTS, GOLDEN_OUTPUTS

_GRAPH = "model.onnx"


def make_bundle(
    outcome: Outcome,
    model: Model,
    profile: Profile,
    recipe: Recipe,
    contract: Contract,
    description: Preprocess | None,
    out: Path,
) -> bundle.Bundle:
    """Write the bundle in both forms into ``out``.

    Raises:
        BadInput: the disk is full, or ``out`` holds something else under the bundle's name.
    """
    chosen = outcome.chosen
    with disk_full_is_an_error(out), tempfile.TemporaryDirectory(prefix="edgekit-") as temporary:
        staging = Path(temporary)
        _copy_files(staging, chosen, description)
        manifest = Manifest(
            schema=1,
            name=recipe.release.name or model.name,
            version=recipe.release.version,
            profile=profile.name,
            architecture=profile.architecture,
            graph=_GRAPH,
            precision=chosen.precision,
            inputs=model.inputs,
            outputs=model.outputs,
            max_batch_size=chosen.engine.metadata["max_batch_size"],
            files=(),
            engines=_engines(chosen),
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
            provenance={"edgekit": __version__, "model_digest": model.digest, "seed": recipe.seed},
        )
        return bundle.pack(staging, manifest, out)


def _copy_files(staging: Path, chosen: Candidate, description: Preprocess | None) -> None:
    for entry in chosen.engine.metadata["engines"]:
        if entry["built"]:
            shutil.copyfile(chosen.engine.path / entry["path"], staging / entry["path"])
    if (chosen.engine.path / SCALES_FILE).exists():
        shutil.copyfile(chosen.engine.path / SCALES_FILE, staging / SCALES_FILE)
    (staging / "golden").mkdir()
    for name in (GOLDEN_INPUTS, GOLDEN_OUTPUTS):
        shutil.copyfile(chosen.measurement.path / name, staging / "golden" / name)
    for inside, source in preprocess.files(description).items():
        (staging / inside).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, staging / inside)


def _engines(chosen: Candidate) -> tuple[EngineEntry, ...]:
    return tuple(
        EngineEntry(entry["builder"], entry["path"], chosen.precision, entry["fingerprint"])
        for entry in chosen.engine.metadata["engines"]
        if entry["built"]
    )


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
