"""Rotation documents: a trusted key says which key is trusted from now on.

The document is an envelope (see ``envelope``) around an in-toto statement whose subject is the new key:

    {"_type": "https://in-toto.io/Statement/v1",
     "subject": [{"name": "release-2", "digest": {"sha256": FINGERPRINT OF THE NEW KEY}}],
     "predicateType": "https://edgekit/key-rotation/v1",
     "predicate": {"publicKey": PEM, "retiresOlder": false, "serial": 1764000000}}

``serial`` rises from one document of a key and its successors to the next, so that an old document cannot
be played again; no clock on the device is asked.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict

from device_agent import envelope, json_text
from device_agent.envelope import STATEMENT_TYPE, Envelope, EnvelopeError
from device_agent.errors import BadInput, TrustError
from device_agent.keys import PublicKey, parse_public_key, to_pem
from device_agent.manifest_checks import valid_name

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

PREDICATE_TYPE = "https://edgekit/key-rotation/v1"
MAX_DOCUMENT_BYTES = 16 * 1024
MAX_SERIAL = 2**63 - 1


@dataclass(frozen=True)
class Rotation:
    """What a rotation document says; nothing about it is verified yet.

    Attributes:
        added: the new key.
        serial: rises with every document of a key and its successors.
        retires_older: whether the new key is the only one of them that signs from now on.
        envelope: what was signed, and by whom.
    """

    added: PublicKey
    serial: int
    retires_older: bool
    envelope: Envelope

    @property
    def signer(self) -> str:
        """Fingerprint of the key that should have signed the document."""
        return self.envelope.key_hint


def make(
    added: PublicKey, serial: int, retires_older: bool, private_key: ec.EllipticCurvePrivateKey
) -> bytes:
    """Make a rotation document, signed with a key that devices trust.

    Raises:
        BadInput: the serial or the new key's name is out of bounds.
    """
    if not 1 <= serial <= MAX_SERIAL:
        raise BadInput("the serial is out of bounds", f"it is {serial}", f"give 1 to {MAX_SERIAL}")
    if not valid_name(added.name):
        raise BadInput(
            "the new key's name cannot be used",
            f"{added.name!r} is not 1 to 64 letters, digits, '.', '_' or '-'",
            "rename its file",
        )
    payload = json.dumps(_statement(added, serial, retires_older), sort_keys=True).encode()
    return envelope.seal(payload, private_key)


def parse(data: bytes) -> Rotation:
    """Read a rotation document; its signature is for ``keyring`` to verify.

    Raises:
        TrustError: it is not a rotation document, or too large for one.
    """
    if len(data) > MAX_DOCUMENT_BYTES:
        raise _unreadable(f"it has {len(data)} bytes; the limit is {MAX_DOCUMENT_BYTES}")
    try:
        sealed = envelope.parse(data)
        statement: Any = json_text.loads(sealed.payload)
        predicate = statement["predicate"]
        added = parse_public_key(
            statement["subject"][0]["name"], predicate["publicKey"].encode(), "the new key"
        )
        serial, retires_older = predicate["serial"], predicate["retiresOlder"]
        expected = _statement(added, serial, retires_older)
    except EnvelopeError as error:
        raise _unreadable(str(error)) from error
    except (ValueError, KeyError, TypeError, AttributeError, LookupError) as error:
        raise _unreadable("its statement is not about a key") from error
    except BadInput as error:
        raise _unreadable(error.why) from error
    # Comparing with what ``make`` would have said leaves nothing to a lenient reading.
    exact = type(serial) is int and type(retires_older) is bool and isinstance(added.name, str)
    if statement != expected or not exact:
        raise _unreadable("its statement contradicts itself or says more than it may")
    if not 1 <= serial <= MAX_SERIAL or not valid_name(added.name):
        raise _unreadable("its serial or the new key's name is out of bounds")
    return Rotation(added, serial, retires_older, sealed)


def read_text(path: Path) -> str:
    """Read the file that ``edgekit rotate-key`` wrote, as it is sent to the agent.

    Raises:
        BadInput: it cannot be read.
        TrustError: it is no rotation document.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_DOCUMENT_BYTES + 1)
    except OSError as error:
        raise BadInput(
            f"{path} cannot be read",
            error.strerror or str(error),
            "give the file that `edgekit rotate-key` wrote",
        ) from error
    parse(data)
    return data.decode("utf-8")


def _statement(added: PublicKey, serial: int, retires_older: bool) -> Dict[str, Any]:
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": added.name, "digest": {"sha256": added.fingerprint}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "publicKey": to_pem(added.key).decode(),
            "serial": serial,
            "retiresOlder": retires_older,
        },
    }


def _unreadable(why: str) -> TrustError:
    return TrustError(
        "the file is not a usable rotation document", why, "make it again with `edgekit rotate-key`"
    )
