"""What a manifest must hold beyond its types: names, sizes, paths that stay inside, tensors that fit.

Standard library only; Python 3.8.
"""

from __future__ import annotations

import re
import unicodedata
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Iterator, List, Set, Tuple

from device_agent.composition.plan import PlanError, order
from device_agent.core_list import parse_cpus

if TYPE_CHECKING:
    from device_agent.manifest import EngineBuild, Manifest, Resources

MAX_FILES = 4096
#: Tensor types of the Open Inference Protocol v2, section "Tensor Data Types".
DTYPES = (
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64",
    "FP16", "FP32", "FP64", "BF16", "BYTES",
)  # fmt: skip
PRECISIONS = ("fp32", "fp16", "int8")
QUANTILES = (None, "p50", "p95", "p99")
RUNTIMES = ("onnxruntime", "tensorrt", "tensorrt_rtx")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PATH_BYTES = 150  # with the next limit, every path fits a ustar header
_PATH_PART_BYTES = 100
_SHA256 = re.compile(r"[0-9a-f]{64}")


def problems(manifest: Manifest, reserved: Set[str]) -> Iterator[str]:
    """What is wrong with a manifest; ``reserved`` paths are not for its files."""
    for holds, why in _conditions(manifest, reserved):
        if not holds:
            yield why
    if manifest.resources is not None:
        yield from _resource_problems(manifest.resources)
    for build in manifest.builds:
        yield from _build_problems(build, manifest)
    if manifest.composition:
        try:
            order(
                manifest.composition,
                [spec.name for spec in manifest.inputs],
                [spec.name for spec in manifest.outputs],
            )
        except PlanError as error:
            yield f"the composition cannot run: {error}"


def _resource_problems(resources: Resources) -> Iterator[str]:
    if resources.threads is not None and resources.threads < 0:
        yield "resources.threads is negative"
    if resources.numa_node is not None and resources.numa_node < 0:
        yield "resources.numa_node is negative"
    try:
        parse_cpus(resources.cpus)
    except ValueError as error:
        yield f"resources.cpus: {error}"


def _build_problems(build: EngineBuild, manifest: Manifest) -> Iterator[str]:
    if build.runtime not in RUNTIMES or build.precision not in PRECISIONS:
        yield "an engine to build has an unknown runtime or precision"
    if not set(build.paths) <= {entry.path for entry in manifest.files}:
        yield "a file of an engine to build is not among the files"
    if build.workspace_bytes < 0 or (build.dla_core is not None and build.dla_core < 0):
        yield "an engine to build has a negative workspace_bytes or dla_core"
    for name, shapes in build.shapes.items():
        sizes = list(zip(shapes.least, shapes.usual, shapes.most))
        ranks = {len(shapes.least), len(shapes.usual), len(shapes.most)}
        if len(ranks) != 1 or not all(0 < least <= usual <= most for least, usual, most in sizes):
            yield f"an engine to build has impossible shapes for {name!r}"


def safe_path(path: str) -> bool:
    """Whether ``path`` stays inside the bundle: relative, no ``..``, read alike on every system."""
    if not path or "\\" in path or not path.isprintable() or path != str(PurePosixPath(path)):
        return False
    pure = PurePosixPath(path)
    return not pure.is_absolute() and ".." not in pure.parts and path != "." and _fits(pure)


def _fits(path: PurePosixPath) -> bool:
    return len(str(path).encode()) <= _PATH_BYTES and all(
        len(part.encode()) <= _PATH_PART_BYTES for part in path.parts
    )


def valid_name(name: str) -> bool:
    """Whether ``name`` may name a model: 1 to 64 letters, digits, ``.``, ``_`` or ``-``; no leading dot."""
    return bool(_NAME.fullmatch(name))


def _conditions(m: Manifest, reserved: Set[str]) -> List[Tuple[bool, str]]:
    listed = [entry.path for entry in m.files]
    tensors = m.inputs + m.outputs
    engines = m.engines
    graphs = [step.graph for step in m.composition]
    paths = [m.graph, m.golden.inputs, m.golden.outputs, *(engine.path for engine in engines), *graphs]
    tolerances = m.golden.tolerances
    return [
        (valid_name(m.name), f"name {m.name!r} is not 1 to 64 letters, digits, '.', '_' or '-'"),
        (m.version >= 1, "version is below 1"),
        (m.max_batch_size >= 1, "max_batch_size is below 1"),
        (bool(m.inputs) and bool(m.outputs), "the model has no inputs or no outputs"),
        (all(t.dtype in DTYPES for t in tensors), "a tensor has an unknown dtype"),
        (all(n >= -1 and n != 0 for t in tensors for n in t.shape), "a tensor has an impossible shape"),
        (_unique(t.name for t in m.inputs), "two inputs share a name"),
        (_unique(t.name for t in m.outputs), "two outputs share a name"),
        (len(listed) <= MAX_FILES, f"more than {MAX_FILES} files"),
        (_unique(listed), "a file is listed twice"),
        (not _parents(listed) & {*listed, *reserved}, "a file's path passes through another file"),
        (all(safe_path(path) for path in listed), "a file's path leaves the bundle"),
        (not reserved & set(listed), "the manifest or the signature is listed as a file"),
        (_unique(map(_folded, (*listed, *reserved))), "two paths differ only in case or Unicode form"),
        (all(_SHA256.fullmatch(f.sha256) for f in m.files), "a file's digest is not a SHA-256"),
        (all(f.size_bytes >= 0 for f in m.files), "a file's size is negative"),
        (set(paths) <= set(listed), "the graph, an engine or a golden file is not among the files"),
        (m.precision in PRECISIONS, f"precision {m.precision!r} is unknown"),
        (all(e.runtime in RUNTIMES for e in engines), "an engine is for an unknown runtime"),
        (all(e.precision in PRECISIONS for e in engines), "an engine has an unknown precision"),
        (m.contract.latency_quantile in QUANTILES, "the contract has an unknown latency_quantile"),
        (not graphs or m.graph in graphs, "the graph is not that of a step of the composition"),
        (set(tolerances) == {t.name for t in m.outputs}, "the tolerances do not match the outputs"),
        (all(t.absolute >= 0 and t.relative >= 0 for t in tolerances.values()), "a tolerance is negative"),
    ]


def _parents(paths: List[str]) -> Set[str]:
    return {str(parent) for path in paths for parent in PurePosixPath(path).parents}


def _folded(path: str) -> str:
    """What a path is on a file system that tells neither case nor composed characters apart."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", path).casefold())


def _unique(items: Any) -> bool:
    values = list(items)
    return len(values) == len(set(values))
