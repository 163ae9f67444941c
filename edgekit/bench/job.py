"""``edgekit bench``: what a finished bundle takes here, on a device, or on an agent that serves it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from edgekit import sign
from edgekit.bench import engine, golden, served
from edgekit.bench.engine import EngineLatency
from edgekit.bench.local_agent import running
from edgekit.bench.served import Address, Served
from edgekit.bundle import OpenBundle, open_bundle
from edgekit.deploy import local
from edgekit.errors import BadInput
from edgekit.measure import latency

_BY_HTTP = "an agent is asked over HTTP, which times whole requests"
_BY_SSH = "the device is reached over SSH, which times the engine; an agent that serves is asked by http://"


@dataclass(frozen=True)
class Bench:
    """What was measured.

    Attributes:
        bundle: its path.
        name, digest, precision: of the bundle.
        engine: single runs in ONNX Runtime, by batch; None: not measured.
        served: requests to an agent, by the number of clients; None: not measured.
        why: of what was not measured, the reason.
    """

    bundle: str
    name: str
    digest: str
    precision: str
    engine: list[EngineLatency] | None
    served: list[Served] | None
    why: dict[str, str] = field(default_factory=dict)


def bench(bundle: Path, on: str | None, say: Callable[[str], None]) -> Bench:
    """Measure a bundle.

    Args:
        bundle: its directory or single file.
        on: None: this machine, with an agent of its own for the time being; ``ssh://[user@]host[:port]``: the
            engine there; ``http://host:port``: an agent that serves the bundle.
        say: told what is being done.

    Raises:
        EdgekitError: a bundle that is damaged, an address of another kind, or as the parts.
    """
    by_http = _http_address(on) if on and not on.startswith("ssh://") else None
    with open_bundle(bundle) as opened:
        expected = golden.load(opened.directory, opened.manifest)
        engines: list[EngineLatency] | None = None
        answers: list[Served] | None = None
        why: dict[str, str] = {}
        if by_http is not None:
            say(f"asking {by_http.where}")
            answers = served.measure(by_http, opened.manifest, opened.digest, expected, engine.RUNS)
            why["engine"] = _BY_HTTP
        elif on is not None:
            say(f"timing the engine on {on}")
            engines = engine.over_ssh(opened, expected, on)
            why["served"] = _BY_SSH
        else:
            say("timing the engine")
            engines = engine.here(opened, expected)
            say("serving it with an agent of its own")
            with _serving(opened) as address:
                answers = served.measure(address, opened.manifest, opened.digest, expected, engine.RUNS)
    manifest = opened.manifest
    return Bench(str(bundle), manifest.name, opened.digest, manifest.precision, engines, answers, why)


@contextmanager
def _serving(opened: OpenBundle) -> Iterator[Address]:
    """An agent that serves a copy of the bundle, signed with a key that lasts as long."""
    with tempfile.TemporaryDirectory(prefix="edgekit-") as temporary:
        home = Path(temporary)
        copy, keys = home / opened.manifest.name, home / "keys"
        shutil.copytree(opened.directory, copy)
        keys.mkdir()
        private, public = sign.keygen(home / "bench")
        public.rename(keys / public.name)
        sign.sign(copy, private)
        with running(home, keys) as agent:
            local.deploy(copy, agent.control, lambda state: None)
            yield Address(agent.host, agent.port, f"{latency.this_machine()}, an agent over loopback")


def _http_address(on: str) -> Address:
    try:
        parts = urlsplit(on)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if host is None or port is None or parts.scheme != "http" or parts.path not in ("", "/") or parts.query:
        raise BadInput(
            f"{on!r} is no place to measure on",
            "it is neither ssh://[user@]host[:port] nor http://host:port",
            "give one of these, or leave --on away for this machine",
        )
    return Address(host, port, f"http://{parts.netloc}")
