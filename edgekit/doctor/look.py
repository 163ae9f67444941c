"""Everything that ``edgekit doctor`` looks at; changes nothing and sends nothing."""

from __future__ import annotations

from pathlib import Path

from edgekit.doctor import machine, packages, runtimes, tools
from edgekit.doctor.finding import Finding


def look(store: Path) -> list[Finding]:
    """Look at this machine.

    Args:
        store: where stages keep their work.
    """
    return [*machine.look(store), *packages.look(), *runtimes.look(), *tools.look()]


def missing(findings: list[Finding]) -> list[Finding]:
    """What has to be mended before a model can be compressed and served here."""
    return [finding for finding in findings if finding.status == "missing"]
