"""TensorRT, 8.5 to 11: engines that were built for exactly this GPU and this TensorRT.

See :mod:`device_agent.engines.tensorrt_engine`, which TensorRT-RTX shares.
"""

from __future__ import annotations

from pathlib import Path
from typing import Mapping

from device_agent.engines import tensorrt_engine
from device_agent.engines.base import Engine, EngineSettings
from device_agent.engines.tensorrt_module import load

_NAME = "tensorrt"  # of the runtime, and of its Python module


def fingerprint() -> Mapping[str, str]:
    """What an engine has to be built for to run here; see ``tensorrt_engine.fingerprint``."""
    return tensorrt_engine.fingerprint(load(_NAME), _NAME)


def open_graph(path: Path, settings: EngineSettings) -> Engine:
    """Load a serialized engine; see ``tensorrt_engine.open_engine``."""
    return tensorrt_engine.open_engine(load(_NAME), _NAME, path)
