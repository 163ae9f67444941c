"""Make keys and name their successors; sign bundles and verify them, in both forms.

The signature format is OpenSSF Model Signing (see ``device_agent.signature``); keys are P-256 in PEM.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from device_agent import archive, keys, rotation, signature
from device_agent.manifest import SIGNATURE_NAME
from edgekit.bundle import bundle_errors, open_bundle, write_atomically
from edgekit.errors import BadInput

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

_KEY_FIX = "give the NAME.key file that `edgekit keygen NAME` wrote"


def keygen(name: Path) -> tuple[Path, Path]:
    """Make a key pair.

    Args:
        name: where to; ``.key`` (readable by its owner only) and ``.pub`` are appended.

    Returns:
        The paths of the private and the public key.

    Raises:
        BadInput: one of the files exists, or cannot be written.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    private_path, public_path = Path(f"{name}.key"), Path(f"{name}.pub")
    for path in (private_path, public_path):
        if path.exists():
            raise BadInput(
                f"{path} exists already",
                "a key that is overwritten can never sign for its devices again",
                "choose another name",
            )
    _write_new(private_path, private, 0o600)
    _write_new(public_path, public, 0o644)
    return private_path, public_path


def sign(bundle: Path, key: Path) -> signature.Signer:
    """Sign a bundle in place, replacing a signature that it may have.

    Args:
        bundle: the directory or the single file.
        key: the private key in PEM.

    Raises:
        BadInput: the bundle is damaged, or the key is not a usable private key.
    """
    private_key = _load_private_key(key)
    with open_bundle(bundle) as opened, bundle_errors():
        data = signature.sign(opened.manifest, opened.digest, private_key)
        if bundle.is_dir():
            write_atomically(bundle / SIGNATURE_NAME, data)
        else:
            write_atomically(opened.directory / SIGNATURE_NAME, data)
            archive.pack(opened.directory, bundle)
    return signature.Signer(key.stem, keys.fingerprint(private_key.public_key()))


def verify(bundle: Path, key: Path) -> signature.Signer:
    """Verify that ``key`` signed the bundle and that every file is as it was then.

    Args:
        bundle: the directory or the single file.
        key: the public key in PEM.

    Raises:
        BadInput: it is not signed, another key signed it, or something in it was changed.
    """
    with bundle_errors():
        signer = signature.authenticate(archive.read_head(bundle), [keys.load_public_key(key)])
    with open_bundle(bundle):
        return signer


def rotate(old: Path, new: Path, out: Path, *, retire: bool, serial: int | None = None) -> rotation.Rotation:
    """Write a rotation document: devices that trust ``old`` trust ``new`` from then on.

    Args:
        old: the private key that devices trust now, in PEM.
        new: the public key that they shall trust.
        out: the document; a file that is there is replaced.
        retire: whether ``old``, and every other key that rotations connect with it, signs nothing new then.
        serial: has to be above that of every document before; None: the seconds since 1970, by this host's
            clock.

    Raises:
        BadInput: a key is not usable, both are one pair, or the document cannot be written.
    """
    private_key = _load_private_key(old)
    with bundle_errors():
        added = keys.load_public_key(new)
    if keys.fingerprint(private_key.public_key()) == added.fingerprint:
        raise BadInput(
            f"{new} is the public half of {old}",
            "a rotation names another key",
            "make one with `edgekit keygen NAME`",
        )
    with bundle_errors():
        document = rotation.make(added, int(time.time()) if serial is None else serial, retire, private_key)
    try:
        write_atomically(out, document)
    except OSError as error:
        raise BadInput(
            f"{out} cannot be written", error.strerror or str(error), "choose another place"
        ) from error
    return rotation.parse(document)


def _load_private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise BadInput(f"the key {path} cannot be read", str(error.strerror), _KEY_FIX) from error
    except TypeError as error:
        raise BadInput(
            f"the key {path} is encrypted", "edgekit asks for no password", "decrypt it with `openssl ec`"
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise BadInput(f"{path} is not a private key", "it holds no PEM private key", _KEY_FIX) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name not in keys.CURVES:
        curves = ", ".join(keys.CURVES)
        raise BadInput(f"{path} cannot sign", f"the signature format knows the curves {curves}", _KEY_FIX)
    return key


def _write_new(path: Path, data: bytes, mode: int) -> None:
    """Write a file that must not exist; it never has more permissions than ``mode``."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise BadInput(
            f"the key {path} cannot be written", str(error.strerror), "choose another place"
        ) from error
