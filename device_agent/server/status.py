"""The metrics port: ``/metrics`` for Prometheus, and a status page for people at ``/``."""

from __future__ import annotations

import html

from device_agent import __version__
from device_agent.loaded import LoadedModel
from device_agent.metrics import Metrics
from device_agent.metrics_page import render
from device_agent.models import Models
from device_agent.server.connection import Connection
from device_agent.server.request import Request

_TEXT = b"text/plain; charset=utf-8"
_HTML = b"text/html; charset=utf-8"
_STYLE = "body{font:15px sans-serif;margin:2em}td,th{padding:.2em 1em .2em 0;text-align:left}"
_COLUMNS = ("model", "version", "digest", "runtime", "answered", "failed", "refused", "waiting", "mean ms")


class StatusRoutes:
    """The handler of the metrics port."""

    def __init__(self, models: Models, metrics: Metrics) -> None:
        self._models = models
        self._metrics = metrics

    def __call__(self, request: Request, connection: Connection) -> None:
        """Answer a request."""
        path = request.target.partition(b"?")[0]
        if request.method != "GET":
            connection.respond(405, [b"use GET\n"], _TEXT, b"Allow: GET\r\n")
        elif path == b"/metrics":
            content_type, body = render(self._metrics)
            connection.respond(200, [body], content_type.encode("ascii"))
        elif path == b"/":
            connection.respond(200, [self._page().encode()], _HTML)
        else:
            connection.respond(404, [b"there are / and /metrics\n"], _TEXT)

    def _page(self) -> str:
        head = "".join(f"<th>{column}</th>" for column in _COLUMNS)
        rows = "".join(self._row(loaded) for loaded in self._models.serving())
        return (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>edgekit-agent</title>'
            f"<style>{_STYLE}</style><h1>edgekit-agent {html.escape(__version__)}</h1>"
            f"<table><tr>{head}</tr>{rows}</table>"
            f'<p><a href="/metrics">metrics</a></p></html>\n'
        )

    def _row(self, loaded: LoadedModel) -> str:
        counters = self._metrics.of_model(loaded.manifest.name, loaded.digest)
        answered = counters.total_seconds.count
        mean_ms = f"{counters.total_seconds.total / answered * 1e3:.2f}" if answered else ""
        cells = (
            loaded.manifest.name,
            loaded.version,
            loaded.digest[:12],
            loaded.engine.runtime,
            str(answered),
            str(counters.failed),
            str(counters.refused),
            str(counters.queue_depth),
            mean_ms,
        )
        return "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
