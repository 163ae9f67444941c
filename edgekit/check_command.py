"""The command ``edgekit check``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgekit.console import json_option, path_argument, print_json
from edgekit.errors import BadInput


@click.command()
@click.argument("model")
@click.option(
    "--profile",
    "names",
    multiple=True,
    default=("all",),
    show_default=True,
    help="A device profile: a name, a TOML file, or all; again for more.",
)
@click.option("--weights", type=path_argument, help="A .safetensors file, where MODEL is module:factory.")
@json_option
def check(model: str, names: tuple[str, ...], weights: Path | None, as_json: bool) -> int:
    """Say on which devices MODEL runs, and what has to be rewritten for them; no GPU is needed."""
    from dataclasses import asdict

    from edgekit import profile
    from edgekit.check.verdicts import check as judge
    from edgekit.models import load_model

    everything = "all" in names
    devices = [profile.load(name) for name in (profile.names() if everything else names)]
    verdicts = judge(load_model(model, weights), devices)
    if as_json:
        print_json({"model": model, "checks": [asdict(verdict) for verdict in verdicts]})
    else:
        for verdict in verdicts:
            _print(verdict)
    refused = any(verdict.verdict == "refused" for verdict in verdicts)
    return BadInput.exit_code if refused and not everything else 0


def _print(verdict: Any) -> None:
    click.echo(f"{verdict.profile:<24} {verdict.verdict:<8} {verdict.runtime}")
    for change in verdict.changes:
        click.echo(f"  rewritten: {change}")
    for refused in verdict.refused:
        click.echo(f"  {refused.op_type} '{refused.node}': {refused.why}")
    if verdict.dla is not None and verdict.dla.fallback:
        click.echo(f"  DLA: {len(verdict.dla.fallback)} of {verdict.dla.nodes} nodes fall back to the GPU")
    if verdict.oracle is not None and verdict.oracle.version and verdict.oracle.why:
        click.echo(f"  TensorRT-RTX {verdict.oracle.version} itself: {verdict.oracle.why}")


#: Registered by ``cli.py``.
COMMANDS = (check,)
