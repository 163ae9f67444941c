"""The command ``edgekit bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgekit.console import json_option, path_argument, print_json


@click.command()
@click.argument("bundle_path", metavar="BUNDLE", type=path_argument)
@click.option(
    "--on",
    metavar="ADDRESS",
    help="ssh://[user@]host[:port]: the engine there. http://host:port: an agent that serves BUNDLE. "
    "Without it, this machine.",
)
@json_option
def bench(bundle_path: Path, on: str | None, as_json: bool) -> None:
    """Measure BUNDLE: latency of the engine by batch, latency and throughput of requests by clients."""
    from dataclasses import asdict

    from edgekit.bench import job

    result = job.bench(bundle_path, on, lambda text: click.echo(f"  {text}", err=True))
    if as_json:
        print_json(asdict(result))
        return
    click.echo(f"{result.name} {result.digest[:12]} {result.precision}")
    for timed in result.engine or ():
        step = "" if timed.step is None else f" {timed.step}"
        click.echo(_line(f"engine{step}, batch {timed.latency_ms.batch}", timed.latency_ms))
    for some in result.served or ():
        title = f"served, {some.clients} client{'s' if some.clients > 1 else ''}"
        click.echo(f"{_line(title, some.latency_ms)}  {some.requests_per_second:9.1f} requests/s")
    for part, why in result.why.items():
        click.echo(f"{part} not measured: {why}")


def _line(title: str, latency: Any) -> str:
    return f"{title:<24} p50 {latency.p50:8.3f} ms  p95 {latency.p95:8.3f} ms  p99 {latency.p99:8.3f} ms"


#: Registered by ``cli.py``.
COMMANDS = (bench,)
