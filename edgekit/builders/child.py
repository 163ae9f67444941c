"""Questions to a library in a process of its own: what makes it crash costs an answer, not the run.

The parent calls ``ask``. The child is a module that is run with ``python -m`` and calls ``serve``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Json = Mapping[str, Any]


def ask(module: str, jobs: Sequence[Json], timeout_s: float) -> tuple[list[dict[str, Any]], str]:
    """Let one process answer the jobs in turn.

    Returns:
        The answers: all of them, or those up to the one that it did not survive; and how it ended.
    """
    with tempfile.TemporaryDirectory(prefix="edgekit-") as temporary:
        questions, answers = Path(temporary, "jobs.json"), Path(temporary, "answers.jsonl")
        questions.write_text(json.dumps(list(jobs)))
        answers.touch()
        try:
            ended = subprocess.run(
                [sys.executable, "-m", module, str(questions), str(answers)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=timeout_s,
                check=False,
            )
            how = f"died with exit code {ended.returncode}"
        except subprocess.TimeoutExpired:
            how = f"took more than {timeout_s:g} s"
        return [json.loads(line) for line in answers.read_text().splitlines()], how


def serve(answer: Callable[[dict[str, Any]], Json]) -> None:
    """Answer the jobs in the file that the command line names, a line each."""
    jobs = json.loads(Path(sys.argv[1]).read_text())
    with Path(sys.argv[2]).open("a", encoding="utf-8") as stream:
        for job in jobs:
            stream.write(json.dumps(answer(job)) + "\n")
            stream.flush()
