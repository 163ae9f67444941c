"""Who signed a bundle: OpenSSF Model Signing, key mode.

``model.sig`` is a sigstore bundle (media type v0.3) whose DSSE envelope holds an in-toto statement that
lists the bundle's files with their SHA-256. The independent ``model_signing verify key`` accepts what
``sign`` writes, and ``Trust`` accepts what ``model_signing sign key`` writes. The format's key mode knows
the NIST curves P-256, P-384 and P-521 and no Ed25519; keys that edgekit makes are P-256.

Sources: the DSSE protocol v1.0.0, the in-toto statement v1, and the OpenSSF Model Signing predicate
``https://model_signing/signature/v1.0``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List

from device_agent import archive
from device_agent.errors import BadInput, TrustError
from device_agent.manifest import MANIFEST_NAME, SIGNATURE_NAME, Manifest

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://model_signing/signature/v1.0"
CURVES = ("secp256r1", "secp384r1", "secp521r1")

_log = logging.getLogger(__name__)
_KEY_SUFFIXES = (".pub", ".pem")
_MAX_KEY_BYTES = 64 * 1024


@dataclass(frozen=True)
class PublicKey:
    """A key that may have signed a bundle.

    Attributes:
        name: the key file's name without its suffix.
        fingerprint: SHA-256 of the key's PEM form, in hex; the signature names its key by it.
        key: the key itself.
    """

    name: str
    fingerprint: str
    key: ec.EllipticCurvePublicKey


@dataclass(frozen=True)
class Signer:
    """Who vouches for a bundle; both fields are empty for an unsigned bundle that was let in.

    Attributes:
        name: the name of the trusted key's file, without its suffix.
        fingerprint: SHA-256 of the key's PEM form, in hex.
    """

    name: str = ""
    fingerprint: str = ""

    @property
    def signed(self) -> bool:
        """Whether a trusted key signed the bundle."""
        return bool(self.fingerprint)


@dataclass(frozen=True)
class Trust:
    """Which bundles this device lets in.

    The keys are read at every check, so that a key which is added or removed counts at once.

    Attributes:
        keys_dir: directory with the trusted public keys, ``NAME.pub`` or ``NAME.pem``.
        allow_unsigned: whether a bundle without any signature is let in. One whose signature does not
            verify is refused even then.
    """

    keys_dir: Path
    allow_unsigned: bool = False

    def authenticate(self, head: archive.Head) -> Signer:
        """Check that a trusted key signed exactly the manifest and the files that it lists.

        Only the head is needed: no file is read, so nothing of an untrusted bundle has to be stored.

        Raises:
            TrustError: no signature, an unknown key, or a signature that is wrong or for another bundle.
        """
        if head.signature is None:
            if self.allow_unsigned:
                return Signer()
            raise TrustError(
                f"the bundle {head.manifest.name!r} is not signed",
                f"it has no {SIGNATURE_NAME}, and this device takes signed bundles only",
                "sign it with `edgekit sign`, or set allow_unsigned = true in the agent's configuration",
            )
        return authenticate(head, self.keys())

    def check(self, directory: Path, manifest: Manifest, digest: str) -> Signer:
        """Check the signature of an unpacked bundle and every one of its files.

        Raises:
            TrustError: as ``authenticate``; or a file changed, is missing or is not listed.
        """
        head = archive.read_head(directory)
        if head.digest != digest:
            raise TrustError(
                "the manifest was changed", "its digest is not the expected one", "install the bundle again"
            )
        signer = self.authenticate(head)
        archive.check_files(directory, manifest)
        return signer

    def keys(self) -> List[PublicKey]:
        """Read the trusted keys; none where the directory does not exist.

        A file that holds no usable key is skipped with a warning: a broken file beside the good ones must
        not take the good ones' bundles away.
        """
        found = []
        for path in key_files(self.keys_dir):
            try:
                found.append(load_public_key(path))
            except BadInput as error:
                _log.warning("key ignored: %s: %s", error.what, error.why)
        return found


def key_files(keys_dir: Path) -> List[Path]:
    """List the files that should hold trusted keys, by name; empty where there is no such directory."""
    if not keys_dir.is_dir():
        return []
    return [path for path in sorted(keys_dir.iterdir()) if path.suffix in _KEY_SUFFIXES]


def authenticate(head: archive.Head, keys: List[PublicKey]) -> Signer:
    """Check a bundle's signature against ``keys``.

    Raises:
        TrustError: no signature, none of the keys made it, it is wrong, or it is for another bundle.
    """
    if head.signature is None:
        raise TrustError(
            f"the bundle {head.manifest.name!r} is not signed",
            f"it has no {SIGNATURE_NAME}",
            "sign it with `edgekit sign`",
        )
    envelope = _Envelope.parse(head.signature)
    key = _find_key(envelope.key_hint, keys)
    _check_signature(envelope, key)
    if _signed_files(envelope.payload) != _expected_files(head.manifest, head.digest):
        raise TrustError(
            f"the signature of {head.manifest.name!r} is for another bundle",
            "the files that it lists are not the manifest's",
            "sign the bundle again with `edgekit sign`",
        )
    return Signer(key.name, key.fingerprint)


def key_hint(signature: bytes) -> str:
    """Fingerprint of the key that a signature names; nothing is verified.

    Raises:
        TrustError: it is not a signature in the format.
    """
    return _Envelope.parse(signature).key_hint


def sign(manifest: Manifest, digest: str, private_key: ec.EllipticCurvePrivateKey) -> bytes:
    """Make the content of ``model.sig``; the same key and bundle give the same bytes (RFC 6979)."""
    from cryptography.hazmat.primitives.asymmetric import ec

    payload = _statement(manifest, digest)
    public_key = private_key.public_key()
    algorithm = ec.ECDSA(_hash_for(public_key), deterministic_signing=True)
    document = {
        "mediaType": MEDIA_TYPE,
        "verificationMaterial": {"publicKey": {"hint": fingerprint(public_key)}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [
                {"sig": base64.b64encode(private_key.sign(_pae(payload), algorithm)).decode(), "keyid": ""}
            ],
        },
    }
    return (json.dumps(document, sort_keys=True) + "\n").encode()


def fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """SHA-256 of the key's SubjectPublicKeyInfo in PEM, in hex: the format's hint at the key."""
    from cryptography.hazmat.primitives import serialization

    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(pem).hexdigest()


def load_public_key(path: Path) -> PublicKey:
    """Read a public key in PEM.

    Raises:
        BadInput: unreadable, not a PEM public key, or a curve that the format does not know.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    fix = "give the NAME.pub file that `edgekit keygen NAME` wrote"
    try:
        with path.open("rb") as stream:
            key = serialization.load_pem_public_key(stream.read(_MAX_KEY_BYTES))
    except OSError as error:
        raise BadInput(f"the key {path} cannot be read", str(error.strerror), fix) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise BadInput(f"{path} is not a public key", "it holds no PEM public key", fix) from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in CURVES:
        raise BadInput(f"{path} is not a usable key", f"only the curves {', '.join(CURVES)} are", fix)
    return PublicKey(path.stem, fingerprint(key), key)


# The statement: what is signed


def _expected_files(manifest: Manifest, digest: str) -> Dict[str, str]:
    files = {entry.path: entry.sha256 for entry in manifest.files}
    files[MANIFEST_NAME] = digest
    return files


def _statement(manifest: Manifest, digest: str) -> bytes:
    files = sorted(_expected_files(manifest, digest).items())
    document = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": manifest.name, "digest": {"sha256": _root([sha256 for _, sha256 in files])}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "resources": [{"name": path, "algorithm": "sha256", "digest": sha256} for path, sha256 in files],
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": [SIGNATURE_NAME],
            },
        },
    }
    return json.dumps(document, sort_keys=True).encode()


def _root(digests: List[str]) -> str:
    """The statement's subject: one digest over the files' digests, in the order of the list."""
    return hashlib.sha256(b"".join(bytes.fromhex(item) for item in digests)).hexdigest()


def _signed_files(payload: bytes) -> Dict[str, str]:
    """Read the files and digests of an authenticated statement."""
    try:
        statement = json.loads(payload.decode("utf-8"))
        kinds = (statement["_type"], statement["predicateType"])
        predicate = statement["predicate"]
        serialization = (predicate["serialization"]["method"], predicate["serialization"]["hash_type"])
        resources = predicate["resources"]
        files = {item["name"]: item["digest"] for item in resources}
        algorithms = {item["algorithm"] for item in resources}
        root = _root([item["digest"] for item in resources])
        subjects = [subject["digest"]["sha256"] for subject in statement["subject"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _unreadable("the signed statement is malformed") from error
    if kinds != (STATEMENT_TYPE, PREDICATE_TYPE):
        raise _unreadable(f"the signed statement is of another kind: {kinds[1]}")
    if serialization != ("files", "sha256") or algorithms != {"sha256"}:
        raise _unreadable("the signed statement does not list whole files by SHA-256")
    if len(files) != len(resources) or subjects != [root]:
        raise _unreadable("the signed statement contradicts itself")
    return files


# The envelope: how it is signed


@dataclass(frozen=True)
class _Envelope:
    payload: bytes
    signature: bytes
    key_hint: str

    @classmethod
    def parse(cls, data: bytes) -> _Envelope:
        try:
            document: Any = json.loads(data.decode("utf-8"))
            media_type = document["mediaType"]
            envelope = document["dsseEnvelope"]
            payload_type = envelope["payloadType"]
            (signature,) = envelope["signatures"]
            hint = document["verificationMaterial"]["publicKey"]["hint"]
            parsed = cls(
                payload=base64.b64decode(envelope["payload"], validate=True),
                signature=base64.b64decode(signature["sig"], validate=True),
                key_hint=str(hint),
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise _unreadable("it is not a sigstore bundle with one signature by a key") from error
        if media_type != MEDIA_TYPE or payload_type != PAYLOAD_TYPE:
            raise _unreadable(f"it is of another kind: {media_type}, {payload_type}")
        return parsed


def _find_key(hint: str, keys: List[PublicKey]) -> PublicKey:
    for key in keys:
        if key.fingerprint == hint:
            return key
    known = ", ".join(key.name for key in keys) or "none"
    raise TrustError(
        f"the bundle is signed with an unknown key: {hint[:16]}",
        f"trusted keys: {known}",
        "put the signer's NAME.pub among the trusted keys, or sign the bundle with a trusted key",
    )


def _check_signature(envelope: _Envelope, key: PublicKey) -> None:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key.key.verify(envelope.signature, _pae(envelope.payload), ec.ECDSA(_hash_for(key.key)))
    except InvalidSignature as error:
        raise TrustError(
            "the signature is wrong",
            f"key {key.name!r} did not make it, or it was changed afterwards",
            "get the bundle again from whoever signed it",
        ) from error


def _hash_for(key: ec.EllipticCurvePublicKey) -> Any:
    from cryptography.hazmat.primitives import hashes

    return {256: hashes.SHA256(), 384: hashes.SHA384(), 521: hashes.SHA512()}[key.curve.key_size]


def _pae(payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)


def _unreadable(why: str) -> TrustError:
    return TrustError(f"{SIGNATURE_NAME} cannot be used", why, "sign the bundle again with `edgekit sign`")
