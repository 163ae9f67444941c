"""The agent that is soaked: four models, small limits, and a swap or an unload every second."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from device_agent.server import control
from serving import client, wire
from serving.bundles import write_bundle
from serving.models import Array, Model, open_session, write_models, write_variant
from serving.peers.ours import Site, agent_command, agent_variables, make_site
from serving.server import Launch
from serving.venvs import Environment

MAX_BODY_BYTES = 1 << 20
HEADER_TIMEOUT_S = 2.0
LIMITS = (
    f"[limits]\nmax_body_bytes = {MAX_BODY_BYTES}\nheader_timeout_s = {HEADER_TIMEOUT_S}\n"
    "idle_timeout_s = 4\nmax_queue_size = 64\n[grpc]\nenabled = true\nport = 0\n"
)
FRAGILE_ROWS = 8
_FRAGILE_WIDTH = 4
_OPSET = 17
_IR_VERSION = 8


@dataclass(frozen=True)
class Here:
    """This interpreter, where an environment is asked for."""

    python: Path = Path(sys.executable)


@dataclass(frozen=True)
class Soaked:
    """The models, as clients know them.

    Attributes:
        models: by name; ``tiny`` is the first of its two versions.
        answers: by name and version, what ONNX Runtime alone makes of the model's row.
        digests: of the two versions of ``tiny``.
        site: the agent's files.
    """

    models: Mapping[str, Model]
    answers: Mapping[tuple[str, str], Array]
    digests: Sequence[str]
    site: Site


def prepare(work: Path, environment: Environment | Here) -> Soaked:
    """Write models and configuration, and install the models."""
    site = make_site(work)
    with site.config.open("a") as config:
        config.write(LIMITS)
    models = write_models(work)
    tiny, other, cnn = models["tiny"], write_variant(work, seed=7), models["cnn"]
    spare, fragile = write_variant(work, seed=8), _write_fragile(work)
    digests = [
        _install(environment, site, work, tiny, "tiny", 1),
        _install(environment, site, work, other, "tiny", 2),
    ]
    for name, model in (("cnn", cnn), ("spare", spare), ("fragile", fragile)):
        _install(environment, site, work, model, name, 1)
    answers = {("tiny", "1"): tiny.answer, ("tiny", "2"): other.answer, ("cnn", "1"): cnn.answer}
    answers |= {("spare", "1"): spare.answer, ("fragile", "1"): fragile.answer}
    return Soaked({"tiny": tiny, "cnn": cnn, "spare": spare, "fragile": fragile}, answers, digests, site)


def launch(soaked: Soaked, environment: Environment | Here) -> Launch:
    """How the agent is started."""
    return Launch(agent_command(environment, soaked.site, "serve"), soaked.site.port, agent_variables())  # type: ignore[arg-type]


def address_of(door: str, log: Path) -> client.Address:
    """Where the agent said that it serves ``metrics`` or ``grpc``."""
    match = re.search(rf"{door}=(\S+):(\d+)", log.read_text())
    if match is None:
        raise RuntimeError(f"the agent did not say where its {door} is")
    return match.group(1), int(match.group(2))


def _install(
    environment: Environment | Here, site: Site, work: Path, model: Model, name: str, version: int
) -> str:
    from serving.peers.ours import install

    bundle = write_bundle(work, model, name, version)
    return install(environment, site, bundle.directory)  # type: ignore[arg-type]


def _write_fragile(work: Path) -> Model:
    """A model that looks rows up in a table, and fails where there is no such row."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    table = np.arange(FRAGILE_ROWS * _FRAGILE_WIDTH, dtype=np.float32).reshape(FRAGILE_ROWS, _FRAGILE_WIDTH)
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["x"], ["index"], to=TensorProto.INT64),
            helper.make_node("Gather", ["table", "index"], ["y"]),
        ],
        "fragile",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 1, _FRAGILE_WIDTH])],
        [numpy_helper.from_array(table, "table")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)])
    model.ir_version = _IR_VERSION
    path = work / "fragile.onnx"
    onnx.save(model, str(path))
    row = np.array([[3.0]], np.float32)
    return Model("fragile", path, row, open_session(path).run(["y"], {"x": row})[0])


class Upheaval(threading.Thread):
    """Swaps ``tiny``, and unloads and loads ``spare``, until told to stop."""

    def __init__(self, soaked: Soaked, address: client.Address, pause_s: float) -> None:
        super().__init__(daemon=True)
        self.swaps = self.loads = 0
        self.failure: Exception | None = None
        self._soaked = soaked
        self._address = address
        self._pause_s = pause_s
        self._stopping = threading.Event()

    def run(self) -> None:
        """Go on until :meth:`stop`."""
        try:
            while not self._stopping.wait(self._pause_s):
                self._swap()
                self._reload()
        except Exception as error:  # handed to the soak, which reports it
            self.failure = error

    def stop(self) -> None:
        """Finish the current one; every model serves then."""
        self._stopping.set()
        self.join()

    def _swap(self) -> None:
        message: dict[str, Any] = {"op": "activate", "digest": self._soaked.digests[(self.swaps + 1) % 2]}
        control.request(self._soaked.site.control, message, lambda state: None)
        self.swaps += 1

    def _reload(self) -> None:
        for verb in ("unload", "load"):
            request = wire.post(f"/v2/repository/models/spare/{verb}", b"{}", "application/json")
            status = wire.parse(client.ask(self._address, request)).status
            if status != 200:
                raise RuntimeError(f"{verb} was answered with {status}")
        self.loads += 1
