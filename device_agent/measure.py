"""``edgekit-agent measure``: time graphs on this device, for ``edgekit compress --measure-on ssh://...``.

Standard input is one line of JSON and the files that it announces, in this order:

    {"graphs": [{"name": "a", "graph_bytes": 9, "inputs_bytes": 9}], "runs": 200, "warmup": 20, "threads": 0}

Standard output is one line of JSON: the times of single runs in milliseconds, by name, and what ran them. The
graphs take turns, run by run, so that a slow minute slows them all. Nothing is kept on the device.
"""

from __future__ import annotations

import gc
import json
import platform
import time
from pathlib import Path
from typing import Any, BinaryIO, Dict, List, Mapping, Tuple

import numpy as np
import onnxruntime

from device_agent import json_text
from device_agent.engines import external_data
from device_agent.engines.onnxruntime import exact_session
from device_agent.errors import AgentError, BadInput, Refused
from device_agent.temporary import OwnDirectory

_MAX_LINE_BYTES = 1 << 20
_MAX_FILE_BYTES = 2 << 30
_MAX_GRAPHS = 4096
_MAX_RUNS = 100_000
_BLOCK_BYTES = 1 << 20

Feed = Mapping[str, "np.ndarray[Any, Any]"]


def run(source: BinaryIO, sink: BinaryIO) -> int:
    """Do what ``source`` asks, and answer on ``sink``.

    Returns:
        0, or the exit code of the error that is then the answer.
    """
    try:
        answer: Dict[str, Any] = {"ok": True, "result": _measure(source)}
        code = 0
    except AgentError as error:
        answer = {"ok": False, "what": error.what, "why": error.why, "fix": error.fix}
        code = error.exit_code
    sink.write(json.dumps(answer).encode() + b"\n")
    sink.flush()
    return code


def _measure(source: BinaryIO) -> Dict[str, Any]:
    request = _request(source.readline(_MAX_LINE_BYTES))
    with OwnDirectory("measure") as home:
        work = []
        for number, entry in enumerate(request["graphs"]):
            graph, inputs = Path(home, f"{number}.onnx"), Path(home, f"{number}.npz")
            _receive(source, graph, entry["graph_bytes"])
            _receive(source, inputs, entry["inputs_bytes"])
            work.append((entry["name"], *_opened(graph, inputs, request["threads"])))
        times_ms = _in_turns(work, request["runs"], request["warmup"])
    return {
        "times_ms": times_ms,
        "machine": platform.machine(),
        "node": platform.node(),
        "runtime": f"onnxruntime {onnxruntime.__version__}",
    }


def _in_turns(work: List[Tuple[str, Any, Feed]], runs: int, warmup: int) -> Dict[str, List[float]]:
    times_ms: Dict[str, List[float]] = {name: [] for name, _, _ in work}
    try:
        for _ in range(warmup):
            for _, session, feed in work:
                session.run(None, feed)
        gc.disable()  # a collection in one graph's turn would be charged to it
        for _ in range(runs):
            for name, session, feed in work:
                begin = time.perf_counter()
                session.run(None, feed)
                times_ms[name].append((time.perf_counter() - begin) * 1e3)
    except Exception as error:  # ONNX Runtime's own exceptions share no base class
        raise _not_run(error) from error
    finally:
        gc.enable()
    return times_ms


def _opened(graph: Path, inputs: Path, threads: int) -> Tuple[Any, Feed]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # The idle threads of one session would otherwise spin on into the next one's turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    external_data.check(graph)
    try:
        session = exact_session(graph, options, ["CPUExecutionProvider"])
    except Exception as error:  # as above
        raise _not_run(error) from error
    try:
        with np.load(str(inputs), allow_pickle=False) as data:
            feed = {name: data[name] for name in data.files}
    except (OSError, ValueError) as error:
        raise BadInput("the inputs are not a .npz file", str(error), "send what numpy.savez wrote") from error
    return session, feed


def _not_run(error: Exception) -> Refused:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return Refused(
        f"ONNX Runtime {onnxruntime.__version__} on this device does not run a graph",
        lines[0],
        "make it for this device's profile",
    )


def _receive(source: BinaryIO, path: Path, size_bytes: int) -> None:
    with path.open("wb") as file:
        missing = size_bytes
        while missing:
            block = source.read(min(missing, _BLOCK_BYTES))
            if not block:
                raise BadInput(
                    "the request ended early", f"{missing} bytes of a file are missing", "send it again"
                )
            file.write(block)
            missing -= len(block)


def _request(line: bytes) -> Dict[str, Any]:
    try:
        request = json_text.loads(line)
        graphs = [
            {
                "name": str(entry["name"]),
                "graph_bytes": _whole(entry["graph_bytes"], _MAX_FILE_BYTES),
                "inputs_bytes": _whole(entry["inputs_bytes"], _MAX_FILE_BYTES),
            }
            for entry in request["graphs"]
        ]
        if not 0 < len(graphs) <= _MAX_GRAPHS:
            raise ValueError(f"{len(graphs)} graphs; 1 to {_MAX_GRAPHS} are taken")
        return {
            "graphs": graphs,
            "runs": _whole(request["runs"], _MAX_RUNS) or 1,
            "warmup": _whole(request["warmup"], _MAX_RUNS),
            "threads": _whole(request["threads"], 1024),
        }
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(
            "the request to measure is malformed",
            f"{type(error).__name__}: {error}",
            "use an edgekit of the agent's own version",
        ) from error


def _whole(value: Any, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise ValueError(f"{value!r} is no whole number from 0 to {most}")
    return value
