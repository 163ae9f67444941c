"""Bundles as OCI artifacts, in the CNCF ModelPack format: one layer a file, uncompressed.

The layers' names say only which of them are ``manifest.json`` and ``model.sig``. Everything else follows from
the bundle's own manifest, which the signature covers: it names every file with its SHA-256, and a registry
stores blobs under theirs. No path in an artifact is ever used as one.

Sources: the OCI image specification 1.1 and the ModelPack specification (github.com/modelpack/model-spec).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, Mapping, Tuple

from device_agent import json_text
from device_agent.errors import BadInput
from device_agent.manifest import MANIFEST_NAME, Manifest
from device_agent.manifest_checks import MAX_FILES
from device_agent.oci.digests import digest_from, valid_digest

IMAGE_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
MODEL_ARTIFACT = "application/vnd.cncf.model.manifest.v1+json"
MODEL_CONFIG = "application/vnd.cncf.model.config.v1+json"
FILE_PATH = "org.cncf.model.filepath"
TITLE = "org.opencontainers.image.title"  # by which `oras` names files

MAX_ARTIFACT_BYTES = 4 * 1024 * 1024  # what registries must take, says the distribution specification
_MAX_LAYERS = MAX_FILES + 2


@dataclass(frozen=True)
class Layer:
    """A blob that the artifact refers to."""

    digest: str
    size_bytes: int


@dataclass(frozen=True)
class Artifact:
    """An artifact's manifest, as far as it matters here.

    Attributes:
        named: layers by the file path or the title that their annotations give.
        sizes: size of every layer in bytes, by digest.
    """

    named: Mapping[str, Layer]
    sizes: Mapping[str, int]

    def layer(self, name: str) -> Layer:
        """The layer of ``manifest.json``.

        Raises:
            BadInput: there is none.
        """
        if name not in self.named:
            raise _no_bundle(f"it has no layer named {name}")
        return self.named[name]

    def require_files(self, manifest: Manifest) -> None:
        """Check that the artifact holds every file of a bundle.

        Raises:
            BadInput: a file is missing or has another size.
        """
        for entry in manifest.files:
            if self.sizes.get(digest_from(entry.sha256)) != entry.size_bytes:
                raise _no_bundle(f"it lacks {entry.path}, which {MANIFEST_NAME} lists")


def parse(data: bytes) -> Artifact:
    """Read an image manifest.

    Raises:
        BadInput: it is malformed, of another kind, or has too many layers.
    """
    try:
        document = json_text.loads(data)
        if document.get("mediaType", IMAGE_MANIFEST) not in (IMAGE_MANIFEST, DOCKER_MANIFEST):
            raise _no_bundle(f"it is of another kind: {str(document['mediaType'])[:200]}")
        raw = document["layers"]
        if len(raw) > _MAX_LAYERS:
            raise _no_bundle(f"it has more than {_MAX_LAYERS} layers")
        layers = [_layer(item) for item in raw]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _no_bundle("its manifest is malformed") from error
    named: Dict[str, Layer] = {}
    for name, layer in layers:
        if not name:
            continue
        if name in named and named[name] != layer:
            raise _no_bundle(f"it has two layers named {name[:200]}")
        named[name] = layer
    return Artifact(named, {layer.digest: layer.size_bytes for _, layer in layers})


def _layer(raw: Any) -> Tuple[str, Layer]:
    annotations = raw.get("annotations") or {}
    name = annotations.get(FILE_PATH, annotations.get(TITLE, ""))
    digest, size_bytes = raw["digest"], raw["size"]
    if not valid_digest(digest) or type(size_bytes) is not int or size_bytes < 0:
        raise _no_bundle("a layer has no SHA-256 or no size")
    return str(name), Layer(digest, size_bytes)


def _no_bundle(why: str) -> BadInput:
    return BadInput(
        "this artifact is not a bundle",
        why,
        "give the reference of an artifact that `edgekit push` made",
    )
