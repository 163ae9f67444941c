"""The command ``edgekit doctor``."""

from __future__ import annotations

from pathlib import Path

import click

from edgekit.console import json_option, print_error, print_json
from edgekit.errors import Missing

#: Where ``compress`` keeps its work, unless it is told otherwise.
_STORE = Path(".edgekit")


@click.command()
@json_option
def doctor(as_json: bool) -> int:
    """Say what this machine can do and what is missing; exit code 4 if it cannot compress and serve."""
    from dataclasses import asdict

    from edgekit.doctor import look

    findings = look.look(_STORE)
    lost = look.missing(findings)
    if as_json:
        print_json({"ok": not lost, "findings": [asdict(finding) for finding in findings]})
    else:
        for finding in findings:
            click.echo(f"{finding.status:<8} {finding.subject}: {finding.detail}")
            if finding.fix:
                click.echo(f"{'':<8}   {finding.fix}")
    if not lost:
        return 0
    print_error(
        f"this machine cannot compress and serve a model: {', '.join(finding.subject for finding in lost)}",
        lost[0].detail,
        lost[0].fix,
    )
    return Missing.exit_code


#: Registered by ``cli.py``.
COMMANDS = (doctor,)
