"""The report as people see it: in a real browser, on a desk and on a phone, by day and by night."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Compressed
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from edgekit.measure import layers
from edgekit.report.advice import next_steps
from edgekit.report.document import GroupSensitivity, Report
from edgekit.report.page import render, terms
from edgekit.report.plots import MOST_ROWS, kernel_bars, sensitivity_bars
from edgekit.report.svg import axis_over, element

CHROMIUM = shutil.which("chromium")
in_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


def browser(page: Path, *options: str) -> str:
    """Open a page in headless Chromium, with a profile of its own; what it printed."""
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        f"--user-data-dir={page.parent / 'profile'}", *options, page.as_uri(),
    ]  # fmt: skip
    printed = page.parent / "printed"
    with printed.open(
        "wb"
    ) as stream:  # no pipe: a helper process of Chromium's may outlive it and hold that open
        subprocess.run(command, check=True, stdout=stream, stderr=subprocess.DEVNULL, timeout=120)
    return printed.read_text()


def written(compressed: Compressed, root: Path, script: str = "") -> Path:
    """The page of a real compression; ``script`` measures it in the browser and is no part of what ships."""
    page = root / "report.html"
    html = render(Report.model_validate(compressed.document))
    page.write_text(html.replace("</body>", f"{script}</body>"))
    return page


# Runs in the browser, and writes what it found where --dump-dom shows it.
MEASURE = """<script>
const plots = [...document.querySelectorAll('svg.plot')];
const outside = plots.flatMap(plot => [...plot.querySelectorAll('circle, rect, text')].filter(part => {
  const a = part.getBoundingClientRect(), b = plot.getBoundingClientRect();
  return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1;
}).map(part => part.outerHTML));
const count = selector => document.querySelectorAll(selector).length;
const found = [document.documentElement.scrollWidth, window.innerWidth, plots.length, outside.join(' '),
  count('circle.chosen'), count('rect.is-int8')];
document.body.setAttribute('data-found', found.join('|'));
</script>"""


@in_chromium
@pytest.mark.parametrize("width", [390, 1200])
def test_it_fits_the_screen(compressed: Compressed, tmp_path: Path, width: int) -> None:
    """On a phone and on a desk nothing runs off the page, and all of a plot is inside of its frame."""
    # Chromium's own least window is wider than a phone, so a frame of that width holds the page.
    written(compressed, tmp_path, MEASURE)
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe id="page" src="report.html" width="{width}" height="900" style="border: 0"></iframe>'
        "<script>page.onload = () => document.body.setAttribute('data-found', "
        "page.contentDocument.body.getAttribute('data-found'))</script>"
    )
    options = ("--allow-file-access-from-files", "--virtual-time-budget=4000", "--dump-dom")
    dom = browser(frame, *options)
    match = re.search(r'<body[^>]* data-found="([^"]*)"', dom)
    assert match is not None, dom[:500]
    page_width, window_width, plots, outside, chosen, bars = match[1].split("|")
    assert int(page_width) <= int(window_width) == width
    assert (int(plots), outside, int(chosen)) == (2, "", 2)
    assert int(bars) > 5


@in_chromium
def test_it_is_dark_at_night(compressed: Compressed, tmp_path: Path) -> None:
    """The page follows the reader's setting: dark on light, or light on dark."""
    page = written(compressed, tmp_path)
    means = {}
    for scheme, setting in (("light", "1"), ("dark", "0")):
        shot = tmp_path / f"{scheme}.png"
        browser(
            page,
            f"--blink-settings=preferredColorScheme={setting}",
            "--window-size=900,1200",
            f"--screenshot={shot}",
        )
        with Image.open(shot) as image:
            means[scheme] = float(np.asarray(image.convert("L")).mean())
    assert means["light"] > 200
    assert means["dark"] < 70


def test_the_contract_stands_beside_what_was_measured(compressed: Compressed) -> None:
    """Each part that was asked is a row, marked as met or not."""
    document = copy.deepcopy(compressed.document)
    document["contract"].update(
        size=0.35, max_drop=0.01, latency="p95:4ms", met=False, unmet=["latency"], why={"latency": "slow"}
    )
    rows = {term.name: term.met for term in terms(Report.model_validate(document))}
    assert rows == {"size": True, "max_drop": True, "latency": False}


def test_kernels_are_those_that_ran(compressed: Compressed) -> None:
    """The report names the kernels of the graph that ships: its INT8 convolutions, each with a time."""
    report = Report.model_validate(compressed.document)
    assert {layer.operator for layer in report.layers} >= {"QLinearConv"}
    assert sum(layer.median_ms for layer in report.layers) > 0
    shown, _ = kernel_bars(report)
    assert [row.value for row in shown] == sorted((row.value for row in shown), reverse=True)
    assert shown[0].fraction == 1


def test_the_profile_has_every_kernel_once(compressed: Compressed, tmp_path: Path) -> None:
    """However often the graph runs under the profiler, a kernel is one row, and no file is left behind."""
    graph = Path(compressed.document["bundle"]["path"]) / "model.onnx"
    inputs = {"image": np.zeros((1, 1, 8, 8), np.float32)}
    once, often = (layers.profile(graph, inputs, runs, threads=1) for runs in (1, 5))
    assert [layer.name for layer in once] == [layer.name for layer in often]
    assert len({layer.name for layer in once}) == len(once)


def test_many_kernels_are_summed_up(compressed: Compressed) -> None:
    """A large network's page stays readable: the longest rows, and the sum of the rest."""
    document = copy.deepcopy(compressed.document)
    document["layers"] = [
        {"name": f"k{number}", "operator": "Conv", "precision": "fp32", "median_ms": float(number)}
        for number in range(100)
    ]
    report = Report.model_validate(document)
    shown, others_ms = kernel_bars(report)
    assert len(shown) == MOST_ROWS
    assert sum(row.value for row in shown) + others_ms == sum(range(100))
    assert f"{100 - MOST_ROWS} others" in render(report)


def test_sensitive_groups_come_first(compressed: Compressed) -> None:
    """Groups are compared at about half of their width; where nothing was measured, there is no section."""
    groups = {
        "cheap": GroupSensitivity(width=64, params=10, points=[(48, 0.5), (32, 0.01), (16, 0.9)]),
        "dear": GroupSensitivity(width=32, params=10, points=[(16, 0.2)]),
        "whole": GroupSensitivity(width=32, params=10, points=[(32, 0.0)]),
    }
    report = Report.model_validate(compressed.document).model_copy(update={"sensitivity": groups})
    rows = sensitivity_bars(report)
    assert [(row.name, row.note) for row in rows] == [("dear", "16 of 32"), ("cheap", "32 of 64")]
    assert "What each group is worth" in render(report)
    assert "What each group is worth" not in render(report.model_copy(update={"sensitivity": {}}))


def advice(document: dict[str, Any], **contract: Any) -> str:
    """What a document with another contract's outcome is advised."""
    changed = copy.deepcopy(document)
    changed["contract"].update(contract)
    return " ".join(f"{step.why} {step.how}" for step in next_steps(Report.model_validate(changed)))


def test_advice_is_about_what_is_missing(compressed: Compressed) -> None:
    """A met contract is to be signed and deployed; a missed one says what to change, and not to deploy."""
    document = compressed.document
    assert "edgekit sign" in advice(document)
    missed = {"met": False, "why": {}}
    assert "max_layer_ratio" in advice(document, **missed, unmet=["size"])
    drop = dict.fromkeys(("original", "in_int8", "protected", "at_least"), 0.9) | {"metric": "top1"}
    for in_float, word in ((0.95, "max_kept_float"), (0.8, "epochs")):
        document = copy.deepcopy(compressed.document)
        document["chosen"]["calibration"]["drop"] = {**drop, "in_float": in_float}
        assert word in advice(document, **missed, unmet=["max_drop"], max_drop=0.01)
    assert "smaller --size" in advice(document, **missed, unmet=["latency"], latency="p50:1ms")
    assert "edgekit sign" not in advice(document, **missed, unmet=["size"])


def test_advice_counts_the_samples_that_would_do(compressed: Compressed) -> None:
    """Where few samples cannot show that a bound holds, the page says about how many could."""
    document = copy.deepcopy(compressed.document)
    document["chosen"]["metric_drop"] = 0.005
    document["chosen"]["metric_drop_interval"] = {
        "low": -0.01, "high": 0.02, "method": "bootstrap", "confidence": 0.95,
    }  # fmt: skip
    words = advice(document, max_drop=0.01, max_drop_certain=False)
    assert "About 1,800 could" in words  # 200 samples; three times as narrow takes nine times as many


@given(st.lists(st.floats(-1e6, 1e6, allow_nan=False), min_size=1, max_size=8))
def test_an_axis_holds_its_values_and_has_a_few_round_ticks(values: list[float]) -> None:
    """Every value lies between the two ends, and ticks are in order, distinct and not too many."""
    axis = axis_over(values, 10, 110)
    assert all(10 <= axis(value) <= 110 for value in values)
    assert 1 <= len(axis.ticks) <= 12
    assert [axis.text(tick) for tick in axis.ticks] == list(dict.fromkeys(map(axis.text, axis.ticks)))


def test_markup_in_a_drawing_is_shown_not_executed() -> None:
    """Names in plots are text, in content and in attributes."""
    made = element("text", "<script>", aria_label='"><script>')
    assert made == '<text aria-label="&#34;&gt;&lt;script&gt;">&lt;script&gt;</text>'
