"""Public keys: the NIST curves of the OpenSSF Model Signing format's key mode, in PEM.

Standard library and ``cryptography``; Python 3.8.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, List

from device_agent.errors import BadInput

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

CURVES = ("secp256r1", "secp384r1", "secp521r1")

_SUFFIXES = (".pub", ".pem")
_MAX_KEY_BYTES = 64 * 1024
_FIX = "give the NAME.pub file that `edgekit keygen NAME` wrote"


@dataclass(frozen=True)
class PublicKey:
    """A key that may have signed something.

    Attributes:
        name: the key file's name without its suffix.
        fingerprint: SHA-256 of the key's PEM form, in hex; a signature names its key by it.
        key: the key itself.
    """

    name: str
    fingerprint: str
    key: ec.EllipticCurvePublicKey


def public_key(name: str, key: ec.EllipticCurvePublicKey) -> PublicKey:
    """Give a key its name and its fingerprint."""
    return PublicKey(name, fingerprint(key), key)


def fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """SHA-256 of the key's SubjectPublicKeyInfo in PEM, in hex: the format's hint at the key."""
    return hashlib.sha256(to_pem(key)).hexdigest()


def to_pem(key: ec.EllipticCurvePublicKey) -> bytes:
    """The key's SubjectPublicKeyInfo in PEM."""
    from cryptography.hazmat.primitives import serialization

    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def parse_public_key(name: str, pem: bytes, where: str) -> PublicKey:
    """Read a public key from PEM; ``where`` names it in errors.

    Raises:
        BadInput: not a PEM public key, or a curve that the format does not know.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise BadInput(f"{where} is not a public key", "it holds no PEM public key", _FIX) from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in CURVES:
        raise BadInput(f"{where} is not a usable key", f"only the curves {', '.join(CURVES)} are", _FIX)
    return public_key(name, key)


def load_public_key(path: Path) -> PublicKey:
    """Read a public key file in PEM.

    Raises:
        BadInput: unreadable, not a PEM public key, or a curve that the format does not know.
    """
    try:
        with path.open("rb") as stream:
            pem = stream.read(_MAX_KEY_BYTES)
    except OSError as error:
        raise BadInput(f"the key {path} cannot be read", str(error.strerror), _FIX) from error
    return parse_public_key(path.stem, pem, str(path))


def key_files(keys_dir: Path) -> List[Path]:
    """List the files that should hold trusted keys, by name; empty where there is no such directory."""
    if not keys_dir.is_dir():
        return []
    return [path for path in sorted(keys_dir.iterdir()) if path.suffix in _SUFFIXES]
