"""An open loop of clients for ``agent_serving.py``: ``python3 load.py HOST:PORT REQUEST RATE SECONDS``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from serving.open_loop import poisson, send
from serving.wire import post


def main() -> None:
    """Send at the rate, and print what became of it."""
    address, path, rate, seconds = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])
    host, _, port = address.rpartition(":")
    outcome = send((host, int(port)), _request(path), poisson(rate, seconds, seed=0), grace_s=2.0)
    latencies_ms = 1e3 * np.array([*outcome.latencies_s, *outcome.unanswered_s] or [np.inf])
    bad = outcome.failed + outcome.lost + len(outcome.refused_s) + len(outcome.unanswered_s)
    print(
        json.dumps(
            {
                "rate": rate,
                "answered": len(outcome.latencies_s),
                "bad": bad,
                "held": bad == 0 and len(outcome.latencies_s) >= 0.98 * rate * seconds * 0.95,
                "p50_ms": float(np.median(latencies_ms)),
                "p99_ms": float(np.quantile(latencies_ms, 0.99)),
            }
        )
    )


def _request(path: Path) -> bytes:
    head, tail = [], b""
    for name, (dtype, values) in json.loads(path.read_text()).items():
        array = np.array(values, dtype)
        datatype = {"int64": "INT64", "float32": "FP32"}[dtype]
        parameters = {"binary_data_size": array.nbytes}
        head.append(
            {"name": name, "datatype": datatype, "shape": list(array.shape), "parameters": parameters}
        )
        tail += array.tobytes()
    described = json.dumps({"inputs": head, "parameters": {"binary_data_output": True}}).encode()
    length = f"Inference-Header-Content-Length: {len(described)}\r\n"
    return post("/v2/models/deep/infer", described + tail, "application/octet-stream", length)


if __name__ == "__main__":
    main()
