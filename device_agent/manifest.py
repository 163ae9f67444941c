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
import os
import stat
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Mapping, Optional, Tuple

from device_agent import manifest_form
from device_agent.errors import ManifestError
from device_agent.manifest_checks import problems
from device_agent.manifest_form import malformed

SCHEMA_VERSION = 4
_SINCE = {"composition": 2, "resources": 3, "builds": 4}  # the first schema that knows a field
MANIFEST_NAME = "manifest.json"
SIGNATURE_NAME = "model.sig"
MAX_MANIFEST_BYTES = 4 * 1024 * 1024


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
class ShapeRange:
    """The shapes of an input that an engine accepts, and the one that it is tuned for."""

    least: Tuple[int, ...]
    usual: Tuple[int, ...]
    most: Tuple[int, ...]


@dataclass(frozen=True)
class EngineBuild:
    """How a device builds an engine of its own, where none of ``engines`` fits it.

    Attributes:
        runtime: which runtime builds and loads it.
        graph: path of the ONNX graph that it is built from.
        precision: ``fp32``, ``fp16`` or ``int8``.
        requires: what the device must be, by the keys of its fingerprint; a version may be given in part
            (``8.5`` for 8.5.2.2).
        shapes: for every input; empty where the graph's shapes are fixed.
        workspace_bytes: the most that one layer may take for itself while it runs; 0: the runtime's limit.
        calibration_cache: path of the scales of a graph without Q/DQ pairs; empty: there are none.
        layer_precisions: path of a JSON object, from a node of the graph to the precision that it must have;
            empty: there is none.
        dla_core: the DLA to build for; None: the GPU.
    """

    runtime: str
    graph: str
    precision: str
    requires: Mapping[str, str] = field(default_factory=dict)
    shapes: Mapping[str, ShapeRange] = field(default_factory=dict)
    workspace_bytes: int = 0
    calibration_cache: str = ""
    layer_precisions: str = ""
    dla_core: Optional[int] = None

    @property
    def paths(self) -> Tuple[str, ...]:
        """The files of the bundle that it reads."""
        return tuple(filter(None, (self.graph, self.calibration_cache, self.layer_precisions)))


@dataclass(frozen=True)
class Step:
    """One graph of a composition.

    Attributes:
        name: for messages; unique in the composition.
        graph: path of its ONNX graph, from ``files``.
        inputs: which tensor of the composition each of the graph's inputs is.
        outputs: which tensor each of the graph's outputs becomes.
    """

    name: str
    graph: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]


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
class Resources:
    """What of the device the model should run on, where the agent's configuration does not say.

    Attributes:
        threads: of one inference; 0: as many as its cores; None: as the agent's other models.
        cpus: the cores that its threads may use, as the kernel writes them (``0-1,4``); empty: any.
        numa_node: the node that its memory comes from, and its cores where ``cpus`` names none; None: any.
    """

    threads: Optional[int] = None
    cpus: str = ""
    numa_node: Optional[int] = None


@dataclass(frozen=True)
class Manifest:
    """Everything a device needs to know about a bundle.

    Attributes:
        schema: version of this format.
        name: the model's name on the device; also its name in the serving protocol.
        version: increases with every release of the model; a device refuses to go back unless told to.
        profile: the device profile the bundle was made for.
        architecture: the profile's processor, such as ``x86_64`` or ``aarch64``.
        graph: path of the portable ONNX graph, which any device can fall back to; in a composition, the
            graph of the step that ``engines`` and ``precision`` are about.
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
        composition: the steps of a model that is made of several graphs, in any order; empty: it is
            ``graph`` alone.
        resources: cores and threads on the device that it was made for; None: the agent's own.
        builds: engines that a device may build for itself, in order of preference.
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
    composition: Tuple[Step, ...] = ()
    resources: Optional[Resources] = None
    builds: Tuple[EngineBuild, ...] = ()


# Writing


def dumps(manifest: Manifest) -> bytes:
    """Serialize to the one canonical form: sorted keys, two spaces, UTF-8, a final newline."""
    _check(manifest)
    document = asdict(manifest)
    for name in _SINCE:  # so that agents which do not know a field can read what does not use it
        if not getattr(manifest, name):
            del document[name]
    text = json.dumps(document, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def schema_of(manifest: Manifest) -> int:
    """The oldest schema that holds all of a manifest: the one to write, so that older agents can read it."""
    return max((schema for name, schema in _SINCE.items() if getattr(manifest, name)), default=1)


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
        raise malformed(f"it has {len(data)} bytes; the limit is {MAX_MANIFEST_BYTES}")
    raw = manifest_form.parse(data)
    _check_schema(raw.get("schema"))
    manifest = manifest_form.build(Manifest, raw, "manifest")
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


def _check_schema(schema: Any) -> None:
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise malformed("'schema' is not a positive integer")
    if schema > SCHEMA_VERSION:
        raise ManifestError(
            f"the bundle is newer than this agent: schema {schema}",
            f"this agent understands schema {SCHEMA_VERSION} and older",
            "update edgekit-agent on this device, or build the bundle with an older edgekit",
        )


def _check(manifest: Manifest) -> None:
    """Check what types cannot say."""
    for name, schema in _SINCE.items():
        if getattr(manifest, name) and manifest.schema < schema:
            raise malformed(f"schema {manifest.schema} has no '{name}'")
    for problem in problems(manifest, {MANIFEST_NAME, SIGNATURE_NAME}):
        raise malformed(problem)
