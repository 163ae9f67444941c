"""Runtimes that can serve a bundle, one module each, loaded only when a bundle needs them.

A runtime module has two functions: ``fingerprint()``, the device's own values for the keys that an
``EngineEntry`` may ask for, and ``open_graph(path, settings)``, which loads a file and returns an
:class:`~device_agent.engines.base.Engine`. A new runtime is a new module and one line in ``RUNTIMES``.
"""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from types import ModuleType
from typing import Dict, Iterator, Tuple

from device_agent.engines.base import Engine, EngineSettings
from device_agent.errors import AgentError, Missing, Refused
from device_agent.manifest import EngineEntry, Manifest, TensorSpec

RUNTIMES: Dict[str, str] = {
    "onnxruntime": "device_agent.engines.onnxruntime",
}

_log = logging.getLogger(__name__)


def load_runtime(name: str) -> ModuleType:
    """Import the module of a runtime.

    Raises:
        Missing: this agent has no such runtime, or its library is not installed.
        Refused: the library is installed but breaks when it is imported.
    """
    if name not in RUNTIMES:
        raise Missing(
            f"this agent cannot run {name} engines",
            "it knows " + ", ".join(sorted(RUNTIMES)),
            "update edgekit-agent, or deploy a bundle for another runtime",
        )
    try:
        return importlib.import_module(RUNTIMES[name])
    except ModuleNotFoundError as error:
        raise Missing(
            f"the runtime {name} is not installed",
            f"the Python module '{error.name}' is not there",
            f"install {name} into the agent's environment",
        ) from error
    except (ImportError, OSError) as error:
        raise Refused(
            f"the runtime {name} is installed but does not load",
            f"{type(error).__name__}: {error}",
            f"reinstall {name} for this Python and this system",
        ) from error


def open_engine(directory: Path, manifest: Manifest, settings: EngineSettings) -> Engine:
    """Load the best engine of an unpacked bundle that fits this device.

    Takes the first prebuilt engine whose runtime is here and whose fingerprint equals the device's, and
    else the portable graph on ONNX Runtime.

    Raises:
        Missing: ONNX Runtime is needed and not installed.
        Refused: the file does not load, or its tensors are not those of the manifest.
    """
    for entry in manifest.engines:
        try:
            runtime = load_runtime(entry.runtime)
        except AgentError as error:
            _log.info("engine %s of %s does not fit: %s", entry.path, manifest.name, error.what)
            continue
        if not _fits(entry, runtime):
            _log.info("engine %s of %s does not fit: made for another device", entry.path, manifest.name)
            continue
        return _open(runtime, directory / entry.path, manifest, settings)
    return _open(load_runtime("onnxruntime"), directory / manifest.graph, manifest, settings)


def _fits(entry: EngineEntry, runtime: ModuleType) -> bool:
    own = runtime.fingerprint()
    return all(own.get(key) == value for key, value in entry.fingerprint.items())


def _open(runtime: ModuleType, path: Path, manifest: Manifest, settings: EngineSettings) -> Engine:
    engine: Engine = runtime.open_graph(path, settings)
    difference = next(_differences(engine, manifest), None)
    if difference is not None:
        engine.close()
        raise Refused(
            f"{path.name} is not the model of its manifest",
            difference,
            "make the bundle again with `edgekit compress`",
        )
    return engine


def _differences(engine: Engine, manifest: Manifest) -> Iterator[str]:
    pairs = (("input", engine.inputs, manifest.inputs), ("output", engine.outputs, manifest.outputs))
    for kind, got, stated in pairs:
        if _signature(got) != _signature(stated):
            yield f"its {kind}s are {_signature(got)}, the manifest says {_signature(stated)}"


def _signature(specs: Tuple[TensorSpec, ...]) -> Dict[str, str]:
    return {spec.name: spec.dtype for spec in specs}
