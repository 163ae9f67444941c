"""``report.html``: the report document for a person, in one self-contained file."""

from __future__ import annotations

from importlib.resources import files

from edgekit.report.document import Report


def render(report: Report) -> str:
    """The page; every value is escaped."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = lambda fraction: f"{100 * fraction:.1f} %"
    environment.filters["ms"] = lambda value: f"{value:.2f} ms"
    environment.filters["mib"] = lambda size: f"{size / 2**20:.2f} MiB"
    template = files("edgekit.report").joinpath("page.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(report=report)
