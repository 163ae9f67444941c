"""The commands around training: writing shards, merging adapters.

Like every command of ``cli.py`` they parse, call one function and print.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from edgekit.console import json_option, path_argument, print_json
from edgekit.errors import BadInput


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

    with _three_lines():
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
    with _three_lines():
        merged = merging.merge(run, out, dtypes[dtype])
    if as_json:
        print_json({"path": str(out), "merge_error": merged.merge_error, "cast_error": merged.cast_error})
    else:
        click.echo(f"{out}: outputs within {merged.merge_error:.1e}, and {merged.cast_error:.1e} by the cast")


@contextmanager
def _three_lines() -> Iterator[None]:
    from host_trainer.errors import TrainingError

    try:
        yield
    except TrainingError as error:
        raise BadInput(error.what, error.why, error.fix) from error


COMMANDS = (shards, merge)
