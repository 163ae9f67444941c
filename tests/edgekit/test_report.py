"""The report: strict about its keys, and a page that shows every number without trusting any name."""

from __future__ import annotations

import copy
import json
from html.parser import HTMLParser
from typing import Any

import jsonschema
import pytest
from conftest import Compressed
from host_testing import HERE
from pydantic import ValidationError

from edgekit.report.document import Report
from edgekit.report.page import render

SCHEMA = json.loads((HERE / "report.schema.json").read_text())
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Collects text and tags, and checks that every element is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_shows_the_result(compressed: Compressed) -> None:
    """Model, profile, verdict, figures, candidates, widths, stages and digest are on it, in valid nesting."""
    report = Report.model_validate(compressed.document)
    page = Page(render(report))
    text = " ".join(" ".join(page.words).split())
    for word in (
        "x86-cpu", "The contract is met", f"{report.baseline.params:,}", f"{report.chosen.params:,}",
        f"{report.chosen.metric.value:.4f}", report.bundle.digest, "blocks.0.first", "quantize.int8",
    ):  # fmt: skip
        assert word in text
    assert page.tags.count("table") >= 3


def test_the_page_needs_nothing_else(compressed: Compressed) -> None:
    """One file: no script, and nothing is loaded from anywhere."""
    page = Page(render(Report.model_validate(compressed.document)))
    assert "script" not in page.tags
    assert [link for link in page.links if "://" in link or link.startswith("/")] == []


def test_the_page_says_what_is_not_met(compressed: Compressed) -> None:
    """An unmet part stands at the top with its reason, and a missing engine with its own."""
    document = copy.deepcopy(compressed.document)
    document["contract"].update(met=False, unmet=["latency"], why={"latency": "p95 is 9 ms"})
    document["engines"].append(
        {
            "profile": "jetson-agx-xavier", "builder": "tensorrt",
            "version": None, "target": "sm_72", "built": False, "executed": False,
            "why": "no driver here", "changes": ["opset lowered"], "not_on_dla": {"normal": "no such layer"},
            "layers_why": None, "layers": [
                {"name": "fused", "kind": "gemm", "inputs": ["int8"], "outputs": ["fp16"], "nodes": ["a"]}
            ],
        }
    )  # fmt: skip
    document["chosen"]["pruning"] = None
    text = " ".join(Page(render(Report.model_validate(document))).words)
    for words in (
        "The contract is not met: latency",
        "p95 is 9 ms",
        "no driver here",
        "opset lowered",
        "normal",
        "int8 → fp16",
    ):
        assert words in text


def test_names_are_escaped(compressed: Compressed) -> None:
    """A model whose name is markup is shown, not executed."""
    evil = "<script>alert(1)</script>"
    document = {**compressed.document, "model": evil, "evaluated_on": evil}
    html = render(Report.model_validate(document))
    assert evil not in html
    assert "&lt;script&gt;" in html


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: d.update(extra=1),
        lambda d: d["chosen"].update(precision="int4"),
        lambda d: d["baseline"].pop("macs"),
        lambda d: d["stages"][0].update(seconds="long"),
    ],
)
def test_a_malformed_document_is_never_written(compressed: Compressed, spoil: Any) -> None:
    """A wrong or unknown key is an error in edgekit, not a report."""
    document = copy.deepcopy(compressed.document)
    spoil(document)
    with pytest.raises(ValidationError):
        Report.model_validate(document)


def test_reading_and_writing_changes_nothing(compressed: Compressed) -> None:
    """The document survives its own type, and the schema agrees."""
    again = json.loads(Report.model_validate(compressed.document).model_dump_json())
    assert again == compressed.document
    jsonschema.validate(again, SCHEMA)
