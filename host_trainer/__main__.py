"""``python -m host_trainer CONFIG.toml [key=value ...]``: a training process, alone or one of torchrun's.

Exit codes: 0 done; 2 the configuration or the data is wrong, or the run exploded; 4 something is missing on
this machine; 130 interrupted. An error is three lines on standard error.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import NoReturn

from host_trainer import config as configuration
from host_trainer.errors import TrainingError

INTERRUPTED = 130
#: Names a file for the error of a process that torchrun started; torchrun itself tells only its exit code.
ERROR_FILE = "HOST_TRAINER_ERROR_FILE"


def main(arguments: list[str]) -> int:
    """Run and give the exit code."""
    if not arguments:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        config = configuration.load(Path(arguments[0]), arguments[1:])
        from host_trainer.saving import Interrupted
        from host_trainer.train import train

        try:
            train(config)
        except (Interrupted, KeyboardInterrupt):
            return INTERRUPTED
    except TrainingError as error:
        _report(error)
        return error.exit_code
    return 0


def _report(error: TrainingError) -> None:
    """Print the error, or leave it to the launcher, which prints it once for all processes."""
    path = os.environ.get(ERROR_FILE)
    if path is None:
        print(f"error: {error.what}\n  why: {error.why}\n  fix: {error.fix}", file=sys.stderr)
        return
    document = {"what": error.what, "why": error.why, "fix": error.fix, "exit_code": error.exit_code}
    partial = Path(f"{path}.{os.getpid()}")
    partial.write_text(json.dumps(document), encoding="utf-8")
    partial.rename(path)


def _leave(code: int) -> NoReturn:
    """End the process, with its work saved and its files closed.

    One of several does not wait for what native libraries do at the end: on a busy machine such a process,
    with all its work done, was seen to abort there ("terminate called without an active exception").
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        sys.exit(code)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _leave(main(sys.argv[1:]))
