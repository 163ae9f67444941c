"""Runtimes that can serve a bundle, one module each, loaded only when a bundle needs them.

A runtime module has two functions: ``fingerprint()``, the device's own values for the keys that an
``EngineEntry`` may ask for, and ``open_graph(path, settings)``, which loads a file and returns an
:class:`~device_agent.engines.base.Engine`. A new runtime is a new module and one line in ``RUNTIMES``.
"""

from __future__ import annotations

import importlib
import logging
import os
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, Optional, Tuple

from device_agent.engines.base import Engine, EngineSettings
from device_agent.engines.fingerprint import misfit, of_entry
from device_agent.engines.source import EngineSource, with_steps
from device_agent.errors import AgentError, Missing, Refused
from device_agent.manifest import Manifest, TensorSpec

if TYPE_CHECKING:
    from device_agent.engines.process import ProcessEngine

RUNTIMES: Dict[str, str] = {
    "onnxruntime": "device_agent.engines.onnxruntime",
    "tensorrt": "device_agent.engines.tensorrt",
    "tensorrt_rtx": "device_agent.engines.tensorrt_rtx",
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
    return import_library(name, RUNTIMES[name])


def import_library(name: str, module: str) -> ModuleType:
    """Import a module that a runtime needs.

    Raises:
        Missing: it is not installed.
        Refused: it is installed but breaks when it is imported.
    """
    try:
        return importlib.import_module(module)
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
    """Load the best engine of an unpacked bundle that fits this device: the first of :func:`candidates`."""
    return next(candidates(directory, manifest, settings))


def candidates(
    directory: Path,
    manifest: Manifest,
    settings: EngineSettings,
    built: Optional[EngineSource] = None,
    on_failure: Callable[[EngineSource, AgentError], None] = lambda source, error: None,
) -> Iterator[Engine]:
    """Load, one after the other, what can run a bundle here; the caller closes what it does not keep.

    First the prebuilt engines whose runtime is here and whose fingerprint equals the device's, in the
    manifest's order, then what was built here; one that does not load is logged and passed over. Last the
    portable graph on ONNX Runtime. In a composition this is said of its main step; the others run on ONNX
    Runtime.

    Args:
        directory: where the bundle is.
        manifest: the bundle's.
        settings: how the engine may use the machine.
        built: an engine that this device built for the bundle.
        on_failure: called with each engine that is passed over, and why.

    Raises:
        Missing: ONNX Runtime is needed and not installed.
        Refused: the portable graph does not load, or its tensors are not those of the manifest.
    """
    sources = [
        with_steps(
            EngineSource(entry.runtime, str(directory / entry.path), of_entry(entry, manifest)),
            directory,
            manifest,
        )
        for entry in manifest.engines
    ]
    for source in [*sources, *([] if built is None else [built])]:
        try:
            engine = _open(source, manifest, settings)
        except AgentError as error:
            path = os.path.basename(source.path)
            _log.warning("engine %s of %s is passed over: %s: %s", path, manifest.name, error.what, error.why)
            on_failure(source, error)
            continue
        yield engine
    portable = EngineSource("onnxruntime", str(directory / manifest.graph))
    yield _open(with_steps(portable, directory, manifest), manifest, settings)


def open_as_set(source: EngineSource, settings: EngineSettings) -> Engine:
    """Load an engine where ``settings`` want it: in this process, or in one of its own.

    Raises:
        Missing, Refused: as ``open_here``.
    """
    if not settings.isolate:
        return open_here(source, settings)
    from device_agent.engines.process import ProcessEngine  # most agents never need it

    return ProcessEngine(source, settings)


def keep_up(engine: Engine, accept: Callable[[Engine], Any]) -> None:
    """Have an isolated engine's process started again whenever it ends; any other engine has none.

    Args:
        engine: what serves.
        accept: checks a new process before it serves; raises AgentError or EngineError where it may not.
    """
    isolated = _isolated(engine)
    if isolated is not None:
        isolated.keep_up(accept)


def on_restart(engine: Engine, callback: Callable[[], None]) -> None:
    """Have ``callback`` called, on another thread, whenever an isolated engine was started again."""
    isolated = _isolated(engine)
    if isolated is not None:
        isolated.on_restart = callback


def why_down(engine: Engine) -> str:
    """Why an isolated engine runs nothing at the moment; empty: it does."""
    isolated = _isolated(engine)
    return "" if isolated is None else isolated.why_down


def _isolated(engine: Engine) -> Optional[ProcessEngine]:
    if engine.process == os.getpid():
        return None
    from device_agent.engines.process import ProcessEngine

    return engine if isinstance(engine, ProcessEngine) else None


def open_here(source: EngineSource, settings: EngineSettings) -> Engine:
    """Load an engine in this process.

    Raises:
        Missing: its runtime is not here.
        Refused: it was built for another device, or does not load; or the steps of a composition do not fit.
    """
    if source.steps:
        from device_agent.composition.engine import open_composition  # most bundles have one graph

        return open_composition(source, settings, open_here)
    runtime = load_runtime(source.runtime)
    _check_fingerprint(source, runtime)
    engine: Engine = runtime.open_graph(Path(source.path), settings)
    if any(spec.name in source.wide and spec.dtype == "INT32" for spec in engine.inputs + engine.outputs):
        from device_agent.engines.widened import WidenedEngine  # few models have such tensors

        return WidenedEngine(engine, source.wide)
    return engine


def _check_fingerprint(source: EngineSource, runtime: ModuleType) -> None:
    why = misfit(source.fingerprint, runtime.fingerprint()) if source.fingerprint else None
    if why is not None:
        raise Refused(
            why,
            "an engine fits only what it was built for",
            "build the bundle with an engine for this device's profile",
        )


def _open(source: EngineSource, manifest: Manifest, settings: EngineSettings) -> Engine:
    engine = open_as_set(source, settings)
    difference = next(_differences(engine, manifest), None)
    if difference is not None:
        engine.close()
        raise Refused(
            f"{Path(source.path).name} is not the model of its manifest",
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
