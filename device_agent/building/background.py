"""Builds the engines of models that serve without one, then swaps them in; one thread.

That is a first version, which nothing could serve meanwhile, or a device that was updated: an engine of
another TensorRT, CUDA or driver does not fit any more.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from device_agent.building.process import BuildStopped
from device_agent.errors import AgentError

if TYPE_CHECKING:
    from device_agent.lifecycle import Lifecycle
    from device_agent.models import Models

_log = logging.getLogger(__name__)


class BackgroundBuilds:
    """Builds for the models that serve without the engine that they should have.

    Args:
        lifecycle: swaps a model's engine.
        models: what serves.
    """

    def __init__(self, lifecycle: Lifecycle, models: Models) -> None:
        self._lifecycle = lifecycle
        self._models = models
        self._builds = models.builds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="engine-builds", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """End a build that goes on, and look no more; returns at once."""
        self._stop.set()
        self._builds.missing.set()

    def join(self, timeout_s: float) -> None:
        """Wait a little."""
        self._thread.join(timeout_s)

    def _work(self) -> None:
        while True:
            self._builds.missing.wait()
            self._builds.missing.clear()
            if self._stop.is_set():
                return
            try:
                self._build_all()
            except BuildStopped:
                return
            except AgentError as error:
                _log.error("no engine is built now: %s: %s", error.what, error.why)

    def _build_all(self) -> None:
        self._lifecycle.resume()  # an update that goes on, and its probation, come first
        for loaded in self._models.serving():
            wanted = loaded.manifest.builds and self._builds.is_missing(loaded.manifest)
            if wanted and self._builds.build(loaded.directory, loaded.manifest, self._stop):
                self._lifecycle.reload(loaded)
