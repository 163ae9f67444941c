"""Keys change hands: a trusted key names its successor, and may retire."""

from __future__ import annotations

import base64
import json
import logging
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from device_agent import envelope, keyring, keys, rotation, trust_store
from device_agent.errors import BadInput, DowngradeError, Refused, TrustError
from device_agent.keyring import KeyRing
from device_agent.lifecycle import Lifecycle
from device_agent.signature import Trust
from device_agent.store import Store
from storage_kit import FakeModels, make_bundle, make_key, public_of, rotation_to, sign_bundle, signed_bundle


class Device:
    """A device that trusts the key ``root``; ``second`` and ``third`` are keys that it does not know yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.keys: Dict[str, Any] = {"root": make_key(path / "keys", "root")}
        self.keys.update({name: make_key(None) for name in ("second", "third", "stranger")})
        self.start()

    def start(self) -> None:
        """Start the agent, with nothing in memory."""
        self.models = FakeModels()
        self.store = Store(self.path / "state")
        trust = Trust(self.path / "keys")
        self.lifecycle = Lifecycle(self.store, trust, self.models)  # type: ignore[arg-type]  # the double
        self.lifecycle.restore()

    def restart(self) -> None:
        """Start it again."""
        self.store.close()
        self.start()

    def rotate(self, signer: str, new: str, serial: int, retire: bool = False) -> Any:
        """Hand over a rotation document."""
        return self.lifecycle.rotate(self.document(signer, new, serial, retire))

    def document(self, signer: str, new: str, serial: int, retire: bool = False) -> bytes:
        """Make a rotation document."""
        return rotation_to(self.keys[new], self.keys[signer], serial, new, retire)

    def install(self, version: int, key: str, **options: Any) -> str:
        """Make a bundle, sign it, install it; return its digest."""
        path = self.path / f"{version}-{key}"
        signed_bundle(path, self.keys[key], version=version)
        return self.lifecycle.install(path, **options).digest

    def standing(self) -> Dict[str, bool]:
        """The keys that count or counted: whether each is usable."""
        return {key["name"]: not key["retired"] for key in self.lifecycle.trusted_keys()}

    def trust_file(self, name: str) -> None:
        """Put a key among the files."""
        (self.path / "keys" / f"{name}.pub").write_bytes(keys.to_pem(self.keys[name].public_key()))

    @property
    def serving(self) -> Any:
        """Digest of what serves; None: nothing."""
        loaded = self.models.get("demo")
        return None if loaded is None else loaded.digest


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    """A device with nothing installed."""
    made = Device(tmp_path)
    yield made
    made.store.close()


def test_a_trusted_key_names_another(device: Device) -> None:
    """After a rotation both keys sign, also after a restart; a repeated document changes nothing."""
    with pytest.raises(TrustError, match="unknown key"):
        device.install(1, "second")
    taken = device.rotate("root", "second", 10)
    assert (taken.name, taken.serial, taken.retired, taken.changed) == ("second", 10, (), True)
    assert not device.rotate("root", "second", 10).changed
    device.restart()
    assert device.standing() == {"root": True, "second": True}
    assert device.install(1, "second") == device.serving
    assert device.install(2, "root") == device.serving


def test_a_successor_inherits_the_floor(device: Device) -> None:
    """What the old key released is the limit for the new one too, and the other way round."""
    device.install(5, "root")
    device.rotate("root", "second", 1)
    with pytest.raises(DowngradeError, match="committed: 5"):
        device.install(4, "second")
    device.install(7, "second")
    with pytest.raises(DowngradeError, match="committed: 7"):
        device.install(6, "root")


def test_a_retired_key_signs_nothing_new(device: Device) -> None:
    """With --retire the old key's bundles are refused from then on, with a reason of their own."""
    taken = device.rotate("root", "second", 1, retire=True)
    assert taken.retired == ("root",)
    with pytest.raises(TrustError, match="retired key 'root'"):
        device.install(1, "root")
    assert device.install(1, "second") == device.serving


def test_what_a_retired_key_signed_serves_on(device: Device, caplog: pytest.LogCaptureFixture) -> None:
    """No device goes dark by a rotation: what was committed serves, may be rolled back to, and warns."""
    old, new = device.install(1, "root"), device.install(2, "root")
    device.rotate("root", "second", 1, retire=True)
    with caplog.at_level(logging.WARNING):
        device.restart()
    assert device.serving == new
    assert any("retired key root" in record.getMessage() for record in caplog.records)
    assert device.lifecycle.rollback("demo").digest == old == device.serving


def test_what_a_retired_key_signed_and_was_only_stored_stays_out(device: Device) -> None:
    """A version that waits in the store is new: its key has to count when it is activated."""
    stored = device.install(1, "root", activate=False)
    device.rotate("root", "second", 1, retire=True)
    with pytest.raises(TrustError, match="retired key"):
        device.lifecycle.activate(stored)


def test_a_bundle_that_is_signed_again_with_the_new_key_comes_in(device: Device) -> None:
    """The same bundle under the new key's signature is the same version, and warns no more."""
    digest = device.install(1, "root")
    device.rotate("root", "second", 1, retire=True)
    sign_bundle(device.path / "1-root", device.keys["second"])
    assert device.lifecycle.install(device.path / "1-root").signer == "second"
    assert device.serving == digest


def test_rotations_follow_each_other(device: Device) -> None:
    """A successor names the next one; retiring retires all that came before, whoever signs."""
    device.rotate("root", "second", 1)
    device.rotate("second", "third", 2, retire=True)
    device.restart()
    assert device.standing() == {"root": False, "second": False, "third": True}


def test_the_root_can_retire_a_successor_that_was_stolen(device: Device) -> None:
    """A key that signs with --retire for a third one shuts the second out."""
    device.rotate("root", "second", 1)
    device.rotate("root", "third", 2, retire=True)
    assert device.standing() == {"root": False, "second": False, "third": True}


REFUSED = {
    "replayed": ("root", "second", 1, "is old: it has serial 1"),
    "equal serial": ("root", "stranger", 5, "is old: it has serial 5"),
    "unknown signer": ("stranger", "third", 9, "signed with an unknown key"),
    "known already": ("root", "third", 9, "is trusted already"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_rotation_that_may_not_be_is_refused(device: Device, name: str) -> None:
    """Each document that does not come in order, from a key that counts, has a reason of its own."""
    device.rotate("root", "second", 1)
    device.rotate("root", "third", 5)
    before = _tree(device.path / "state")
    signer, new, serial, reason = REFUSED[name]
    with pytest.raises(TrustError) as caught:
        device.rotate(signer, new, serial)
    assert reason in caught.value.what
    assert _tree(device.path / "state") == before


def test_a_retired_key_neither_signs_nor_comes_back(device: Device) -> None:
    """Retirement is final on a device: no later document undoes it."""
    device.rotate("root", "second", 1, retire=True)
    with pytest.raises(TrustError, match="signed with the retired key"):
        device.rotate("root", "third", 2)
    with pytest.raises(TrustError, match="does not come back"):
        device.rotate("second", "root", 2)
    device.trust_file("second")
    device.restart()
    assert device.standing() == {"root": False, "second": True}


def test_withdrawing_the_root_withdraws_what_it_named(device: Device) -> None:
    """The files are the root: without the key's file its successors count no more, with it again they do."""
    device.rotate("root", "second", 1)
    pem = (device.path / "keys" / "root.pub").read_bytes()
    (device.path / "keys" / "root.pub").unlink()
    assert device.standing() == {}
    with pytest.raises(TrustError, match="unknown key"):
        device.install(1, "second")
    (device.path / "keys" / "root.pub").write_bytes(pem)
    assert device.standing() == {"root": True, "second": True}


def test_a_successor_that_becomes_a_file_keeps_its_floor(device: Device) -> None:
    """An image whose key files were brought up to date serves on, and is still no way back."""
    device.install(5, "root")
    device.rotate("root", "second", 1, retire=True)
    device.install(6, "second")
    device.trust_file("second")
    (device.path / "keys" / "root.pub").unlink()
    device.restart()
    assert (device.standing(), device.serving is not None) == ({"second": True}, True)
    with pytest.raises(DowngradeError, match="committed: 6"):
        device.install(5, "second")


def test_a_wiped_state_returns_to_the_files(device: Device) -> None:
    """A factory reset leaves the keys of the files, and only those."""
    device.rotate("root", "second", 1, retire=True)
    (device.path / "state" / "trust" / "rotations.json").unlink()
    assert device.standing() == {"root": True}


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"documents": 1}', b'{"documents": ["?"]}'])
def test_a_damaged_record_leaves_the_files(device: Device, content: bytes) -> None:
    """If the rotations cannot be read, the keys of the files still count."""
    device.rotate("root", "second", 1)
    (device.path / "state" / "trust" / "rotations.json").write_bytes(content)
    assert device.standing() == {"root": True}
    device.rotate("root", "third", 2)
    assert device.standing() == {"root": True, "third": True}


def test_the_agents_own_disk_cannot_make_a_key_trusted(device: Device) -> None:
    """What is stored is verified again at every reading: a document slipped in by hand adds nothing."""
    device.rotate("root", "second", 1)
    path = device.path / "state" / "trust" / "rotations.json"
    forged = [device.document("stranger", "third", 2).decode(), device.document("root", "third", 1).decode()]
    path.write_text(json.dumps({"documents": [*json.loads(path.read_text())["documents"], *forged]}))
    assert device.standing() == {"root": True, "second": True}


def test_the_number_of_rotations_is_bounded(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that signs without end cannot fill the disk."""
    monkeypatch.setattr(trust_store, "MAX_ROTATIONS", 1)
    device.rotate("root", "second", 1)
    with pytest.raises(Refused, match="no more rotation documents"):
        device.rotate("root", "third", 2)


# The document


def _signed_statement(key: Any, **changes: Any) -> bytes:
    """A rotation document with some of its statement changed, and rightly signed."""
    new = public_of(ec.generate_private_key(ec.SECP256R1()), "next")
    sealed = envelope.parse(rotation.make(new, 1, False, key))
    statement = json.loads(sealed.payload.decode())
    for path, value in changes.items():
        *parents, last = path.split("__")
        target = statement
        for part in parents:
            target = target[int(part) if part.isdigit() else part]
        target[last] = value
    return envelope.seal(json.dumps(statement).encode(), key)


@pytest.mark.parametrize(
    "changes",
    [
        {"predicate__serial": 0},
        {"predicate__serial": 1.0},
        {"predicate__serial": True},
        {"predicate__serial": 2**63},
        {"predicate__serial": "1"},
        {"predicate__retiresOlder": 0},
        {"predicate__more": 1},
        {"predicate__publicKey": "no key"},
        {"predicate__publicKey": 1},
        {"predicate": []},
        {"predicateType": "https://model_signing/signature/v1.0"},
        {"subject": []},
        {"subject__0__name": "../../etc"},
        {"subject__0__name": 1},
        {"subject__0__digest": {"sha256": "0" * 64}},
        {"_type": "https://in-toto.io/Statement/v0.1"},
    ],
    ids=str,
)
def test_a_statement_has_one_form(changes: Dict[str, Any]) -> None:
    """A signed statement that says something else, or more, is not taken for a rotation."""
    with pytest.raises(TrustError, match="not a usable rotation document"):
        rotation.parse(_signed_statement(make_key(None), **changes))


@pytest.mark.parametrize("data", [b"", b"\xff", b"[]", b"{}", b"[" * 9000, bytes(20_000)], ids=len)
def test_what_is_no_document_is_refused(data: bytes) -> None:
    """Whatever file is handed over, it is an error that says so."""
    with pytest.raises(TrustError, match="not a usable rotation document"):
        rotation.parse(data)


def test_a_bundles_signature_is_no_rotation_and_the_other_way_round(device: Device) -> None:
    """The two kinds of signed statement cannot stand in for each other."""
    head = signed_bundle(device.path / "b", device.keys["root"])
    with pytest.raises(TrustError, match="not a usable rotation document"):
        device.lifecycle.rotate(head.signature or b"")
    make_bundle(device.path / "c")
    (device.path / "c" / "model.sig").write_bytes(device.document("root", "second", 1))
    with pytest.raises(TrustError, match="malformed"):
        device.lifecycle.install(device.path / "c")


def test_a_changed_document_is_refused(device: Device) -> None:
    """A document whose payload was changed after it was signed does not count."""
    document = json.loads(device.document("root", "second", 1).decode())
    other = json.loads(device.document("stranger", "third", 1).decode())
    document["dsseEnvelope"]["payload"] = other["dsseEnvelope"]["payload"]
    with pytest.raises(TrustError, match="rotation document's signature is wrong"):
        device.lifecycle.rotate(json.dumps(document).encode())
    payload = base64.b64decode(other["dsseEnvelope"]["payload"])
    assert b"third" in payload


def test_what_cannot_be_said_is_not_signed() -> None:
    """A serial or a name that no device would take is refused where the document is made."""
    key = make_key(None)
    with pytest.raises(BadInput, match="serial"):
        rotation.make(public_of(key, "k"), 0, False, key)
    with pytest.raises(BadInput, match="name"):
        rotation.make(public_of(key, "../k"), 1, False, key)


# Any order of rotations

_POOL = [ec.generate_private_key(ec.SECP256R1()) for _ in range(4)]
_NAMES = [keys.fingerprint(key.public_key()) for key in _POOL]
STEPS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 6), st.booleans()), max_size=8
)


@given(STEPS)
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_any_order_of_rotations_keeps_the_rules(steps: List[Tuple[int, int, int, bool]]) -> None:
    """However documents come, retired keys stay retired, serials rise, and a replay gives the same keys."""
    files = [public_of(_POOL[0], "k0"), public_of(_POOL[1], "k1")]
    ring, taken = keyring.replay(files, []), []
    for signer, new, serial, retire in steps:
        document = rotation_to(_POOL[new], _POOL[signer], serial, f"k{new}", retire)
        try:
            after = ring.accepted(rotation.parse(document))
        except TrustError:
            continue
        taken.append(document)
        assert _retired(ring) <= _retired(after)
        assert set(ring.keys) < set(after.keys)
        assert not ring.is_retired(_NAMES[signer])
        assert max(after.serials.values()) >= serial
        assert not after.is_retired(_NAMES[new])
        ring = after
    assert keyring.replay(files, taken) == ring
    for name in ring.keys:
        assert name in ring.lineage(name)


def _retired(ring: KeyRing) -> Any:
    return {name for name, key in ring.keys.items() if key.retired}


def _tree(root: Path) -> Dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
