"""Digests as registries write them: ``sha256:`` and the hash in hex."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

_PREFIX = "sha256:"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_CHUNK_BYTES = 1024 * 1024


def digest_of(data: bytes) -> str:
    """The digest of some bytes."""
    return _PREFIX + hashlib.sha256(data).hexdigest()


def digest_of_file(path: Path) -> str:
    """The digest of a file's content.

    Raises:
        OSError: it cannot be read.
    """
    sha256 = hashlib.sha256()
    with path.open("rb") as stream:
        for chunk in iter(lambda: stream.read(_CHUNK_BYTES), b""):
            sha256.update(chunk)
    return _PREFIX + sha256.hexdigest()


def digest_from(sha256: str) -> str:
    """The digest for a SHA-256 in hex."""
    return _PREFIX + sha256


def valid_digest(text: object) -> bool:
    """Whether this is a SHA-256 digest; other algorithms are not taken."""
    return isinstance(text, str) and bool(_DIGEST.fullmatch(text))
