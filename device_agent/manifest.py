"""The bundle manifest: the only contract between the host and the device.

A bundle is a directory whose ``manifest.json`` lists every other file with its digest. The bundle's
identity is the SHA-256 of the bytes of ``manifest.json``; the signature lies beside it (``model.sig``)
and is not part of that identity, so a bundle can be signed again without becoming another bundle.

The manifest holds only what the same inputs produce again, bit for bit: accuracy and sizes, but no
timings. Timings belong to one machine on one day; they are in the host's ``report.json``, which names
the bundle by its digest.

Standard library only; Python 3.8.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import stat
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Dict, List, Mapping, Optional, Set, Tuple, Type, TypeVar

from device_agent.errors import ManifestError

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
SIGNATURE_NAME = "model.sig"
MAX_MANIFEST_BYTES = 4 * 1024 * 1024
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


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of the model.

    Attributes:
        name: the tensor's name in the ONNX graph.
        dtype: a type of the Open Inference Protocol, such as ``FP32``.
        shape: sizes with the batch axis first; -1 where the size is free.
    """

    name: str
    dtype: str
    shape: Tuple[int, ...]


@dataclass(frozen=True)
class FileEntry:
    """A file of the bundle: its POSIX path inside the bundle, digest and exact size."""

    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class EngineEntry:
    """A prebuilt engine.

    Attributes:
        runtime: which runtime loads it.
        path: a path from ``files``.
        precision: ``fp32``, ``fp16`` or ``int8``.
        fingerprint: what must equal the device's own for the engine to fit (for TensorRT: SM, build,
            CUDA). Empty: it fits wherever the runtime is.
    """

    runtime: str
    path: str
    precision: str
    fingerprint: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Tolerance:
    """An output passes when ``|got - golden| <= absolute + relative * |golden|`` holds for every element."""

    absolute: float
    relative: float


@dataclass(frozen=True)
class Golden:
    """Inputs and the outputs that an engine must reproduce before it may serve.

    Attributes:
        inputs: path of an ``.npz``, one array for each input; the batch axis first.
        outputs: path of an ``.npz``, one array for each output.
        tolerances: by output name.
    """

    inputs: str
    outputs: str
    tolerances: Mapping[str, Tolerance]


@dataclass(frozen=True)
class Contract:
    """What the user asked for; the device's health gate holds the latency part against its own clock.

    Attributes:
        size: largest share of the original's parameters, a fraction; None: not asked.
        max_drop: largest absolute loss of the metric; None: not asked.
        latency_quantile: ``p50``, ``p95`` or ``p99``; None: no latency was asked.
        latency_ms: the bound on that quantile, at batch 1.
        met: whether the host measured the contract as met.
    """

    size: Optional[float] = None
    max_drop: Optional[float] = None
    latency_quantile: Optional[str] = None
    latency_ms: Optional[float] = None
    met: bool = False


@dataclass(frozen=True)
class Manifest:
    """Everything a device needs to know about a bundle.

    Attributes:
        schema: version of this format.
        name: the model's name on the device; also its name in the serving protocol.
        version: increases with every release of the model; a device refuses to go back unless told to.
        profile: the device profile the bundle was made for.
        architecture: the profile's processor, such as ``x86_64`` or ``aarch64``.
        graph: path of the portable ONNX graph, which any device can fall back to.
        precision: precision of ``graph``.
        inputs, outputs: the model's signature.
        max_batch_size: the largest batch that was tested; 1 where the batch axis is fixed.
        files: every file of the bundle but the manifest and the signature.
        engines: prebuilt engines, in order of preference.
        golden: the self-test.
        contract: what was promised.
        preprocessing: how raw data becomes the model's inputs (see edgekit's docs/preprocessing.md); null
            where the model takes tensors as they are.
        measurements: reproducible results from the host: the metric, sizes, parameter counts.
        provenance: tool versions, the digest of the original model, the seed.
    """

    schema: int
    name: str
    version: int
    profile: str
    architecture: str
    graph: str
    precision: str
    inputs: Tuple[TensorSpec, ...]
    outputs: Tuple[TensorSpec, ...]
    max_batch_size: int
    files: Tuple[FileEntry, ...]
    engines: Tuple[EngineEntry, ...]
    golden: Golden
    contract: Contract
    preprocessing: Optional[Mapping[str, Any]] = None
    measurements: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)


# Writing


def dumps(manifest: Manifest) -> bytes:
    """Serialize to the one canonical form: sorted keys, two spaces, UTF-8, a final newline."""
    _check(manifest)
    text = json.dumps(asdict(manifest), sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def digest(manifest_bytes: bytes) -> str:
    """Identity of a bundle: lower-case hex SHA-256 of its manifest's bytes."""
    return hashlib.sha256(manifest_bytes).hexdigest()


# Reading


def loads(data: bytes) -> Manifest:
    """Parse and check a manifest.

    Raises:
        ManifestError: malformed, inconsistent, unsafe paths, or a schema newer than this agent's.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise _malformed(f"it has {len(data)} bytes; the limit is {MAX_MANIFEST_BYTES}")
    try:
        raw = json.loads(
            data.decode("utf-8"),
            parse_constant=_no_constant,
            parse_float=_finite,
            object_pairs_hook=_no_duplicates,
        )
        json.dumps(raw, ensure_ascii=False).encode("utf-8")  # an escape can smuggle in half a character
    except (ValueError, RecursionError) as error:
        raise _malformed(f"it is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise _malformed("the top level is not an object")
    _check_schema(raw.get("schema"))
    manifest = _build(Manifest, raw, "manifest")
    _check(manifest)
    return manifest


def read(bundle: Path) -> Tuple[Manifest, str]:
    """Read ``manifest.json`` of an unpacked bundle.

    Returns:
        The manifest and the bundle's digest.

    Raises:
        ManifestError: no manifest there, or a bad one.
    """
    data = read_bytes(bundle)
    return loads(data), digest(data)


def read_bytes(bundle: Path) -> bytes:
    """Read the bytes of ``manifest.json`` of an unpacked bundle, without judging them.

    Raises:
        ManifestError: no manifest there.
    """
    try:
        return read_regular(bundle / MANIFEST_NAME, MAX_MANIFEST_BYTES)
    except OSError as error:
        raise ManifestError(
            f"{bundle} is not a bundle",
            f"{MANIFEST_NAME} cannot be read: {error.strerror}",
            "give the directory or the .edgekit file that `edgekit compress` wrote",
        ) from error


def read_regular(path: Path, limit_bytes: int) -> bytes:
    """Read a regular file, that is no link, up to one byte past ``limit_bytes``.

    Raises:
        OSError: it is missing, unreadable or not a regular file.
    """
    with open_regular(path, follow_links=False) as stream:
        return stream.read(limit_bytes + 1)


def open_regular(path: Path, follow_links: bool = True) -> BinaryIO:
    """Open a regular file; a pipe or a device is an error instead of a wait.

    Raises:
        OSError: it is missing, unreadable or not a regular file.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow_links else os.O_NOFOLLOW)
    descriptor = os.open(str(path), flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


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


def _malformed(why: str) -> ManifestError:
    return ManifestError(
        f"{MANIFEST_NAME} is not a valid bundle manifest",
        why,
        "make the bundle again with `edgekit compress`",
    )


def _no_constant(value: str) -> None:
    raise ValueError(f"{value} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is too large")
    return value


def _no_duplicates(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    keys = [key for key, _ in pairs]
    if not _unique(keys):
        raise ValueError(f"an object has the key {max(keys, key=keys.count)!r} twice")
    return dict(pairs)


def _check_schema(schema: Any) -> None:
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise _malformed("'schema' is not a positive integer")
    if schema > SCHEMA_VERSION:
        raise ManifestError(
            f"the bundle is newer than this agent: schema {schema}",
            f"this agent understands schema {SCHEMA_VERSION} and older",
            "update edgekit-agent on this device, or build the bundle with an older edgekit",
        )


_T = TypeVar("_T")

# One row for each composite field: (dataclass, field) -> (element type, container)
_NESTED: Dict[Tuple[str, str], Tuple[Any, str]] = {
    ("Manifest", "inputs"): (TensorSpec, "tuple"),
    ("Manifest", "outputs"): (TensorSpec, "tuple"),
    ("Manifest", "files"): (FileEntry, "tuple"),
    ("Manifest", "engines"): (EngineEntry, "tuple"),
    ("Manifest", "golden"): (Golden, "one"),
    ("Manifest", "contract"): (Contract, "one"),
    ("Golden", "tolerances"): (Tolerance, "map"),
}
_SCALARS: Dict[str, Tuple[Type[Any], ...]] = {
    "str": (str,),
    "int": (int,),
    "bool": (bool,),
    "float": (int, float),
    "Optional[str]": (str, type(None)),
    "Optional[float]": (int, float, type(None)),
    "Mapping[str, str]": (dict,),
    "Mapping[str, Any]": (dict,),
    "Optional[Mapping[str, Any]]": (dict, type(None)),
}


def _build(cls: Type[_T], raw: Any, where: str) -> _T:
    """Turn a JSON object into the frozen dataclass ``cls``; every key must be known, every type exact."""
    if not isinstance(raw, dict):
        raise _malformed(f"{where} is not an object")
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]  # cls is always a dataclass here
    unknown = sorted(set(raw) - set(known))
    if unknown:
        raise _malformed(f"{where} has the unknown key {unknown[0]!r}")
    values = {key: _value(cls.__name__, known[key], raw[key], f"{where}.{key}") for key in raw}
    try:
        return cls(**values)
    except TypeError as error:
        raise _malformed(f"{where}: {error}") from error


def _value(owner: str, spec: Any, value: Any, where: str) -> Any:
    nested = _NESTED.get((owner, spec.name))
    if nested is not None:
        return _nested(nested[0], nested[1], value, where)
    if spec.type == "Tuple[int, ...]":
        return tuple(_list(value, where, int))
    allowed = _SCALARS[spec.type]
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        raise _malformed(f"{where} has the wrong type: {type(value).__name__}")
    return value


def _nested(element: Any, container: str, value: Any, where: str) -> Any:
    if container == "one":
        return _build(element, value, where)
    if container == "map":
        if not isinstance(value, dict):
            raise _malformed(f"{where} is not an object")
        return {key: _build(element, item, f"{where}.{key}") for key, item in value.items()}
    return tuple(_build(element, item, f"{where}[{i}]") for i, item in enumerate(_list(value, where, dict)))


def _list(value: Any, where: str, kind: Type[Any]) -> List[Any]:
    if not isinstance(value, list) or not all(type(item) is kind for item in value):
        raise _malformed(f"{where} is not a list of {kind.__name__}")
    return value


def _check(manifest: Manifest) -> None:
    """Check what types cannot say."""
    for holds, why in _conditions(manifest):
        if not holds:
            raise _malformed(why)


def _conditions(m: Manifest) -> List[Tuple[bool, str]]:
    listed = [entry.path for entry in m.files]
    tensors = m.inputs + m.outputs
    engines = m.engines
    paths = [m.graph, m.golden.inputs, m.golden.outputs, *(engine.path for engine in engines)]
    reserved = {MANIFEST_NAME, SIGNATURE_NAME}
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
        (all(_SHA256.fullmatch(f.sha256) for f in m.files), "a file's digest is not a SHA-256"),
        (all(f.size_bytes >= 0 for f in m.files), "a file's size is negative"),
        (set(paths) <= set(listed), "the graph, an engine or a golden file is not among the files"),
        (m.precision in PRECISIONS, f"precision {m.precision!r} is unknown"),
        (all(e.runtime in RUNTIMES for e in engines), "an engine is for an unknown runtime"),
        (all(e.precision in PRECISIONS for e in engines), "an engine has an unknown precision"),
        (all(type(v) is str for e in engines for v in e.fingerprint.values()), "a fingerprint holds no text"),
        (m.contract.latency_quantile in QUANTILES, "the contract has an unknown latency_quantile"),
        (set(tolerances) == {t.name for t in m.outputs}, "the tolerances do not match the outputs"),
        (all(t.absolute >= 0 and t.relative >= 0 for t in tolerances.values()), "a tolerance is negative"),
    ]


def _parents(paths: List[str]) -> Set[str]:
    return {str(parent) for path in paths for parent in PurePosixPath(path).parents}


def _unique(items: Any) -> bool:
    values = list(items)
    return len(values) == len(set(values))
