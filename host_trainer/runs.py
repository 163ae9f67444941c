"""Runs side by side: how far they came, what they reached, and in which settings they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from host_trainer.errors import ConfigError
from host_trainer.folder import read_json, read_summary
from host_trainer.record import last_metrics


@dataclass(frozen=True)
class Listed:
    """A run.

    Attributes:
        run: its directory.
        state: see ``folder.Summary``.
        step: steps done, of ``total_steps``.
        total_steps: steps of the whole run.
        seconds: of the process that wrote the summary.
        metrics: the last of each number that was recorded, such as ``train/loss`` and ``eval/accuracy``.
        revision: of the code, as git names it; None outside of a repository.
        settings: keys in which the listed runs differ.
    """

    run: str
    state: str
    step: int
    total_steps: int
    seconds: float
    metrics: dict[str, float | None]
    revision: str | None
    settings: dict[str, Any]


def find(directories: Sequence[Path]) -> list[Listed]:
    """The runs in these directories: each a run itself, or a directory of runs.

    Raises:
        ConfigError: there is none.
    """
    paths = [path for directory in directories for path in _runs_in(directory)]
    if not paths:
        where = ", ".join(str(directory) for directory in directories)
        raise ConfigError(
            f"there is no run in {where}", "no config.json and run.json", "name a run directory"
        )
    settings = [_flat(read_json(path / "config.json")) for path in paths]
    differing = _differing(settings)
    return [
        _listed(path, {key: own.get(key) for key in differing})
        for path, own in zip(paths, settings, strict=True)
    ]


def _runs_in(directory: Path) -> list[Path]:
    if _is_run(directory):
        return [directory]
    return sorted(path for path in directory.iterdir() if _is_run(path)) if directory.is_dir() else []


def _is_run(path: Path) -> bool:
    return (path / "config.json").is_file() and (path / "run.json").is_file()


def _listed(path: Path, settings: dict[str, Any]) -> Listed:
    summary = read_summary(path)
    git = read_json(path / "environment.json").get("git") or {}
    return Listed(
        run=str(path),
        state=summary.state,
        step=summary.step,
        total_steps=summary.total_steps,
        seconds=summary.seconds,
        metrics=last_metrics(path),
        revision=git.get("revision"),
        settings=settings,
    )


def _flat(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _differing(settings: Sequence[dict[str, Any]]) -> list[str]:
    keys = {key: None for own in settings for key in own}
    return [
        key for key in keys if key != "run" and any(own.get(key) != settings[0].get(key) for own in settings)
    ]
