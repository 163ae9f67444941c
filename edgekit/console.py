"""What the commands share: options, JSON on standard output, errors of three lines on standard error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

INTERRUPTED = 130

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document on standard output."
)
path_argument = click.Path(path_type=Path)


def print_error(what: str, why: str, fix: str) -> None:
    """Print an error as its three lines, on standard error."""
    lines = (" ".join(text.split()) for text in (what, why, fix))  # a library's message may have several
    click.echo("error: {}\n  why: {}\n  fix: {}".format(*lines), err=True)


def print_json(document: Any) -> None:
    """Print the one JSON document of a command."""
    click.echo(json.dumps(document, indent=2, ensure_ascii=False))
