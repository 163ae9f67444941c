"""What a peer is: how it is installed, started, asked and understood."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from serving import wire
from serving.models import Model
from serving.server import Launch, Server, ServerError
from serving.venvs import Environment

Array = np.ndarray[Any, Any]

APPS = Path(__file__).parents[1] / "apps"

#: Starts a peer: (its own directory, the models that it shall serve).
Starter = Callable[[Path, Sequence[Model]], Launch]


@dataclass(frozen=True)
class Peer:
    """A server to compare with.

    Attributes:
        name: in the tables.
        environment: where it is installed.
        package: whose release is reported.
        launch: how it is started.
        request: one row for a model, as bytes to send.
        decode: the row that an answer holds.
        is_floor: a bare minimum that shows what is possible, not a product.
        speaks_oip: whether it takes the Open Inference Protocol's binary tensors.
    """

    name: str
    environment: Environment
    package: str
    launch: Starter
    request: Callable[[Model], bytes]
    decode: Callable[[wire.Answer, Model], Array]
    is_floor: bool = False
    speaks_oip: bool = field(default=False)


def verify(peer: Peer, server: Server, model: Model, ask: Callable[[Any, bytes], bytes]) -> None:
    """Check that a peer gives the right answer before it is timed.

    Raises:
        ServerError: it does not.
    """
    answer = wire.parse(ask(server.address, peer.request(model)))
    if answer.status != 200:
        raise ServerError(f"{peer.name} answers {model.name} with {answer.status}: {answer.body[:200]!r}")
    if not np.allclose(peer.decode(answer, model), model.answer, rtol=1e-3, atol=1e-3):
        raise ServerError(f"{peer.name} answers {model.name} wrongly")


def app_environment(models: Sequence[Model]) -> dict[str, str]:
    """Environment variables of a peer's application in ``apps/``."""
    described = {m.name: {"path": str(m.path), "shape": list(m.row.shape[1:])} for m in models}
    return {"PYTHONPATH": str(APPS), "BENCH_MODELS": json.dumps(described)}
