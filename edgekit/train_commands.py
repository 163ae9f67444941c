"""The commands that train: starting runs, comparing them.

Like every command of ``cli.py`` they parse, call one function and print.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from edgekit.console import json_option, path_argument, print_json
from edgekit.errors import BadInput, EdgekitError, Missing


@click.command()
@click.argument("config", type=path_argument)
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
def train(config: Path, overrides: tuple[str, ...]) -> int:
    """Train as CONFIG, a TOML file, says; run again, it goes on from the last checkpoint."""
    from host_trainer.launch import launch

    with training_errors():
        return launch(config, overrides)


@click.command()
@click.argument("directories", metavar="[DIR]...", nargs=-1, type=path_argument)
@json_option
def runs(directories: tuple[Path, ...], as_json: bool) -> None:
    """List training runs (each DIR is one, or holds some; default: runs/) and compare them."""
    from dataclasses import asdict

    from host_trainer import runs as listing

    with training_errors():
        found = listing.find(directories or (Path("runs"),))
    if as_json:
        print_json([asdict(run) for run in found])
        return
    _print_table(
        [
            {
                "run": run.run,
                "state": run.state,
                "steps": f"{run.step}/{run.total_steps}",
                "train/loss": run.metrics.get("train/loss"),
                **{name: value for name, value in run.metrics.items() if name.startswith("eval/")},
                "revision": (run.revision or "")[:10],
                **run.settings,
            }
            for run in found
        ]
    )


def _print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(*columns)
    for row in rows:
        cells = (row.get(key, "") for key in columns)
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells))
    Console().print(table)


@contextmanager
def training_errors() -> Iterator[None]:
    """The trainer knows no edgekit; its errors have the same three lines, and get their exit code here."""
    from host_trainer.errors import TrainingError

    try:
        yield
    except TrainingError as error:
        kinds: dict[int, type[EdgekitError]] = {2: BadInput, 4: Missing}
        raise kinds[error.exit_code](error.what, error.why, error.fix) from error


#: Registered by ``cli.py``.
COMMANDS = (train, runs)
