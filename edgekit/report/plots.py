"""What the report draws: candidates by latency and size, and bars for groups and kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from markupsafe import Markup

from edgekit.report.document import CandidateFigures, Figures, Report
from edgekit.report.svg import Axis, axis_over, element, join

_WIDTH, _HEIGHT = 380, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 14, 44
_MIB = 2**20
#: Rows of a table of bars; the rest is summed up.
MOST_ROWS = 30


@dataclass(frozen=True)
class Bar:
    """A row of a table of bars; ``fraction`` is of the longest one."""

    name: str
    note: str
    kind: str
    value: float
    fraction: float


def latency_plot(report: Report) -> Markup:
    """Metric over latency, with what was asked; the quantile is the contract's, else the median."""
    quantile, _, bound = (report.contract.latency or "p50").partition(":")
    bound_ms = float(bound.removesuffix("ms")) if bound else None
    return _scatter(
        report,
        lambda figures: float(getattr(figures.latency_ms, quantile)),
        f"latency {quantile}, ms",
        bound_ms,
    )


def size_plot(report: Report) -> Markup:
    """Metric over the size of the file."""
    return _scatter(report, lambda figures: figures.size_bytes / _MIB, "file, MiB", None)


def kernel_bars(report: Report) -> tuple[list[Bar], float]:
    """The kernels that take most time, longest first, and the milliseconds of all others."""
    ordered = sorted(report.layers, key=lambda layer: -layer.median_ms)
    longest = ordered[0].median_ms if ordered else 0.0
    shown = [
        Bar(layer.name, layer.operator, layer.precision, layer.median_ms, layer.median_ms / (longest or 1.0))
        for layer in ordered[:MOST_ROWS]
    ]
    return shown, sum(layer.median_ms for layer in ordered[MOST_ROWS:])


def sensitivity_bars(report: Report) -> list[Bar]:
    """What each group costs at the width nearest to half of its own, the dearest first."""
    at_half = []
    for name, group in report.sensitivity.items():
        narrower = [point for point in group.points if point[0] < group.width]
        if narrower:
            width, loss = min(narrower, key=lambda point: (abs(point[0] - group.width / 2), point[0]))
            at_half.append((name, f"{width} of {group.width}", loss))
    at_half.sort(key=lambda row: -row[2])
    largest = max((loss for *_, loss in at_half), default=0.0)
    return [
        Bar(name, note, "loss", loss, max(0.0, loss) / (largest if largest > 0 else 1.0))
        for name, note, loss in at_half[:MOST_ROWS]
    ]


def bar(row: Bar) -> Markup:
    """A bar as wide as its cell at a fraction of 1."""
    rectangle = element("rect", width=max(0.4, 100 * row.fraction), height=10, class_=f"is-{row.kind}")
    return element(
        "svg", rectangle, class_="bar", viewBox="0 0 100 10", preserveAspectRatio="none", aria_hidden="true"
    )


def swatch(kind: str) -> Markup:
    """A small square in the colour of a precision."""
    return element("svg", element("rect", width=10, height=10, class_=f"is-{kind}"), viewBox="0 0 10 10")


def _scatter(report: Report, position: Callable[[Figures], float], title: str, bound: float | None) -> Markup:
    everyone: list[Figures] = [report.baseline, *report.candidates]
    xs, ys = [position(one) for one in everyone], [one.metric.value for one in everyone]
    least = None if report.contract.max_drop is None else ys[0] - report.contract.max_drop
    x = axis_over(xs + ([] if bound is None else [bound]), _LEFT, _WIDTH - _RIGHT)
    y = axis_over(ys + ([] if least is None else [least]), _HEIGHT - _BOTTOM, _TOP)
    name = report.baseline.metric.name
    parts = [_axes(x, y, title, name)]
    if least is not None:
        parts.append(_line(_LEFT, y(least), _WIDTH - _RIGHT, y(least), f"least {name} asked: {least:.4f}"))
    if bound is not None:
        parts.append(_line(x(bound), _TOP, x(bound), _HEIGHT - _BOTTOM, f"most asked: {bound:g}"))
    parts += [
        _candidate(one, x(position(one)), y(one.metric.value))
        for one in sorted(report.candidates, key=lambda one: one.reason is None)
    ]
    parts.append(_original(report.baseline, x(xs[0]), y(ys[0])))
    described = f"{name} over {title}: the original, {len(report.candidates)} candidates, the chosen one"
    return element(
        "svg", join(parts), class_="plot", viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=described
    )


def _axes(x: Axis, y: Axis, x_title: str, y_title: str) -> Markup:
    parts = []
    for value in x.ticks:
        parts.append(element("line", x1=x(value), x2=x(value), y1=_TOP, y2=_HEIGHT - _BOTTOM, class_="grid"))
        parts.append(_text(x.text(value), x(value), _HEIGHT - _BOTTOM + 15, "middle"))
    for value in y.ticks:
        parts.append(element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y(value), y2=y(value), class_="grid"))
        parts.append(_text(y.text(value), _LEFT - 6, y(value) + 4, "end"))
    parts.append(_text(x_title, (_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8, "middle", "title"))
    parts.append(_text(y_title, _LEFT - 6, _TOP - 3, "end", "title"))
    return join(parts)


def _candidate(one: CandidateFigures, x: float, y: float) -> Markup:
    chosen = one.reason is None
    told = element("title", f"{one.precision}: {one.metric.value:.4f}, {one.reason or 'chosen'}")
    kind = f"point is-{one.precision}{' chosen' if chosen else ''}"
    mark = element("circle", told, cx=x, cy=y, r=7 if chosen else 4.5, class_=kind)
    return join([mark, _label(f"{one.precision}, chosen", x, y, "label")]) if chosen else mark


def _original(one: Figures, x: float, y: float) -> Markup:
    told = element("title", f"original: {one.metric.value:.4f}")
    mark = element("rect", told, x=x - 5.0, y=y - 5.0, width=10, height=10, class_="point original")
    return join([mark, _label("original", x, y, "label")])


def _label(words: str, x: float, y: float, kind: str) -> Markup:
    """Beside a point, on the side with more room."""
    right = x > (_LEFT + _WIDTH) / 2
    return _text(words, x - 11 if right else x + 11, y + 4, "end" if right else "start", kind)


def _line(x1: float, y1: float, x2: float, y2: float, told: str) -> Markup:
    return element("line", element("title", told), x1=x1, y1=y1, x2=x2, y2=y2, class_="bound")


def _text(words: str, x: float, y: float, anchor: str, kind: str = "tick") -> Markup:
    return element("text", words, x=x, y=y, text_anchor=anchor, class_=kind)
