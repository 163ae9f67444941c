"""The life cycle where no agent runs: a command acts on the store itself, and self-tests in its process."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Iterator

from device_agent.config import Config
from device_agent.lifecycle import Lifecycle
from device_agent.metrics import Metrics
from device_agent.models import Models
from device_agent.signature import Trust
from device_agent.store import Store


@contextmanager
def lifecycle_of(config: Config) -> Iterator[Lifecycle]:
    """Open the store for the length of a ``with`` block.

    Raises:
        Refused: an agent, or another command, has it open.
    """
    trust = Trust(config.keys_dir, config.allow_unsigned)
    with Store(config.state_dir) as store:
        lifecycle = Lifecycle(store, trust, Models(config, Metrics()), config.timeouts)
        if config.follow:
            from device_agent.follow import report

            lifecycle.show_followers(lambda: report.recorded(config.state_dir, config.follow))
        yield lifecycle
