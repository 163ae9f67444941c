"""Where to prune: our allocation beside uniform ratios and torch-pruning's global magnitude, recovered alike.

python benchmarks/allocation.py [--json] [--quick] [--work DIR]

Every method takes the demo's trained network to the same share of its parameters, in the same aligned widths,
and gets the same recovery: BatchNorm recalibration, then distillation for the same steps on the same batches.
What is lost of the accuracy on the held-out scans is the figure. The sizes are below the demo's and the
recovery is short, so that something is lost at all. ``--work`` keeps the trained networks, as ``edgekit demo
--out`` does.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import torch
from common import document, finish
from torch import nn

from edgekit import profile, surgery
from edgekit.artifact import Artifact, tree_digest
from edgekit.data import load_data
from edgekit.demo import road
from edgekit.models import load_model
from edgekit.modules import parameter_count
from edgekit.recipe import Recipe
from edgekit.run import Progress
from edgekit.stages.registry import STAGES, Inputs, Sources, validate_config

SIZES = (0.2, 0.1)
SEEDS = (0, 1, 2)
EPOCHS = 1
MAX_LAYER_RATIO = 0.95
OURS, UNIFORM, PEER = "sensitivity", "uniform", "torch-pruning global magnitude"
DEVICE = profile.load("x86-cpu")


def main() -> None:
    """Prune, recover and measure for each method, size and seed."""
    options = _options()
    seeds, sizes = (SEEDS[:1], SIZES[:1]) if options.quick else (SEEDS, SIZES)
    drops: dict[float, dict[str, list[float]]] = {s: {m: [] for m in (OURS, UNIFORM, PEER)} for s in sizes}
    ratios: dict[str, float] = {}
    for seed in seeds:
        sources = _sources(options.work, seed)
        whole = _accuracy(sources.model.module(), sources)
        for size in sizes:
            for method in drops[size]:
                with tempfile.TemporaryDirectory() as home:
                    pruned = _pruned(method, sources, size, seed, Path(home))
                    recovered = _recovered(pruned, sources, seed, Path(home))
                    module = surgery.load_into(sources.model.module(), recovered.path)
                drops[size][method].append(whole - _accuracy(module, sources))
                ratio = parameter_count(module) / parameter_count(sources.model.module())
                ratios[f"{size:g} {method} {seed}"] = round(ratio, 4)
                print(f"seed {seed} size {size:g} {method}: {drops[size][method][-1]:+.4f}", file=sys.stderr)
    figures = _figures(drops)
    targets = {
        f"size {size:g}: lost beyond ours, {other}": (">=", 0.0)
        for size in sizes
        for other in (UNIFORM, PEER)
    }
    claim = "at equal recovery our allocation loses less accuracy than uniform ratios and global magnitude"
    figures["parameters_kept"] = ratios
    finish(document("allocation", claim, figures, targets, len(seeds)), options.json)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the document only")
    parser.add_argument("--quick", action="store_true", help="one seed and one size")
    parser.add_argument(
        "--work", type=Path, default=Path("edgekit-demo"), help="trained networks are kept here"
    )
    return parser.parse_args()


def _figures(drops: Mapping[float, Mapping[str, list[float]]]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for size, by_method in drops.items():
        for method, values in by_method.items():
            figures[f"size {size:g}: drop, {method}"] = mean(values)
            figures[f"size {size:g}: spread, {method}"] = pstdev(values)
        for other in (UNIFORM, PEER):
            figures[f"size {size:g}: lost beyond ours, {other}"] = mean(by_method[other]) - mean(
                by_method[OURS]
            )
    return figures


def _sources(work: Path, seed: int) -> Sources:
    weights, calib, held_out = road.trained(seed, work / f"seed-{seed}", Progress())
    model = load_model(road.MODEL, weights)
    data, judges = (load_data(str(path), None, model.inputs, seed) for path in (calib, held_out))
    return Sources(model, data, data, judges)


def _pruned(method: str, sources: Sources, size: float, seed: int, home: Path) -> Artifact:
    if method == PEER:
        out = home / "peer"
        out.mkdir()
        original = sources.model.module()
        pruned = _global_magnitude(original, size)
        surgery.save(out, surgery.edits_between(original, pruned), pruned)
        return Artifact("torch", out, tree_digest(out), "peer")
    settings = Recipe().prune.model_copy(update={"allocation": method, "max_layer_ratio": MAX_LAYER_RATIO})
    common = {"prune": settings.model_dump(), "seed": seed}
    given = {}
    if method == OURS:
        threads = torch.get_num_threads()
        given["sensitivity"] = _stage("sensitivity", {**common, "threads": threads}, sources, home)
    return _stage("prune", {**common, "size": size, "latency_share": None}, sources, home, **given)


def _recovered(pruned: Artifact, sources: Sources, seed: int, home: Path) -> Artifact:
    settings = Recipe().recover.model_copy(update={"epochs": EPOCHS})
    config = {"recover": settings.model_dump(), "seed": seed, "threads": torch.get_num_threads()}
    return _stage("recover", config, sources, home, model=pruned)


def _stage(name: str, config: Mapping[str, Any], sources: Sources, home: Path, **given: Artifact) -> Artifact:
    stage, out = STAGES[name], home / name
    out.mkdir()
    inputs = Inputs(sources, given, lambda _done, _total: None, timings=home)
    made = stage.load().run(inputs, validate_config(stage, config), DEVICE, out)
    return Artifact(stage.produces, out, tree_digest(out), name, (), made)


def _global_magnitude(original: nn.Module, size: float) -> nn.Module:
    """torch-pruning's own global pruning by group magnitude, at the least ratio that reaches the size."""
    import torch_pruning as tp

    example = torch.zeros(1, 1, 20, 20)
    low, high, best = 0.0, 1.0, original
    for _ in range(10):
        ratio = (low + high) / 2
        trial = copy.deepcopy(original)
        pruner = tp.pruner.BasePruner(
            trial,
            example,
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            global_pruning=True,
            pruning_ratio=ratio,
            max_pruning_ratio=MAX_LAYER_RATIO,
            ignored_layers=[trial.get_submodule("head")],
            round_to=max(DEVICE.alignment.values()),
        )
        pruner.step()
        if parameter_count(trial) <= size * parameter_count(original):
            best, high = trial, ratio
        else:
            low = ratio
    return best


def _accuracy(module: nn.Module, sources: Sources) -> float:
    right = total = 0
    with torch.no_grad():
        for batch in sources.held_out.batches(128):
            said = module(torch.from_numpy(batch.inputs["image"])).argmax(dim=1).numpy()
            right += int((said == batch.labels).sum())
            total += len(said)
    return right / total


if __name__ == "__main__":
    main()
