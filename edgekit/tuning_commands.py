"""The commands around training: writing shards.

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


@contextmanager
def _three_lines() -> Iterator[None]:
    from host_trainer.errors import TrainingError

    try:
        yield
    except TrainingError as error:
        raise BadInput(error.what, error.why, error.fix) from error


COMMANDS = (shards,)
