"""Golden inputs and outputs: an engine may serve only after it reproduces what the host computed."""

from __future__ import annotations

import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterable, Mapping, Tuple

import numpy as np

from device_agent.engines.base import Engine, EngineError
from device_agent.errors import Refused
from device_agent.manifest import Manifest, TensorSpec, Tolerance
from device_agent.tensors import NUMPY_DTYPES, object_array

MAX_GOLDEN_BYTES = 256 * 1024 * 1024

Arrays = Dict[str, "np.ndarray[Any, Any]"]


@dataclass(frozen=True)
class SelfTest:
    """Outcome of a passed self-test.

    Attributes:
        worst_error: largest absolute difference to the golden output, by output name.
        seconds: duration of the inference, without reading the files.
    """

    worst_error: Mapping[str, float]
    seconds: float


def check(engine: Engine, directory: Path, manifest: Manifest) -> SelfTest:
    """Run the golden inputs of an unpacked bundle through ``engine``.

    Raises:
        Refused: a golden file cannot be read, or an output differs by more than its tolerance.
    """
    inputs = load_arrays(directory / manifest.golden.inputs, manifest.inputs)
    golden = load_arrays(directory / manifest.golden.outputs, manifest.outputs)
    started_s = time.monotonic()
    try:
        outputs = _run_in_slices(engine, inputs, manifest)
    except EngineError as error:
        raise _refused(manifest, f"the engine failed on the golden inputs: {error}") from error
    seconds = time.monotonic() - started_s
    return SelfTest(compare(outputs, golden, manifest), seconds)


def compare(outputs: Arrays, golden: Arrays, manifest: Manifest) -> Dict[str, float]:
    """Hold outputs against the golden ones, within the manifest's tolerances.

    Returns:
        The largest absolute error, by output name.

    Raises:
        Refused: an output differs by more than its tolerance.
    """
    return {
        spec.name: _compare(spec.name, outputs[spec.name], golden[spec.name], manifest)
        for spec in manifest.outputs
    }


def load_arrays(path: Path, specs: Iterable[TensorSpec]) -> Arrays:
    """Read one array for each tensor from an ``.npz`` file, never unpickling.

    Strings are stored as numpy's fixed-width text or bytes and come back as ``BYTES``.

    Raises:
        Refused: unreadable, larger than ``MAX_GOLDEN_BYTES``, or an array is missing or of another type.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size_bytes = sum(member.file_size for member in archive.infolist())
        if size_bytes > MAX_GOLDEN_BYTES:
            raise _unreadable(path, f"it unpacks to {size_bytes} bytes; the limit is {MAX_GOLDEN_BYTES}")
        with np.load(path, allow_pickle=False) as stored:
            return {spec.name: _typed(stored[spec.name], spec, path) for spec in specs}
    except KeyError as error:
        raise _unreadable(path, str(error.args[0])) from error
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile, NotImplementedError) as error:
        raise _unreadable(path, f"{type(error).__name__}: {error}") from error


def _typed(array: np.ndarray[Any, Any], spec: TensorSpec, path: Path) -> np.ndarray[Any, Any]:
    if spec.dtype == "BYTES" and array.dtype.kind in "US":
        items = [x.encode("utf-8") if isinstance(x, str) else x for x in array.ravel().tolist()]
        return object_array(items, array.shape)
    if array.dtype != NUMPY_DTYPES[spec.dtype]:
        raise _unreadable(path, f"'{spec.name}' is {array.dtype} where the model has {spec.dtype}")
    return array


def _run_in_slices(engine: Engine, inputs: Arrays, manifest: Manifest) -> Arrays:
    """Golden sets may hold more rows than the largest batch that was tested."""
    rows = min(array.shape[0] if array.ndim else 1 for array in inputs.values())
    step = manifest.max_batch_size
    if any(spec.shape[:1] != (-1,) for spec in manifest.inputs) or rows <= step:
        return engine.run(inputs)
    parts = [
        engine.run({name: array[start : start + step] for name, array in inputs.items()})
        for start in range(0, rows, step)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _compare(name: str, got: np.ndarray[Any, Any], golden: np.ndarray[Any, Any], manifest: Manifest) -> float:
    """The largest absolute error of one output; the tolerance must hold for every element."""
    tolerance = manifest.golden.tolerances[name]
    if got.shape != golden.shape:
        raise _refused(manifest, f"output '{name}' has shape {list(got.shape)}, not {list(golden.shape)}")
    dtype = next(spec.dtype for spec in manifest.outputs if spec.name == name)
    passed, error = _difference(dtype, got, golden, tolerance)
    if not passed.all():
        failed = int(np.size(passed) - np.count_nonzero(passed))
        worst = float(np.max(error)) if error.size else 0.0
        raise _refused(
            manifest,
            f"output '{name}' differs in {failed} of {passed.size} elements, by up to {worst:.4g}; "
            f"allowed are {tolerance.absolute:g} + {tolerance.relative:g} x |golden|",
        )
    return float(np.max(error)) if error.size else 0.0


def _difference(
    dtype: str, got: np.ndarray[Any, Any], golden: np.ndarray[Any, Any], tolerance: Tolerance
) -> Tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    same = np.asarray(got == golden)
    if dtype in ("BYTES", "BOOL"):
        return same, np.where(same, 0.0, np.inf)
    got_64, golden_64 = as_float64(dtype, got), as_float64(dtype, golden)
    with np.errstate(invalid="ignore"):  # infinity minus infinity, or times zero
        error = np.where(same, 0.0, np.abs(got_64 - golden_64))
        within = error <= tolerance.absolute + tolerance.relative * np.abs(golden_64)
        passed = same | (np.isfinite(error) & within)
    return passed, error


def as_float64(dtype: str, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The numbers of a tensor of a numeric ``dtype``; see :mod:`device_agent.tensors` for ``BF16``."""
    if dtype == "BF16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float64)


def _refused(manifest: Manifest, why: str) -> Refused:
    return Refused(
        f"{manifest.name} version {manifest.version} failed its self-test on this device",
        why,
        "the previous version keeps serving; build the bundle for this device's profile",
    )


def _unreadable(path: Path, why: str) -> Refused:
    return Refused(
        f"the golden file {path.name} cannot be used", why, "make the bundle again with `edgekit compress`"
    )
