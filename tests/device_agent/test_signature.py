"""Who may put a model on a device."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from hypothesis import given
from hypothesis import strategies as st

from device_agent import archive, envelope, signature
from device_agent import keys as key_module
from device_agent.errors import BadInput, ManifestError, TrustError
from device_agent.signature import Trust
from storage_kit import make_bundle, make_key, sign_bundle, signed_bundle


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """The device's directory of trusted keys."""
    directory = tmp_path / "keys"
    directory.mkdir()
    return directory


def _check(trust: Trust, bundle: Path, expected: archive.Head) -> signature.Signer:
    return trust.check(bundle, expected.manifest, expected.digest)


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda c: c.name)
def test_a_bundle_signed_with_a_trusted_key_is_let_in(tmp_path: Path, keys: Path, curve: Any) -> None:
    """The device says which of its keys vouches for a bundle."""
    head = signed_bundle(tmp_path / "b", make_key(keys, "release", curve))
    make_key(keys, "another")
    signer = _check(Trust(keys), tmp_path / "b", head)
    assert (signer.name, signer.signed) == ("release", True)


def test_signing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    """Signatures are reproducible, like the bundles they are for."""
    key = make_key(None)
    first = signed_bundle(tmp_path / "b", key).signature
    assert sign_bundle(tmp_path / "b", key).signature == first


def _tamper(path: str) -> Callable[[Path], None]:
    def attack(bundle: Path) -> None:
        target = bundle / path
        data = bytearray(target.read_bytes())
        data[len(data) // 2] ^= 1
        target.write_bytes(bytes(data))

    return attack


def _grow(bundle: Path) -> None:
    with (bundle / "model.onnx").open("ab") as stream:
        stream.write(b"more")


def _swap_manifest(bundle: Path) -> None:
    other = bundle.with_name("other")
    make_bundle(other, version=7)
    shutil.copy(str(other / "manifest.json"), str(bundle / "manifest.json"))


def _sign_with_stranger(bundle: Path) -> None:
    sign_bundle(bundle, make_key(None))


def _link_out(bundle: Path) -> None:
    outside = bundle.with_name("outside")
    outside.write_bytes((bundle / "model.onnx").read_bytes())
    (bundle / "model.onnx").unlink()
    (bundle / "model.onnx").symlink_to(outside)


def _edit_signature(**changes: Any) -> Callable[[Path], None]:
    def attack(bundle: Path) -> None:
        document = json.loads((bundle / "model.sig").read_text())
        for path, value in changes.items():
            target = document
            *parents, last = path.split("__")
            for key in parents:
                target = target[key]
            target[last] = value
        (bundle / "model.sig").write_text(json.dumps(document))

    return attack


ATTACKS = {
    "tampered file": (_tamper("model.onnx"), "was changed: model.onnx"),
    "longer file": (_grow, "was changed: model.onnx"),
    "missing file": (lambda b: (b / "model.onnx").unlink(), "is missing: model.onnx"),
    "added file": (lambda b: (b / "extra.so").write_bytes(b"\x7fELF"), "does not list: extra.so"),
    "linked file": (_link_out, "symbolic link"),
    "linked directory": (lambda b: (b / "lib").symlink_to("/usr/lib"), "symbolic link"),
    "swapped manifest": (_swap_manifest, "digest is not the expected one"),
    "stripped signature": (lambda b: (b / "model.sig").unlink(), "is not signed"),
    "wrong key": (_sign_with_stranger, "unknown key"),
    "empty signature": (lambda b: (b / "model.sig").write_bytes(b""), "not a sigstore bundle"),
    "nested signature": (lambda b: (b / "model.sig").write_bytes(b"[" * 9**5), "not a sigstore bundle"),
    "huge signature": (lambda b: (b / "model.sig").write_bytes(bytes(5 << 20)), "too large"),
    "other media type": (_edit_signature(mediaType="text/plain"), "of another kind"),
    "other payload": (
        _edit_signature(dsseEnvelope__payload=base64.b64encode(b"{}").decode()),
        "the signature is wrong",
    ),
    "two signatures": (
        _edit_signature(dsseEnvelope__signatures=[{"sig": ""}, {"sig": ""}]),
        "one signature by a key",
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_with_its_own_reason(tmp_path: Path, keys: Path, name: str) -> None:
    """Whatever was done to a signed bundle, the device refuses it and says what it found."""
    attack, reason = ATTACKS[name]
    head = signed_bundle(tmp_path / "b", make_key(keys))
    attack(tmp_path / "b")
    with pytest.raises(TrustError) as caught:
        _check(Trust(keys), tmp_path / "b", head)
    assert reason in str(caught.value)


def test_a_signature_for_another_bundle_does_not_count(tmp_path: Path, keys: Path) -> None:
    """A signature that is moved from one bundle to another is refused, though the key is trusted."""
    key = make_key(keys)
    signed_bundle(tmp_path / "good", key)
    head = make_bundle(tmp_path / "evil", extra={"model.onnx": b"evil"})
    shutil.copy(str(tmp_path / "good" / "model.sig"), str(tmp_path / "evil" / "model.sig"))
    with pytest.raises(TrustError, match="for another bundle"):
        _check(Trust(keys), tmp_path / "evil", head)


def test_unsigned_bundles_need_a_setting(tmp_path: Path, keys: Path) -> None:
    """allow_unsigned lets in what has no signature, and nothing whose signature is wrong."""
    head = make_bundle(tmp_path / "b")
    assert not _check(Trust(keys, allow_unsigned=True), tmp_path / "b", head).signed
    sign_bundle(tmp_path / "b", make_key(None))
    with pytest.raises(TrustError, match="unknown key"):
        _check(Trust(keys, allow_unsigned=True), tmp_path / "b", head)


def test_unsigned_bundles_are_checked_too(tmp_path: Path, keys: Path) -> None:
    """A damaged file is found whether or not the bundle is signed."""
    head = make_bundle(tmp_path / "b")
    _tamper("model.onnx")(tmp_path / "b")
    with pytest.raises(TrustError, match="was changed"):
        _check(Trust(keys, allow_unsigned=True), tmp_path / "b", head)


def test_keys_are_read_anew_and_bad_ones_do_no_harm(tmp_path: Path, keys: Path) -> None:
    """A removed key counts no more at once; a broken key file beside a good one is ignored."""
    head = signed_bundle(tmp_path / "b", make_key(keys))
    (keys / "broken.pub").write_text("not a key")
    trust = Trust(keys)
    assert _check(trust, tmp_path / "b", head).name == "release"
    (keys / "release.pub").unlink()
    with pytest.raises(TrustError, match="trusted keys: none"):
        _check(trust, tmp_path / "b", head)


def test_keys_of_other_kinds_are_refused(tmp_path: Path) -> None:
    """Ed25519 is not part of the signature format's key mode, and the error says which curves are."""
    public = ed25519.Ed25519PrivateKey.generate().public_key()
    path = tmp_path / "ed.pub"
    path.write_bytes(
        public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    with pytest.raises(BadInput, match="secp256r1"):
        key_module.load_public_key(path)


@given(st.data())
def test_no_change_to_a_signature_survives(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Flipping any byte of model.sig is refused, or leaves a document that says the same."""
    base = tmp_path_factory.getbasetemp() / "flip"
    if not base.exists():
        base.mkdir()
        signed_bundle(base / "b", make_key(base / "keys"))
    head = archive.read_head(base / "b")
    raw = bytearray(head.signature or b"")
    index = data.draw(st.integers(0, len(raw) - 1))
    raw[index] ^= data.draw(st.integers(1, 255))
    changed = archive.Head(head.manifest, head.manifest_bytes, head.digest, bytes(raw))
    try:
        Trust(base / "keys").authenticate(changed)
    except (TrustError, ManifestError):
        return
    before, after = json.loads((head.signature or b"").decode()), json.loads(bytes(raw).decode())
    assert after["dsseEnvelope"]["payload"] == before["dsseEnvelope"]["payload"]


@pytest.mark.parametrize("payload", [b"1", b"22"])
def test_bits_that_nothing_uses_cannot_be_changed_either(payload: bytes) -> None:
    """The last character of Base64 may have bits that are thrown away; setting them is refused."""
    sealed = envelope.seal(payload, ec.generate_private_key(ec.SECP256R1()))
    text = base64.b64encode(payload).decode()
    last = text.rstrip("=")[-1]
    changed = text.replace(last, chr(ord(last) + 1))
    assert base64.b64decode(changed, validate=True) == payload
    assert envelope.parse(sealed).payload == payload
    with pytest.raises(envelope.EnvelopeError):
        envelope.parse(sealed.replace(text.encode(), changed.encode()))


def _model_signing() -> str:
    """The independent implementation, if this environment has it."""
    found = shutil.which("model_signing") or shutil.which(
        str(Path(sys.executable).with_name("model_signing"))
    )
    if found is None:
        pytest.skip("the independent model-signing package is not installed here")
    return found


def test_the_independent_tool_accepts_our_signature(tmp_path: Path, keys: Path) -> None:
    """``model_signing verify key`` verifies a bundle that edgekit signed, and refuses a changed one."""
    tool = _model_signing()
    signed_bundle(tmp_path / "b", make_key(keys))
    command = [tool, "verify", "key", str(tmp_path / "b")]
    command += ["--signature", str(tmp_path / "b" / "model.sig"), "--public_key", str(keys / "release.pub")]
    assert subprocess.run(command).returncode == 0
    _tamper("model.onnx")(tmp_path / "b")
    assert subprocess.run(command).returncode != 0


def test_we_accept_the_independent_tools_signature(tmp_path: Path, keys: Path) -> None:
    """A bundle that ``model_signing sign key`` signed is let in."""
    tool = _model_signing()
    key = make_key(keys)
    (tmp_path / "key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    head = make_bundle(tmp_path / "b")
    command = [tool, "sign", "key", str(tmp_path / "b"), "--private_key", str(tmp_path / "key")]
    subprocess.run([*command, "--signature", str(tmp_path / "b" / "model.sig")], check=True)
    assert _check(Trust(keys), tmp_path / "b", head).name == "release"
