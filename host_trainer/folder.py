"""The directory of a run: what was asked for, where it ran, how it went.

``config.json``, ``environment.json``, ``run.json`` (state and results), ``metrics.jsonl``, ``tensorboard/``,
``checkpoints/``, ``model/`` (the result) and, after an explosion, ``diverged/``.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from host_trainer.config import Config
from host_trainer.errors import ConfigError

_LIBRARIES = ("torch", "accelerate", "transformers", "peft", "safetensors", "numpy")
#: A run that goes on must agree in these: the steps would be others.
_FIXED = ("seed", "model.source", "data.train", "optimize.batch_size", "optimize.epochs", "lora", "distill")
_MAX_JSON_BYTES = 16 << 20


@dataclass(frozen=True)
class Summary:
    """How a run went.

    Attributes:
        state: running, finished, diverged, failed or interrupted.
        step: steps done.
        total_steps: steps of the whole run.
        seconds: of the process that wrote this, which may have continued the run.
        processes: that trained.
        results: the last numbers, such as ``eval/loss``.
        why: what ended it early, empty otherwise.
    """

    state: str
    step: int = 0
    total_steps: int = 0
    seconds: float = 0.0
    processes: int = 1
    results: dict[str, float] = field(default_factory=dict)
    why: str = ""


def begin(config: Config) -> bool:
    """Make the directory, or check that it is of the same run; gives whether it was there.

    Raises:
        ConfigError: it holds another run, or something else.
    """
    run = config.run
    document = config.model_dump(mode="json")
    if (run / "config.json").is_file():
        before = read_json(run / "config.json")
        for key in _FIXED:
            was, now = _get(before, key), _get(document, key)
            if was != now:
                raise ConfigError(
                    f"{run} holds a run with another {key}", f"it began with {was!r}, and now it is {now!r}",
                    "give another run directory, or the old value",
                )  # fmt: skip
    elif run.exists() and any(run.iterdir()):
        raise ConfigError(
            f"{run} is not empty, and no run", "it has no config.json", "give another directory"
        )
    continued = (run / "config.json").is_file()
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / "config.json", document)
    write_json(run / "environment.json", environment())
    return continued


def environment() -> dict[str, Any]:
    """Where the run is: versions, the processor, the GPUs, the revision of the code that is trained."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "command": sys.argv,
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "versions": {name: _version(name) for name in _LIBRARIES},
        "git": _git(),
    }


def save_summary(run: Path, summary: Summary) -> None:
    """Replace ``run.json``."""
    write_json(run / "run.json", asdict(summary))


def read_summary(run: Path) -> Summary:
    """Read ``run.json``.

    Raises:
        ConfigError: it is damaged.
    """
    document = read_json(run / "run.json")
    if not isinstance(document.get("state"), str):
        raise ConfigError(f"{run / 'run.json'} is damaged", "it has no 'state'", "give other run directories")
    known = {part.name for part in fields(Summary)}
    return Summary(**{name: value for name, value in document.items() if name in known})


def write_json(path: Path, document: Any) -> None:
    """Replace a file, whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a file of a run: a JSON object.

    Raises:
        ConfigError: it is damaged.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"larger than {_MAX_JSON_BYTES} bytes")
        document = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict):
            raise ValueError("it holds no JSON object")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read", str(error), "give another run directory") from error
    return document


def _get(document: Any, key: str) -> Any:
    for part in key.split("."):
        document = document.get(part) if isinstance(document, dict) else None
    return document


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Revision of the working directory and whether it was changed since; None outside of a repository."""
    try:
        head, changes = (
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
            for command in (["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "-uno"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"revision": head, "changed": bool(changes)}
