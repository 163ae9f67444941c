"""Latencies of a device that is reached over SSH: graphs go there, times come back, nothing stays."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.deploy import ssh
from edgekit.deploy.connection import refusal
from edgekit.errors import Missing
from edgekit.measure import latency
from edgekit.measure.device import Timed
from edgekit.measure.latency import Latency
from edgekit.tensors import Arrays, write_npz

_REMOTE_COMMAND = ("edgekit-agent", "measure")
_TIMEOUT_S = 1800


@dataclass(frozen=True)
class SshDevice:
    """A device with the agent installed; see ``edgekit.measure.device.Device``.

    Args:
        address: ``ssh://[user@]host[:port]``.
        options: how ssh is started.
    """

    address: str
    options: ssh.SshOptions = field(default_factory=ssh.SshOptions)
    _described: dict[str, str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def digest(self) -> str:
        """Its name, architecture and runtime, as it says itself."""
        text = json.dumps({"address": self.address, **self._description()}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def machine(self) -> str:
        """Its architecture, as it says itself."""
        return self._description()["machine"]

    def time(
        self, graphs: Mapping[str, Timed], *, runs: int, warmup: int, threads: int
    ) -> dict[str, Latency]:
        """Time the graphs there, in turns.

        Args:
            graphs: by name.
            runs: timed runs of each.
            warmup: runs of each before the clock starts.
            threads: of the device; what this machine has says nothing of it, so the agent decides where the
                recipe does not.

        Raises:
            Missing: there is no ssh here, the device cannot be reached, or has no agent.
            DeviceRefused: a graph does not run there.
        """
        answer = self._ask(graphs, runs, warmup, threads)
        where = f"{self.address}: {answer['node']}, {answer['machine']}, {answer['runtime']}"
        return {
            name: latency.summary(answer["times_ms"][name], timed.batch, _said(where, timed))
            for name, timed in graphs.items()
        }

    def _description(self) -> dict[str, str]:
        if not self._described:
            answer = self._ask({"nothing": _nothing()}, 1, 0, 1)
            self._described.update({key: answer[key] for key in ("machine", "node", "runtime")})
        return self._described

    def _ask(self, graphs: Mapping[str, Timed], runs: int, warmup: int, threads: int) -> dict[str, Any]:
        files = [(_file(timed.graph), _arrays(timed.inputs)) for timed in graphs.values()]
        request = {
            "graphs": [
                {"name": name, "graph_bytes": len(graph), "inputs_bytes": len(inputs)}
                for name, (graph, inputs) in zip(graphs, files, strict=True)
            ],
            "runs": runs,
            "warmup": warmup,
            "threads": threads,
        }
        body = json.dumps(request).encode() + b"\n" + b"".join(part for pair in files for part in pair)
        command = ssh.command(ssh.parse(self.address), self.options, _REMOTE_COMMAND)
        try:
            done = subprocess.run(command, input=body, capture_output=True, timeout=_TIMEOUT_S, check=False)
        except FileNotFoundError as error:
            raise ssh.no_ssh() from error
        except subprocess.TimeoutExpired as error:
            raise Missing(
                f"{self.address} did not finish measuring",
                f"half an hour passed for {len(files)} graphs",
                "lower measure.runs, or see what else the device does",
            ) from error
        return self._answer(done)

    def _answer(self, done: subprocess.CompletedProcess[bytes]) -> dict[str, Any]:
        for line in reversed(done.stdout.splitlines()):  # a login shell may print something before
            try:
                answer = json.loads(line)
            except ValueError:
                continue
            if isinstance(answer, dict) and answer.get("ok") is True:
                result: dict[str, Any] = answer["result"]
                return result
            if isinstance(answer, dict) and answer.get("ok") is False:
                raise refusal(answer)
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise Missing(
            f"{self.address} cannot measure",
            said[-1] if said else f"ssh ended with code {done.returncode}",
            "see that `ssh HOST edgekit-agent measure` starts there: it waits for a request",
        )


def _said(where: str, timed: Timed) -> str:
    return where if timed.behind is None else f"{where}, without the post-processing"


def _file(graph: Path | bytes) -> bytes:
    return graph if isinstance(graph, bytes) else graph.read_bytes()


def _arrays(inputs: Arrays) -> bytes:
    written = io.BytesIO()
    write_npz(written, inputs)
    return written.getvalue()


def _nothing() -> Timed:
    """The smallest graph, to be told what the device is."""
    from onnx import TensorProto, helper

    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "nothing", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    return Timed(model.SerializeToString(), {"x": np.zeros(1, np.float32)})
