"""Bundles that were put on the disk before the device ever ran.

``edgekit provision`` leaves them in ``STATE_DIR/provisioned``. They are installed like any other, at the
first start on the device itself: trust, self-test and all, since nothing that was proven elsewhere counts.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from device_agent import archive, durable
from device_agent.errors import AgentError
from device_agent.manifest import Manifest

if TYPE_CHECKING:
    from device_agent.lifecycle import Lifecycle

DIRECTORY = "provisioned"

_log = logging.getLogger(__name__)


def install(state_dir: Path, lifecycle: Lifecycle) -> None:
    """Install what waits, and remove it once it serves.

    A bundle of a model that has an active version has had its turn: it is removed. One that cannot be
    installed stays, for the next start; the reason is logged, and kept in the journal of its model.
    """
    for bundle in sorted((state_dir / DIRECTORY).glob(f"*{archive.SUFFIX}")):
        try:
            manifest = archive.read_head(bundle).manifest
            if not _has_active(lifecycle, manifest):
                installed = lifecycle.install(bundle)
                _log.info("provisioned %s serves: %s", installed.name, installed.digest[:12])
        except AgentError as error:
            _log.error("%s was not installed: %s: %s", bundle.name, error.what, error.why)
        else:
            _forget(bundle)


def _has_active(lifecycle: Lifecycle, manifest: Manifest) -> bool:
    return any(model["name"] == manifest.name and model["active"] is not None for model in lifecycle.status())


def _forget(bundle: Path) -> None:
    try:
        durable.empty(bundle)
    except OSError as error:  # it costs space, and is asked again at the next start
        _log.warning("%s could not be removed: %s", bundle.name, error.strerror)
