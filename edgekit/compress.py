"""``edgekit compress``: from a model, a profile and a recipe to a bundle and a report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgekit import postprocess, preprocess, profile, release, search
from edgekit.artifact import Store, disk_full_is_an_error, open_store
from edgekit.bundle import Bundle
from edgekit.data import Dataset, load_data
from edgekit.errors import BadInput
from edgekit.measure import accuracy, processor
from edgekit.measure.device import THIS_MACHINE, Device
from edgekit.models import Model, load_model
from edgekit.plan import Plan, make_plan, measured_on_target
from edgekit.postprocess import Postprocess
from edgekit.preprocess import Preprocess
from edgekit.profile import Profile
from edgekit.recipe import Contract, Recipe, load_recipe
from edgekit.report.document import Report
from edgekit.report.page import render
from edgekit.run import Progress
from edgekit.stages.registry import Sources

#: Without ``--eval``, every so-manieth calibration sample is held out of everything but the measurement.
HOLD_OUT_EVERY = 5
_TOOLS = ("torch", "onnx", "onnxruntime", "numpy", "transformers")


@dataclass(frozen=True)
class Request:
    """What the user asked for; the fields are the options of the command."""

    model: str
    profile: tuple[str, ...]
    calib: str
    weights: Path | None = None
    eval: str | None = None
    train: str | None = None
    recipe: Path | None = None
    overrides: Mapping[str, Any] | None = None
    out: Path | None = None
    workdir: Path = Path(".edgekit")
    measure_on: str | None = None
    study: str | None = None


@dataclass(frozen=True)
class Prepared:
    """A request whose inputs were read and checked, and the plan for it."""

    sources: Sources
    profile: Profile
    further: tuple[Profile, ...]
    recipe: Recipe
    preprocess: Preprocess | None
    evaluated_on: str
    plan: Plan
    out: Path
    study: str | None


@dataclass(frozen=True)
class Planned:
    """A step as ``--dry-run`` shows it."""

    name: str
    key: str
    cached: bool


def prepare(request: Request) -> Prepared:
    """Read the inputs and lay out the plan; nothing is written.

    Raises:
        BadInput: anything about the request is wrong.
    """
    recipe = load_recipe(request.recipe, dict(request.overrides or {}))
    device, *others = (profile.load(name) for name in request.profile)
    further = tuple(others)
    model, description = _load_model(request, recipe)
    calib = whole = load_data(request.calib, description, model.inputs, recipe.seed)
    held_out, evaluated_on = None, f"held-out data {request.eval}"
    if request.eval is None:
        calib, held_out = calib.split(HOLD_OUT_EVERY)
        evaluated_on = f"held out of the calibration data, one sample in {HOLD_OUT_EVERY}"
    else:
        held_out = load_data(request.eval, description, model.inputs, recipe.seed)
    train = calib
    if request.train is not None:
        train = load_data(request.train, description, model.inputs, recipe.seed)
        if train.digest == whole.digest:  # what is held out of one is held out of both
            train = calib
    _not_empty(calib, request.calib)
    _not_empty(held_out, request.eval or request.calib)
    behind = _load_postprocess(request, recipe, model)
    sources = Sources(model, calib, train, held_out, behind, _device(request.measure_on))
    metric = accuracy.choose(recipe.metric, held_out.has_labels)
    plan = make_plan(sources, profile.shared(device, further), recipe, metric, further)
    out = request.out or Path(f"{recipe.release.name or model.name}-{device.name}")
    return Prepared(sources, device, further, recipe, description, evaluated_on, plan, out, request.study)


def dry_run(prepared: Prepared, workdir: Path) -> list[Planned]:
    """Say which steps would run; touches nothing, and disturbs no run."""
    store = Store(workdir)  # read without the lock: artifacts appear whole
    return [Planned(step.name, step.key, store.get(step.key) is not None) for step in prepared.plan.steps]


def compress(prepared: Prepared, workdir: Path, progress: Progress) -> Report:
    """Run the plan, pick, and write the bundle, ``report.json`` and ``report.html`` into ``prepared.out``.

    The report says whether the contract is met; a missed contract is no error here.

    Raises:
        EdgekitError: a stage failed, or the results cannot be written.
    """
    _check_writable(prepared.out)
    with open_store(workdir) as store:
        contract = _effective_contract(prepared)
        found = _search(prepared, contract, store, progress)
        outcome = found.outcome
        made = release.make_bundle(
            outcome,
            prepared.sources,
            prepared.profile,
            prepared.recipe,
            contract,
            prepared.preprocess,
            prepared.out,
            outcome.chosen.targets,
        )
    report = _report(prepared, found, contract, made)
    with disk_full_is_an_error(prepared.out):
        _write(prepared.out / "report.json", report.model_dump_json(indent=2) + "\n")
        _write(prepared.out / "report.html", render(report))
    return report


def _device(measure_on: str | None) -> Device:
    """Where latencies are measured: this machine, or ``ssh://host``."""
    if measure_on is None:
        return THIS_MACHINE
    from edgekit.deploy import measure, ssh

    return measure.SshDevice(str(ssh.parse(measure_on)), ssh.SshOptions(batch=ssh.batch_needed(1)))


def _search(prepared: Prepared, contract: Contract, store: Store, progress: Progress) -> search.Found:
    request = search.Request(
        prepared.sources,
        prepared.profile,
        prepared.further,
        prepared.recipe,
        contract,
        prepared.plan.metric,
        store,
        progress,
    )
    if prepared.study is None:
        return search.search(request)
    from edgekit.search.study import search_together

    return search_together(request, prepared.study, prepared.recipe.search.trials)


def _load_model(request: Request, recipe: Recipe) -> tuple[Model, Preprocess | None]:
    """The model, and how raw data becomes its inputs: as the recipe says, else as its own files say."""
    base = request.recipe.parent if request.recipe else Path()
    description = preprocess.from_mapping(recipe.preprocessing, base)
    sample = None
    if ":" in request.model:  # a factory may need to be told the shape of its input
        sample = next(load_data(request.calib, description, None, recipe.seed).samples()).inputs
    model = load_model(request.model, request.weights, sample=sample, preprocess=description)
    return model, model.preprocess


def _load_postprocess(request: Request, recipe: Recipe, model: Model) -> Postprocess | None:
    if recipe.postprocessing is None:
        return None
    base = request.recipe.parent if request.recipe else Path()
    return postprocess.load(recipe.postprocessing.graph, base, model.outputs)


def _not_empty(data: Dataset, spec: str) -> None:
    if next(data.samples(), None) is None:
        raise BadInput(
            f"the data {spec} has too few samples",
            f"one in {HOLD_OUT_EVERY} is held out for the measurement, and none is left",
            "give more samples, or held-out data with --eval",
        )


def _effective_contract(prepared: Prepared) -> Contract:
    """The contract with the default size filled in where the model is pruned to it."""
    contract = prepared.recipe.contract
    size = contract.size if contract.size is not None or prepared.plan.size == 1 else prepared.plan.size
    return contract.model_copy(update={"size": size})


def _check_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise BadInput(
            f"the output directory {out} cannot be used",
            f"{error.strerror}",
            "give another one with --out",
        ) from error


def _write(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def _report(prepared: Prepared, found: search.Found, contract: Contract, made: Bundle) -> Report:
    outcome = found.outcome
    candidates = [{**candidate.facts, "reason": candidate.reason} for candidate in outcome.candidates]
    document = {
        "model": prepared.recipe.release.name or prepared.sources.model.name,
        "profile": prepared.profile.name,
        "profile_digest": profile.digest(prepared.profile),
        "seed": prepared.recipe.seed,
        "tool_versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _TOOLS},
        },
        "evaluated_on": prepared.evaluated_on,
        "baseline": outcome.baseline,
        "chosen": {**outcome.chosen.facts, "reason": None},
        "candidates": candidates,
        "contract": {
            "size": contract.size,
            "max_drop": contract.max_drop,
            "latency": str(contract.latency) if contract.latency else None,
            "met": not outcome.unmet,
            "unmet": list(outcome.unmet),
            "max_drop_certain": search.drop_is_certain(outcome.chosen.facts, contract),
            "binding": list(search.binding(outcome)),
            "why": _why_unmet(prepared, outcome),
        },
        "engines": _engines(prepared, outcome.chosen),
        "bundle": {"path": str(made.directory), "file": str(made.archive), "digest": made.digest},
        "stages": [asdict(record) for record in found.records],
        "layers": outcome.chosen.measurement.metadata["layers"],
        "sensitivity": _sensitivity(found),
        "latency_predicted_ms": _predicted(prepared, outcome),
        "why": {**_not_measured(prepared, found), **_not_certain(outcome, contract)},
    }
    return Report.model_validate(document)


def _why_unmet(prepared: Prepared, outcome: search.Outcome) -> dict[str, str]:
    """Reasons by what is unmet; for slow INT8 that may be the processor under it."""
    why = dict(outcome.unmet)
    unlike = None if prepared.sources.device.address else processor.unlike(prepared.profile)
    if unlike and "faster_than_original" in why and outcome.chosen.precision == "int8":
        why["faster_than_original"] += f"; {unlike}"
    return why


def _sensitivity(found: search.Found) -> dict[str, Any]:
    """Loss against width of each group, as it was measured for the first pruning; empty where nothing was."""
    artifacts = found.tried[0].ran.artifacts
    measured = artifacts.get("sensitivity.1", artifacts.get("sensitivity"))
    return {} if measured is None else dict(measured.metadata["groups"])


def _predicted(prepared: Prepared, outcome: search.Outcome) -> dict[str, Any] | None:
    """What the profile's roofline says of the chosen graph, where the device itself was not reached."""
    import onnx

    from edgekit.measure import roofline, work

    if measured_on_target(prepared.sources.device, prepared.profile) or _runs_on_dla(prepared):
        return None
    graph = onnx.load(str(outcome.chosen.engine.path / "model.onnx"))
    operators = work.operators(graph, prepared.sources.model.example(1))
    return roofline.predict(operators, prepared.profile).as_json()


def _runs_on_dla(prepared: Prepared) -> bool:
    dla = prepared.profile.dla
    return dla is not None and dla.core is not None


def _not_measured(prepared: Prepared, found: search.Found) -> dict[str, str]:
    """What the document cannot say, and why."""
    why = {}
    if not measured_on_target(prepared.sources.device, prepared.profile):
        where = prepared.sources.device.address or "this host"
        why["latency_ms"] = f"measured on {where} with ONNX Runtime, not on a {prepared.profile.name}"
    if _runs_on_dla(prepared):
        why["latency_predicted_ms"] = "the profile's peaks are those of the GPU, and it asks for its DLA"
    why |= {step: reason for one in found.tried for step, reason in one.ran.impossible.items()}
    if any(record.peak_rss_bytes is None for record in found.records):
        why["stages.peak_rss_bytes"] = "the kernel does not let a process reset its memory high-water mark"
    return why


def _not_certain(outcome: search.Outcome, contract: Contract) -> dict[str, str]:
    """What few samples and few timed runs cannot show."""
    facts = outcome.chosen.facts
    return _not_certainly_faster(facts) | _not_certainly_as_good(outcome, facts, contract)


def _not_certainly_faster(facts: Mapping[str, Any]) -> dict[str, str]:
    interval, runs = facts["speedup_interval"], facts["latency_ms"]["runs"]
    if not interval["low"] <= 1 <= interval["high"]:
        return {}
    return {
        "contract.faster_than_original": f"{runs} runs cannot show it: the speed-up lies between "
        f"{interval['low']:.2f} and {interval['high']:.2f} at {interval['confidence']:.0%} confidence"
    }


def _not_certainly_as_good(
    outcome: search.Outcome, facts: Mapping[str, Any], contract: Contract
) -> dict[str, str]:
    if search.drop_is_certain(facts, contract) is not False or "max_drop" in outcome.unmet:
        return {}
    interval = facts["metric_drop_interval"]
    return {
        "contract.max_drop": f"{facts['metric']['samples']} samples cannot show it: the drop lies between "
        f"{interval['low']:+.4f} and {interval['high']:+.4f} at {interval['confidence']:.0%} confidence"
    }


def _engines(prepared: Prepared, chosen: search.Candidate) -> list[dict[str, Any]]:
    """What was built for each profile; those with ONNX Runtime are served by the portable graph itself."""
    keys = (
        "builder",
        "version",
        "target",
        "built",
        "executed",
        "why",
        "changes",
        "not_on_dla",
        "layers",
        "layers_why",
    )
    others = [device for device in prepared.further if device.runtime.name != "onnxruntime"]
    sources = [(prepared.profile, chosen.engine), *zip(others, chosen.targets, strict=True)]
    return [
        {"profile": device.name, **{key: entry[key] for key in keys}}
        for device, artifact in sources
        for entry in artifact.metadata["engines"]
    ]
