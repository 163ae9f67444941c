"""The life cycle where no agent runs: a command acts on the store itself, and self-tests in its process."""

from __future__ import annotations

import os
import pwd
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from device_agent.config import Config
from device_agent.errors import Refused
from device_agent.lifecycle import Lifecycle
from device_agent.metrics import Metrics
from device_agent.models import Models
from device_agent.signature import Trust
from device_agent.store import Store


@contextmanager
def lifecycle_of(config: Config) -> Iterator[Lifecycle]:
    """Open the store for the length of a ``with`` block.

    Raises:
        Refused: an agent, or another command, has it open; or this is root, and the store is another user's.
    """
    _refuse_root(config.state_dir)
    trust = Trust(config.keys_dir, config.allow_unsigned)
    with Store(config.state_dir) as store:
        lifecycle = Lifecycle(store, trust, Models(config, Metrics()), config.timeouts)
        if config.follow:
            from device_agent.follow import report

            lifecycle.show_followers(lambda: report.recorded(config.state_dir, config.follow))
        yield lifecycle


def _refuse_root(state_dir: Path) -> None:
    """Keep root from leaving files that the agent, which runs as another user, could not change any more."""
    if os.geteuid() != 0 or not state_dir.is_dir():
        return
    owner = state_dir.stat().st_uid
    if owner != 0:
        name = _name_of(owner)
        raise Refused(
            f"root does not touch {state_dir} while no agent runs",
            f"it belongs to {name}, who could not change what root leaves there",
            f"start the agent (systemctl start edgekit-agent), or: sudo -u {name} edgekit-agent ...",
        )


def _name_of(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return f"'#{user}'"  # as sudo takes a number
