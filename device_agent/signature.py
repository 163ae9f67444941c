"""Who signed a bundle: OpenSSF Model Signing, key mode.

``model.sig`` is a sigstore bundle (media type v0.3) whose DSSE envelope holds an in-toto statement that
lists the bundle's files with their SHA-256. The independent ``model_signing verify key`` accepts what
``sign`` writes, and ``Trust`` accepts what ``model_signing sign key`` writes. The format's key mode knows
the NIST curves P-256, P-384 and P-521 and no Ed25519; keys that edgekit makes are P-256.

Sources: the DSSE protocol v1.0.0, the in-toto statement v1, and the OpenSSF Model Signing predicate
``https://model_signing/signature/v1.0``.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Dict, List, Sequence

from device_agent import archive, envelope, json_text, keyring
from device_agent.envelope import STATEMENT_TYPE, Envelope, EnvelopeError
from device_agent.errors import BadInput, TrustError
from device_agent.keyring import KeyRing
from device_agent.keys import PublicKey, key_files, load_public_key
from device_agent.manifest import MANIFEST_NAME, SIGNATURE_NAME, Manifest

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

PREDICATE_TYPE = "https://model_signing/signature/v1.0"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Signer:
    """Who vouches for a bundle; both fields are empty for an unsigned bundle that was let in.

    Attributes:
        name: the name of the trusted key's file, without its suffix.
        fingerprint: SHA-256 of the key's PEM form, in hex.
        retired: whether the key signs nothing new any more; what is installed goes on serving.
    """

    name: str = ""
    fingerprint: str = ""
    retired: bool = False

    @property
    def signed(self) -> bool:
        """Whether a trusted key signed the bundle."""
        return bool(self.fingerprint)


def _no_rotations() -> Sequence[bytes]:
    return ()


@dataclass(frozen=True)
class Trust:
    """Which bundles this device lets in.

    The keys are read at every check, so that a key which is added or removed counts at once.

    Attributes:
        keys_dir: directory with the trusted public keys, ``NAME.pub`` or ``NAME.pem``.
        allow_unsigned: whether a bundle without any signature is let in. One whose signature does not
            verify is refused even then.
        rotations: reads the rotation documents that were accepted, in that order (see ``trust_store``).
    """

    keys_dir: Path
    allow_unsigned: bool = False
    rotations: Callable[[], Sequence[bytes]] = _no_rotations

    def authenticate(self, head: archive.Head) -> Signer:
        """Check that a trusted key signed exactly the manifest and the files that it lists.

        Only the head is needed: no file is read, so nothing of an untrusted bundle has to be stored.

        Raises:
            TrustError: no signature, an unknown or retired key, or a signature that is wrong or for another
                bundle.
        """
        signer = self._identify(head)
        if signer.retired:
            raise TrustError(
                f"the bundle is signed with the retired key {signer.name!r}",
                "another key took its place, and it signs nothing new",
                "sign the bundle with the new key; `edgekit-agent trust` shows the keys that count",
            )
        return signer

    def check(self, directory: Path, manifest: Manifest, digest: str) -> Signer:
        """Check the signature of an unpacked bundle and every one of its files.

        A key that was retired since the bundle was installed is no error here, and told by the result.

        Raises:
            TrustError: as ``authenticate``; or a file changed, is missing or is not listed.
        """
        head = archive.read_head(directory)
        if head.digest != digest:
            raise TrustError(
                "the manifest was changed", "its digest is not the expected one", "install the bundle again"
            )
        signer = self._identify(head)
        archive.check_files(directory, manifest)
        return signer

    def keyring(self) -> KeyRing:
        """Read which keys count.

        A file that holds no usable key is skipped with a warning: a broken file beside the good ones must
        not take the good ones' bundles away.
        """
        found = []
        for path in key_files(self.keys_dir):
            try:
                found.append(load_public_key(path))
            except BadInput as error:
                _log.warning("key ignored: %s: %s", error.what, error.why)
        return keyring.replay(found, self.rotations())

    def _identify(self, head: archive.Head) -> Signer:
        """Who signed a bundle; a retired key is told apart, an unknown one is an error."""
        if head.signature is None and self.allow_unsigned:
            return Signer()
        ring = self.keyring()
        signer = authenticate(head, ring.known())
        return replace(signer, retired=ring.is_retired(signer.fingerprint))


def authenticate(head: archive.Head, keys: List[PublicKey]) -> Signer:
    """Check a bundle's signature against ``keys``.

    Raises:
        TrustError: no signature, none of the keys made it, it is wrong, or it is for another bundle.
    """
    if head.signature is None:
        raise TrustError(
            f"the bundle {head.manifest.name!r} is not signed",
            f"it has no {SIGNATURE_NAME}",
            "sign it with `edgekit sign`; a device lets it in only with allow_unsigned = true",
        )
    sealed = _parse(head.signature)
    key = _find_key(sealed.key_hint, keys)
    if not sealed.is_signed_by(key):
        raise TrustError(
            "the signature is wrong",
            f"key {key.name!r} did not make it, or it was changed afterwards",
            "get the bundle again from whoever signed it",
        )
    if _signed_files(sealed.payload) != _expected_files(head.manifest, head.digest):
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
    return _parse(signature).key_hint


def sign(manifest: Manifest, digest: str, private_key: ec.EllipticCurvePrivateKey) -> bytes:
    """Make the content of ``model.sig``; the same key and bundle give the same bytes (RFC 6979)."""
    return envelope.seal(_statement(manifest, digest), private_key)


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
        statement = json_text.loads(payload)
        kinds = (statement["_type"], statement["predicateType"])
        predicate = statement["predicate"]
        serialization = (predicate["serialization"]["method"], predicate["serialization"]["hash_type"])
        resources = predicate["resources"]
        files = {item["name"]: item["digest"] for item in resources}
        algorithms = {item["algorithm"] for item in resources}
        root = _root([item["digest"] for item in resources])
        subjects = [subject["digest"]["sha256"] for subject in statement["subject"]]
    except (ValueError, KeyError, TypeError) as error:
        raise _unreadable("the signed statement is malformed") from error
    if kinds != (STATEMENT_TYPE, PREDICATE_TYPE):
        raise _unreadable(f"the signed statement is of another kind: {kinds[1]}")
    if serialization != ("files", "sha256") or algorithms != {"sha256"}:
        raise _unreadable("the signed statement does not list whole files by SHA-256")
    if len(files) != len(resources) or subjects != [root]:
        raise _unreadable("the signed statement contradicts itself")
    return files


def _parse(data: bytes) -> Envelope:
    try:
        return envelope.parse(data)
    except EnvelopeError as error:
        raise _unreadable(str(error)) from error


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


def _unreadable(why: str) -> TrustError:
    return TrustError(f"{SIGNATURE_NAME} cannot be used", why, "sign the bundle again with `edgekit sign`")
