"""A bundle as an artifact of the CNCF ModelPack specification: the image manifest and the config.

One layer a file, raw, so that a file which two bundles share is one blob in the registry. The same bundle
gives the same bytes and therefore the same digest.
Source: github.com/modelpack/model-spec, "Model Format Specification" and "Model Artifact Configuration".
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from device_agent import archive
from device_agent.manifest import MANIFEST_NAME, SIGNATURE_NAME, Manifest
from device_agent.oci.artifact import FILE_PATH, IMAGE_MANIFEST, MODEL_ARTIFACT, MODEL_CONFIG, TITLE
from device_agent.oci.digests import digest_from, digest_of

_LAYER = "application/vnd.cncf.model.{}.v1.raw"
_DOCUMENTS = (".md", ".txt", ".rst", ".html", ".pdf")


@dataclass(frozen=True)
class File:
    """A file of the bundle, as a layer."""

    path: str
    digest: str
    size_bytes: int
    media_type: str

    def descriptor(self) -> dict[str, Any]:
        """The layer in the image manifest."""
        return {
            "mediaType": self.media_type,
            "digest": self.digest,
            "size": self.size_bytes,
            "annotations": {FILE_PATH: self.path, TITLE: self.path},
        }


@dataclass(frozen=True)
class Artifact:
    """What is pushed.

    Attributes:
        files: the layers, in order.
        config: the bytes of the config blob.
        manifest: the bytes of the image manifest.
    """

    files: tuple[File, ...]
    config: bytes
    manifest: bytes


def describe(directory: Path) -> Artifact:
    """Describe the unpacked bundle in ``directory``, whose files were checked."""
    head = archive.read_head(directory)
    files = tuple(_files(head))
    config = _dumps({
        "descriptor": {"name": head.manifest.name, "version": str(head.manifest.version)},
        "config": {"format": "onnx", "precision": head.manifest.precision},
        "modelfs": {"type": "layers", "diff_ids": [file.digest for file in files]},
    })  # fmt: skip
    manifest = _dumps({
        "schemaVersion": 2,
        "mediaType": IMAGE_MANIFEST,
        "artifactType": MODEL_ARTIFACT,
        "config": {"mediaType": MODEL_CONFIG, "digest": digest_of(config), "size": len(config)},
        "layers": [file.descriptor() for file in files],
        "annotations": {
            "org.opencontainers.image.title": head.manifest.name,
            "org.opencontainers.image.version": str(head.manifest.version),
        },
    })  # fmt: skip
    return Artifact(files, config, manifest)


def _files(head: archive.Head) -> Iterable[File]:
    config = _LAYER.format("weight.config")
    yield File(MANIFEST_NAME, digest_of(head.manifest_bytes), len(head.manifest_bytes), config)
    if head.signature is not None:
        yield File(SIGNATURE_NAME, digest_of(head.signature), len(head.signature), config)
    for entry in head.manifest.files:
        kind = _LAYER.format(_kind(entry.path, head.manifest))
        yield File(entry.path, digest_from(entry.sha256), entry.size_bytes, kind)


def _kind(path: str, manifest: Manifest) -> str:
    """The specification's kind of layer: weights, their configuration, data, or documentation."""
    if path in (manifest.golden.inputs, manifest.golden.outputs):
        return "dataset"
    suffix = PurePosixPath(path).suffix.lower()
    if suffix in _DOCUMENTS:
        return "doc"
    return "weight.config" if suffix in (".json", ".toml") else "weight"


def _dumps(document: dict[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
