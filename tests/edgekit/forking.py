"""Forks a real ``edgekit`` process for every request, from a parent that has the libraries imported already.

The tests kill and interrupt many runs; importing torch anew for each of them would take most of the time.
Reads one JSON object a line: ``argv``, ``cwd``, ``out`` and ``err`` (files), ``env``. Prints the process's id
when it runs and its exit code when it ended (minus the signal, where one killed it).
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from typing import Any

from edgekit import cli


def import_everything() -> None:
    """Import what a compression needs, the exporter's inside included; starts no threads."""
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401
    import torch

    from edgekit.stages.registry import STAGES

    for stage in STAGES.values():
        stage.load()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(torch.nn.Linear(2, 2), (torch.zeros(2, 2),), dynamo=True, verbose=False)


def be_edgekit(request: dict[str, Any]) -> None:
    """Become ``edgekit ARGV``; never returns."""
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    for target, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), target)
    sys.argv = ["edgekit", *request["argv"]]
    code: Any = 1
    try:
        cli.main()
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve() -> None:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints while it is imported is no answer
    import_everything()
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            be_edgekit(request)
        answers.write(f"{pid}\n")
        answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n")


if __name__ == "__main__":
    serve()
