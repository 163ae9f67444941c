"""Where to prune: our allocation beside uniform ratios and torch-pruning's global magnitude, recovered alike.

python benchmarks/allocation.py [--json] [--quick] [--example demo|detection] [--work DIR]

Every method takes an example's trained network to the same share of its parameters, in the same aligned
widths, and gets the same recovery: BatchNorm recalibration, then, on the detector, distillation for the same
steps on the same batches. What is lost of the example's metric on its held-out data is the figure. The demo's
network is not distilled: after one epoch of it all methods lose what the whole network loses by one epoch of
it, some samples of 719, even at a tenth of the parameters (docs/pruning.md). ``--work`` keeps the trained
networks; those of the demo are where ``edgekit demo --out`` has them.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import torch
from common import ROOT, document, finish, options_parser, run_module
from torch import nn

from edgekit import compress, ort, profile, surgery
from edgekit.artifact import Artifact, tree_digest
from edgekit.demo import road
from edgekit.measure import accuracy
from edgekit.measure.outputs import collect
from edgekit.modules import parameter_count
from edgekit.run import Progress
from edgekit.stages.export import GRAPH_FILE, PREFERRED_OPSET, export_module
from edgekit.stages.registry import STAGES, Inputs, Sources, validate_config

SEEDS = (0, 1, 2)
MAX_LAYER_RATIO = 0.95
OURS, UNIFORM, PEER = "sensitivity", "uniform", "torch-pruning global magnitude"
DEVICE = profile.load("x86-cpu")


@dataclass(frozen=True)
class Example:
    """A network to prune.

    Attributes:
        name: in the figures.
        request: what ``edgekit compress`` is asked, for a seed; trains the network below a directory, once.
        heads: layers that make the outputs; torch-pruning has to be told to leave them alone.
        sizes: shares of the parameters to keep.
        recovery_epochs: the same for every method.
    """

    name: str
    request: Callable[[Path, int], compress.Request]
    heads: tuple[str, ...]
    sizes: tuple[float, ...]
    recovery_epochs: int


@dataclass(frozen=True)
class Result:
    """What a method lost of the metric; ``case`` names example and size in the figures."""

    case: str
    method: str
    seed: int
    drop: float
    parameters_kept: float


def main() -> None:
    """Prune, recover and measure for each example, seed, size and method."""
    options = _options()
    examples = EXAMPLES if options.example is None else [e for e in EXAMPLES if e.name == options.example]
    seeds = SEEDS[:1] if options.quick else SEEDS
    results: list[Result] = []
    for example in examples:
        sizes = example.sizes[:1] if options.quick else example.sizes
        for seed in seeds:
            results += _results(example, options.work, seed, sizes)
    figures = _figures(results)
    targets = {key: (">=", 0.0) for key in figures if "lost beyond ours" in key}
    claim = "at equal recovery our allocation loses less than uniform ratios and global magnitude"
    figures["parameters_kept"] = {
        f"{result.case} {result.method} {result.seed}": round(result.parameters_kept, 4) for result in results
    }
    finish(document("allocation", claim, figures, targets, len(seeds)), options.json)


def _options() -> argparse.Namespace:
    parser = options_parser(__doc__)
    parser.add_argument("--example", choices=[example.name for example in EXAMPLES], help="only this one")
    parser.add_argument(
        "--work", type=Path, default=Path("edgekit-demo"), help="trained networks are kept here"
    )
    return parser.parse_args()


def _figures(results: Sequence[Result]) -> dict[str, Any]:
    drops: dict[str, dict[str, list[float]]] = {}
    for result in results:
        drops.setdefault(result.case, {}).setdefault(result.method, []).append(result.drop)
    figures: dict[str, Any] = {}
    for case, by_method in drops.items():
        for method, values in by_method.items():
            figures[f"{case}: drop, {method}"] = mean(values)
            figures[f"{case}: spread, {method}"] = pstdev(values)
        for other in (UNIFORM, PEER):
            figures[f"{case}: lost beyond ours, {other}"] = mean(by_method[other]) - mean(by_method[OURS])
    return figures


def _results(example: Example, work: Path, seed: int, sizes: Sequence[float]) -> Iterator[Result]:
    prepared = compress.prepare(example.request(work, seed))
    original = prepared.sources.model.module()
    whole = _metric(original, prepared)
    _say(f"{example.name} seed {seed}: {prepared.plan.metric} {whole:.4f} of the whole network")
    for size in sizes:
        for method in (OURS, UNIFORM, PEER):
            begin = time.perf_counter()
            with tempfile.TemporaryDirectory() as home:
                pruned = _pruned(method, example, prepared, size, Path(home))
                recovered = _recovered(pruned, example, prepared, Path(home))
                module = surgery.load_into(prepared.sources.model.module(), recovered.path)
            drop = whole - _metric(module, prepared)
            took_s = time.perf_counter() - begin
            _say(f"{example.name} seed {seed} size {size:g} {method}: {drop:+.4f} ({took_s:.0f} s)")
            kept = parameter_count(module) / parameter_count(original)
            yield Result(f"{example.name}, size {size:g}", method, seed, drop, kept)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _digits(work: Path, seed: int) -> compress.Request:
    weights, calib, held_out = road.trained(seed, work / f"seed-{seed}", Progress())
    return compress.Request(
        road.MODEL, (DEVICE.name,), str(calib), weights, str(held_out), overrides={"seed": seed}
    )


def _detector(work: Path, seed: int) -> compress.Request:
    home = (work / f"detection-seed-{seed}").absolute()  # the example's commands run somewhere else
    scenes, weights = home / "scenes", home / "detector.safetensors"
    if not weights.exists():
        unfinished = weights.with_suffix(".tmp")
        run_module("examples.detection.scenes", scenes, "--seed", seed)
        run_module("examples.detection.train", scenes, unfinished, "--seed", seed)
        unfinished.replace(weights)
    return compress.Request(
        "examples.detection.detector:build",
        (DEVICE.name,),
        str(scenes / "calib.jsonl"),
        weights,
        str(scenes / "held_out.jsonl"),
        str(scenes / "train.jsonl"),
        ROOT / "examples" / "detection" / "recipe.toml",
        {"seed": seed},
    )


EXAMPLES = (
    Example("demo", _digits, ("head",), (0.35, 0.2), recovery_epochs=0),
    Example("detection", _detector, ("classify.1", "locate.1"), (0.2, 0.1), recovery_epochs=2),
)


def _pruned(method: str, example: Example, prepared: compress.Prepared, size: float, home: Path) -> Artifact:
    sources, seed = prepared.sources, prepared.recipe.seed
    if method == PEER:
        out = home / "peer"
        out.mkdir()
        original = sources.model.module()
        pruned = _global_magnitude(sources, example.heads, size)
        surgery.save(out, surgery.edits_between(original, pruned), pruned)
        return Artifact("torch", out, tree_digest(out), "peer")
    changes = {"allocation": method, "max_layer_ratio": MAX_LAYER_RATIO}
    common = {"prune": prepared.recipe.prune.model_copy(update=changes).model_dump(), "seed": seed}
    given = {}
    if method == OURS:
        threads = torch.get_num_threads()
        given["sensitivity"] = _stage("sensitivity", {**common, "threads": threads}, sources, home)
    return _stage("prune", {**common, "size": size, "latency_share": None}, sources, home, **given)


def _recovered(pruned: Artifact, example: Example, prepared: compress.Prepared, home: Path) -> Artifact:
    settings = prepared.recipe.recover.model_copy(update={"epochs": example.recovery_epochs})
    config = {
        "recover": settings.model_dump(),
        "seed": prepared.recipe.seed,
        "threads": torch.get_num_threads(),
    }
    return _stage("recover", config, prepared.sources, home, model=pruned)


def _stage(name: str, config: Mapping[str, Any], sources: Sources, home: Path, **given: Artifact) -> Artifact:
    stage, out = STAGES[name], home / name
    out.mkdir()
    inputs = Inputs(sources, given, lambda _done, _total: None, timings=home)
    made = stage.load().run(inputs, validate_config(stage, config), DEVICE, out)
    return Artifact(stage.produces, out, tree_digest(out), name, (), made)


def _global_magnitude(sources: Sources, heads: Sequence[str], size: float) -> nn.Module:
    """torch-pruning's own global pruning by group magnitude, at the least ratio that reaches the size."""
    import torch_pruning as tp

    original = sources.model.module()
    example = tuple(torch.from_numpy(array) for array in sources.model.example(1).values())
    # No bisection: a group that would lose all of its channels is left whole, so a higher ratio can give a
    # larger network.
    for percent in range(1, 100):
        trial = copy.deepcopy(original)
        pruner = tp.pruner.BasePruner(
            trial,
            example,
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            global_pruning=True,
            pruning_ratio=percent / 100,
            max_pruning_ratio=MAX_LAYER_RATIO,
            ignored_layers=[trial.get_submodule(name) for name in heads],
            round_to=max(DEVICE.alignment.values()),
        )
        pruner.step()
        if parameter_count(trial) <= size * parameter_count(original):
            return trial
    sys.exit(f"torch-pruning reaches {size:g} of the parameters at no ratio")


def _metric(module: nn.Module, prepared: compress.Prepared) -> float:
    """The example's metric on its held-out data, of the exported graph and what is computed behind it."""
    sources = prepared.sources
    with tempfile.TemporaryDirectory() as home:
        graph = Path(home) / GRAPH_FILE
        export_module(module, sources.model, PREFERRED_OPSET, graph)
        chain = ort.open_chain(graph, sources.behind)
        found, labels = collect({"it": chain}, sources.held_out, sources.model, lambda _done, _total: None)
    return accuracy.score(prepared.plan.metric, found["it"], found["it"], labels).value


if __name__ == "__main__":
    main()
