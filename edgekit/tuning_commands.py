"""The commands around `edgekit train`: shards for it, adapters, students.

Like every command of ``cli.py`` they parse, call one function and print.
"""

from __future__ import annotations

from pathlib import Path

import click

from edgekit.console import json_option, path_argument, print_json
from edgekit.train_commands import training_errors


@click.command()
@click.argument("data", type=path_argument)
@click.argument("out", type=path_argument)
@click.option("--shard-mb", type=click.IntRange(min=1), default=256, show_default=True, help="Of a shard.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the samples' order.")
@json_option
def shards(data: Path, out: Path, shard_mb: int, seed: int, as_json: bool) -> None:
    """Write DATA, a folder of images or a .jsonl file, as WebDataset shards into a new directory OUT."""
    from dataclasses import asdict

    from host_trainer.shards import writer

    with training_errors():
        written = writer.write(data, out, shard_mb << 20, seed)
    if as_json:
        print_json(asdict(written))
    else:
        click.echo(f"{written.spec}: {written.samples} samples, {written.size_bytes / 1e6:.1f} MB")


@click.command()
@click.argument("run", type=path_argument)
@click.argument("out", type=path_argument)
@click.option("--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True)
@json_option
def merge(run: Path, out: Path, dtype: str, as_json: bool) -> None:
    """Merge the adapter that RUN trained into its model, and write that into a new directory OUT."""
    import torch

    from host_trainer import merging

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    with training_errors():
        merged = merging.merge(run, out, dtypes[dtype])
    if as_json:
        print_json({"path": str(out), "merge_error": merged.merge_error, "cast_error": merged.cast_error})
    else:
        click.echo(f"{out}: outputs within {merged.merge_error:.1e}, and {merged.cast_error:.1e} by the cast")


@click.command()
@click.argument("config", type=path_argument)
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
def lora(config: Path, overrides: tuple[str, ...]) -> int:
    """Train an adapter as CONFIG with a section [lora] says; `edgekit merge` makes a plain model of it."""
    from host_trainer.launch import launch

    with training_errors():
        return launch(config, overrides, section="lora")


@click.command()
@click.argument("config", type=path_argument)
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
def distill(config: Path, overrides: tuple[str, ...]) -> int:
    """Train a student as CONFIG with a section [distill] says."""
    from host_trainer.launch import launch

    with training_errors():
        return launch(config, overrides, section="distill")


#: Registered by ``cli.py``.
COMMANDS = (shards, lora, distill, merge)
