"""``report.html``: the report document for a person, in one self-contained file."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

from edgekit.report.document import Report


@dataclass(frozen=True)
class Term:
    """A part of the contract, as it was asked and as it was measured."""

    name: str
    asked: str
    measured: str
    met: bool


def render(report: Report) -> str:
    """The page; every value is escaped."""
    import jinja2

    from edgekit.report import advice, plots

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = lambda fraction: f"{100 * fraction:.1f} %"
    environment.filters["ms"] = lambda value: f"{value:.2f} ms"
    environment.filters["mib"] = lambda size: f"{size / 2**20:.2f} MiB"
    environment.globals.update(
        terms=terms,
        next_steps=advice.next_steps,
        latency_plot=plots.latency_plot,
        size_plot=plots.size_plot,
        kernel_bars=plots.kernel_bars,
        sensitivity_bars=plots.sensitivity_bars,
        bar=plots.bar,
        share_bar=lambda fraction: plots.bar(plots.Bar("", "", "int8", fraction, fraction)),
        swatch=plots.swatch,
    )
    template = files("edgekit.report").joinpath("page.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(report=report)


def terms(report: Report) -> list[Term]:
    """What the contract asked for, beside what was measured on the chosen candidate."""
    contract, chosen, found = report.contract, report.chosen, []
    if contract.size is not None:
        found.append(
            _term(report, "size", f"{contract.size:g} of the parameters", f"{chosen.params_ratio:.3f}")
        )
    if contract.max_drop is not None:
        interval = chosen.metric_drop_interval
        sure = f" ({interval.low:+.4f} to {interval.high:+.4f})" if interval else ""
        asked = f"{contract.max_drop:g} of {chosen.metric.name} lost"
        found.append(_term(report, "max_drop", asked, f"{chosen.metric_drop:+.4f}{sure}"))
    if contract.latency is not None:
        quantile, _, bound = contract.latency.partition(":")
        measured = f"{getattr(chosen.latency_ms, quantile):.2f} ms"
        found.append(_term(report, "latency", f"{quantile} of {bound.removesuffix('ms')} ms", measured))
    return found


def _term(report: Report, name: str, asked: str, measured: str) -> Term:
    return Term(name, asked, measured, name not in report.contract.unmet)
