"""All followers of an agent, started and stopped as one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Mapping

from device_agent import durable
from device_agent.follow.follower import Follower, work_directory
from device_agent.follow.settings import Follow
from device_agent.metrics import Metrics

if TYPE_CHECKING:
    from device_agent.lifecycle import Lifecycle

_log = logging.getLogger(__name__)


class Followers:
    """The followers of the models in ``[follow]``."""

    def __init__(
        self, follows: Mapping[str, Follow], state_dir: Path, lifecycle: Lifecycle, metrics: Metrics
    ) -> None:
        _remove_strangers(work_directory(state_dir, "any").parent, follows)
        self._followers = [
            Follower(name, follow, state_dir, lifecycle, metrics.of_follower(name))
            for name, follow in follows.items()
        ]

    def start(self) -> None:
        """Begin to look."""
        for follower in self._followers:
            follower.start()

    def stop(self) -> None:
        """Tell all to stop; returns at once."""
        for follower in self._followers:
            follower.stop()

    def join(self, timeout_s: float) -> None:
        """Wait for each a little."""
        for follower in self._followers:
            follower.join(timeout_s)

    def describe(self) -> Dict[str, Dict[str, Any]]:
        """Every follower for ``status``, by model."""
        return {follower.name: follower.describe() for follower in self._followers}


def _remove_strangers(directory: Path, follows: Mapping[str, Follow]) -> None:
    """Remove what followers left that are not configured any more."""
    try:
        for path in directory.iterdir():
            if path.name not in follows:
                durable.empty(path)
    except FileNotFoundError:
        return
    except OSError as error:
        _log.warning("old downloads in %s cannot be removed: %s", directory, error)
