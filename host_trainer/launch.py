"""Starting the processes of a run: one, several on a machine, or several machines that find each other.

torchrun's own launcher does it, with its binding of each process to the memory node of its GPU.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from host_trainer import config as configuration
from host_trainer.__main__ import ERROR_FILE, INTERRUPTED
from host_trainer.config import Config
from host_trainer.errors import ConfigError, TrainingError


def launch(path: Path, overrides: Sequence[str], section: str = "") -> int:
    """Train, and give the exit code of the processes: 0, or ``INTERRUPTED``.

    Args:
        path: the configuration.
        overrides: as ``config.load`` takes them.
        section: that the configuration has to have.

    Raises:
        TrainingError: what one of the processes reported, or the section is missing.
    """
    config = configuration.load(path, overrides)
    if section and getattr(config, section) is None:
        raise ConfigError(
            f"{path} has no section [{section}]", "it describes another kind of training",
            "add it, or use `edgekit train`",
        )  # fmt: skip
    processes = config.parallel.processes or _visible_gpus(config)
    configuration.check_processes(config, processes * config.parallel.nodes)
    arguments = ["-m", "host_trainer", str(path), *overrides]
    with tempfile.TemporaryDirectory(prefix="host-trainer-") as temporary:
        error_file = Path(temporary) / "error.json"
        os.environ[ERROR_FILE] = str(error_file)
        try:
            if processes * config.parallel.nodes == 1:
                code = _one(arguments)
            else:
                code = _several(config, processes, arguments)
        finally:
            del os.environ[ERROR_FILE]
        if error_file.is_file():
            raise _reported(error_file)
    if code not in (0, INTERRUPTED):
        raise TrainingError(
            "a training process ended without a word", f"its exit code is {code}",
            "look at what it printed above; out of memory, the system ends it with -9",
        )  # fmt: skip
    return code


def _one(arguments: Sequence[str]) -> int:
    """Run it, and let it be the one that hears Ctrl-C and SIGTERM: it writes a checkpoint before it ends."""
    with subprocess.Popen([sys.executable, *arguments]) as process:
        before = signal.signal(signal.SIGTERM, lambda _number, _frame: process.terminate())
        try:
            while True:
                try:
                    return process.wait()
                except KeyboardInterrupt:
                    continue
        finally:
            signal.signal(signal.SIGTERM, before)


def _several(config: Config, processes: int, arguments: Sequence[str]) -> int:
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    from torch.numa.binding import AffinityMode, NumaOptions

    # The launcher's report repeats what the processes said.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    parallel = config.parallel
    bind = parallel.numa and parallel.device != "cpu" and _memory_nodes() > 1 and _visible_gpus(config) > 1
    settings = LaunchConfig(
        min_nodes=parallel.nodes,
        max_nodes=parallel.nodes,
        nproc_per_node=processes,
        run_id=parallel.job,
        rdzv_backend="c10d",
        rdzv_endpoint=parallel.rendezvous or "127.0.0.1:0",
        max_restarts=0,
        numa_options=NumaOptions(affinity_mode=AffinityMode.NODE) if bind else None,
    )
    # torchrun does the same: otherwise each process would take every core for itself.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    try:
        elastic_launch(settings, entrypoint=sys.executable)("-u", *arguments)
    except ChildFailedError as error:
        return int(next(iter(error.failures.values())).exitcode)
    except SignalException:  # the launcher has told the processes, and waited for them
        return INTERRUPTED
    return 0


def _visible_gpus(config: Config) -> int:
    if config.parallel.device == "cpu":
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def _memory_nodes() -> int:
    return len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))


def _reported(error_file: Path) -> TrainingError:
    said = json.loads(error_file.read_text(encoding="utf-8"))
    error = TrainingError(said["what"], said["why"], said["fix"])
    error.exit_code = said["exit_code"]
    return error
