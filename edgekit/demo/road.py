"""``edgekit demo``: the whole road on real data, with the same functions that the other commands call.

Train -> prune -> recover -> export -> calibrate -> build -> measure -> bundle -> sign -> deploy -> serve.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit import compress as job
from edgekit import ort, sign
from edgekit.artifact import disk_full_is_an_error
from edgekit.bench.client import Client
from edgekit.bench.local_agent import running
from edgekit.deploy import local
from edgekit.report.document import Report
from edgekit.run import Progress, StageRecord

if TYPE_CHECKING:
    from edgekit.demo.digits import Split

PROFILE = "x86-cpu"
MAX_DROP = 0.012
REQUESTS = 200
MODEL = "edgekit.demo.digits:build"


@dataclass(frozen=True)
class Served:
    """What the local agent did.

    Attributes:
        requests: sent, one at a time, at batch 1.
        identical: how many answers equal ONNX Runtime's own, bit for bit.
        p50_ms, p99_ms: from sending a request to its whole answer.
    """

    requests: int
    identical: int
    p50_ms: float
    p99_ms: float


def drive(seed: int, out: Path, progress: Progress, say: Callable[[str], None]) -> tuple[Report, Served]:
    """Do everything below ``out``; a second call with the same seed reuses what is there.

    Raises:
        EdgekitError: as the commands that it stands for.
    """
    weights, calib, held_out = trained(seed, out / f"seed-{seed}", progress)
    overrides = {"seed": seed, "contract.max_drop": MAX_DROP, "release.name": "digits"}
    request = job.Request(
        MODEL, (PROFILE,), str(calib), weights, str(held_out), None, None, overrides, out / "bundle"
    )
    report = job.compress(job.prepare(request), out / "work", progress)
    say("deploying to a local agent")
    served = _serve(report, held_out, out / "keys" / "demo", say)
    return report, served


def trained(seed: int, home: Path, progress: Progress) -> tuple[Path, Path, Path]:
    """Weights and data files; trained once, and kept."""
    from safetensors.torch import save as serialized

    from edgekit.demo import digits

    weights, calib, held_out = (home / name for name in ("digits.safetensors", "calib.npz", "held_out.npz"))
    if weights.exists():
        return weights, calib, held_out
    home.mkdir(parents=True, exist_ok=True)
    with disk_full_is_an_error(home):
        data: tuple[Split, Split] = digits.load(seed)
        data[0].save(calib)
        data[1].save(held_out)
        model, record = _timed(
            lambda: digits.train(data[0], seed, lambda step, steps, _: progress.tick(step, steps)), progress
        )
        progress.end(record)
        unfinished = weights.with_suffix(".tmp")
        unfinished.write_bytes(serialized(model.state_dict()))
        unfinished.replace(weights)
    return weights, calib, held_out


def _timed(train: Callable[[], Any], progress: Progress) -> tuple[Any, StageRecord]:
    import time

    progress.begin("train")
    begin = time.perf_counter()
    result = train()
    return result, StageRecord("train", time.perf_counter() - begin, cached=False, peak_rss_bytes=None)


def _serve(report: Report, held_out: Path, key_name: Path, say: Callable[[str], None]) -> Served:
    """Sign the bundle, deploy it to an agent of its own, and compare answers with ONNX Runtime's."""
    bundle = Path(report.bundle.file)
    key, public = key_name.with_suffix(".key"), key_name.with_suffix(".pub")
    if not key.exists():
        key_name.parent.mkdir(parents=True, exist_ok=True)
        sign.keygen(key_name)
    sign.sign(bundle, key)
    with tempfile.TemporaryDirectory(prefix="edgekit-") as temporary:
        home = Path(temporary)
        (home / "keys").mkdir()
        shutil.copyfile(public, home / "keys" / public.name)
        with running(home, home / "keys") as agent:
            deployed = local.deploy(bundle, agent.control, say)
            with Client(agent.host, agent.port, deployed.name) as client:
                return _ask(client, Path(report.bundle.path) / "model.onnx", held_out)


def _ask(client: Client, graph: Path, held_out: Path) -> Served:
    import numpy as np

    with np.load(held_out, allow_pickle=False) as data:
        images = data["image"][:REQUESTS]
    session = ort.Session(graph)
    identical, times_ms = 0, []
    for image in images:
        answer, took_ms = client.infer({"image": image[None]})
        expected = session.run({"image": image[None]})
        identical += int(all(np.array_equal(answer[name], value) for name, value in expected.items()))
        times_ms.append(took_ms)
    p50_ms, p99_ms = (float(value) for value in np.quantile(times_ms, (0.5, 0.99)))
    return Served(len(times_ms), identical, p50_ms, p99_ms)
