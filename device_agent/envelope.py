"""How edgekit signs: a sigstore bundle (media type v0.3) around a DSSE envelope with one signature by a key.

What is signed, an in-toto statement, is the business of ``signature`` (bundles) and ``rotation`` (keys);
their predicate types keep one from passing for the other.

Sources: the DSSE protocol v1.0.0; the sigstore bundle v0.3.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from device_agent import json_text
from device_agent.keys import PublicKey, fingerprint

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"


class EnvelopeError(ValueError):
    """The bytes are not an envelope of this form; the message says why."""


@dataclass(frozen=True)
class Envelope:
    """A signed payload; nothing about it is verified yet.

    Attributes:
        payload: what was signed.
        signature: in DER.
        key_hint: fingerprint of the key that should have made the signature.
    """

    payload: bytes
    signature: bytes
    key_hint: str

    def is_signed_by(self, key: PublicKey) -> bool:
        """Whether ``key`` made the signature, over exactly this payload."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric import ec

        try:
            key.key.verify(self.signature, _pae(self.payload), ec.ECDSA(_hash_for(key.key)))
        except InvalidSignature:
            return False
        return True


def seal(payload: bytes, private_key: ec.EllipticCurvePrivateKey) -> bytes:
    """Sign a payload; the same key and payload give the same bytes (RFC 6979)."""
    from cryptography.hazmat.primitives.asymmetric import ec

    public_key = private_key.public_key()
    algorithm = ec.ECDSA(_hash_for(public_key), deterministic_signing=True)
    signature = private_key.sign(_pae(payload), algorithm)
    document = {
        "mediaType": MEDIA_TYPE,
        "verificationMaterial": {"publicKey": {"hint": fingerprint(public_key)}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
        },
    }
    return (json.dumps(document, sort_keys=True) + "\n").encode()


def parse(data: bytes) -> Envelope:
    """Read what ``seal`` wrote, or another tool of the same format.

    Raises:
        EnvelopeError: it is something else.
    """
    try:
        document: Any = json_text.loads(data)
        media_type = document["mediaType"]
        envelope = document["dsseEnvelope"]
        payload_type = envelope["payloadType"]
        (signature,) = envelope["signatures"]
        hint = document["verificationMaterial"]["publicKey"]["hint"]
        parsed = Envelope(
            payload=_decode(envelope["payload"]),
            signature=_decode(signature["sig"]),
            key_hint=str(hint),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise EnvelopeError("it is not a sigstore bundle with one signature by a key") from error
    if media_type != MEDIA_TYPE or payload_type != PAYLOAD_TYPE:
        raise EnvelopeError(f"it is of another kind: {media_type}, {payload_type}")
    return parsed


def _decode(text: str) -> bytes:
    """Bytes of canonical Base64: bits that nothing uses are zero (RFC 4648, section 3.5)."""
    data = base64.b64decode(text, validate=True)
    if base64.b64encode(data).decode() != text:
        raise ValueError("it is not canonical Base64")
    return data


def _hash_for(key: ec.EllipticCurvePublicKey) -> Any:
    from cryptography.hazmat.primitives import hashes

    return {256: hashes.SHA256(), 384: hashes.SHA384(), 521: hashes.SHA512()}[key.curve.key_size]


def _pae(payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)
