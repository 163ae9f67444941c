"""Keys, signatures and their verification on the host."""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from device_agent import archive, rotation
from device_agent.errors import TrustError
from device_agent.manifest import Contract, Golden, Manifest, TensorSpec, Tolerance
from device_agent.signature import Trust
from edgekit import bundle, sign
from edgekit.cli import cli
from edgekit.errors import BadInput


@pytest.fixture
def packed(tmp_path: Path) -> bundle.Bundle:
    """An unsigned bundle."""
    for name in ("model.onnx", "in.npz", "out.npz"):
        (tmp_path / "staging").mkdir(exist_ok=True)
        (tmp_path / "staging" / name).write_bytes(name.encode())
    spec = (TensorSpec("x", "FP32", (-1, 8)),)
    golden = Golden("in.npz", "out.npz", {"x": Tolerance(0, 0)})
    manifest = Manifest(
        1, "demo", 1, "x86-cpu", "x86_64", "model.onnx", "fp32", spec, spec, 8, (), (), golden, Contract()
    )
    return bundle.pack(tmp_path / "staging", manifest, tmp_path / "out")


def test_a_key_pair_is_made_once(tmp_path: Path) -> None:
    """The private key is its owner's alone, and an existing key is never overwritten."""
    private, public = sign.keygen(tmp_path / "keys" / "release")
    assert (private.name, public.name) == ("release.key", "release.pub")
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert sorted(path.name for path in private.parent.iterdir()) == ["release.key", "release.pub"]
    before = private.read_bytes()
    private.chmod(0o400)
    with pytest.raises(BadInput, match="exists already"):
        sign.keygen(tmp_path / "keys" / "release")
    assert private.read_bytes() == before
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(BadInput, match="cannot be written"):
        sign.keygen(tmp_path / "file" / "release")


@pytest.mark.parametrize("form", ["directory", "archive"])
def test_signing_and_verifying(tmp_path: Path, packed: bundle.Bundle, form: str) -> None:
    """A bundle in either form verifies with its key, keeps its digest, and signs reproducibly."""
    private, public = sign.keygen(tmp_path / "release")
    path = getattr(packed, form)
    signer = sign.sign(path, private)
    assert sign.verify(path, public) == signer
    assert bundle.inspect(path)["digest"] == packed.digest
    assert bundle.inspect(path)["key_fingerprint"] == hashlib.sha256(public.read_bytes()).hexdigest()
    if form == "archive":
        before = path.read_bytes()
        sign.sign(path, private)
        assert path.read_bytes() == before


def test_a_signed_bundle_is_trusted_by_a_device(tmp_path: Path, packed: bundle.Bundle) -> None:
    """A device that has the public key in its key directory lets the bundle in."""
    private, public = sign.keygen(tmp_path / "release")
    sign.sign(packed.directory, private)
    (tmp_path / "device").mkdir()
    public.rename(tmp_path / "device" / "fleet.pub")
    assert Trust(tmp_path / "device").check(packed.directory, packed.manifest, packed.digest).name == "fleet"


def test_what_does_not_verify(tmp_path: Path, packed: bundle.Bundle) -> None:
    """No signature, another key and a changed file are each refused with their reason."""
    private, public = sign.keygen(tmp_path / "release")
    _, other = sign.keygen(tmp_path / "other")
    with pytest.raises(BadInput, match="is not signed"):
        sign.verify(packed.archive, public)
    sign.sign(packed.archive, private)
    sign.sign(packed.directory, private)
    with pytest.raises(BadInput, match="unknown key"):
        sign.verify(packed.archive, other)
    (packed.directory / "model.onnx").write_bytes(b"MODEL.ONNX")
    with pytest.raises(BadInput, match=r"was changed: model\.onnx"):
        sign.verify(packed.directory, public)


def test_signing_again_with_another_key_replaces_the_signature(tmp_path: Path, packed: bundle.Bundle) -> None:
    """A key can be rotated without making another bundle."""
    old, old_public = sign.keygen(tmp_path / "old")
    new, new_public = sign.keygen(tmp_path / "new")
    for key in (old, new):
        sign.sign(packed.archive, key)
    assert sign.verify(packed.archive, new_public).name == "new"
    with pytest.raises(BadInput, match="unknown key"):
        sign.verify(packed.archive, old_public)


def test_unusable_keys_are_explained(tmp_path: Path, packed: bundle.Bundle) -> None:
    """A missing, encrypted, public, foreign or garbled key is an error of its own, and nothing is signed."""
    _, public = sign.keygen(tmp_path / "release")
    key = ec.generate_private_key(ec.SECP256R1())
    encrypted = serialization.BestAvailableEncryption(b"secret")
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)
    (tmp_path / "encrypted.key").write_bytes(key.private_bytes(*form, encrypted))
    foreign = rsa.generate_private_key(65537, 2048).private_bytes(*form, serialization.NoEncryption())
    (tmp_path / "rsa.key").write_bytes(foreign)
    (tmp_path / "garbled.key").write_bytes(b"not a key")
    cases = {
        "absent.key": "cannot be read",
        "encrypted.key": "is encrypted",
        "rsa.key": "cannot sign",
        "garbled.key": "is not a private key",
        public.name: "is not a private key",
    }
    for name, reason in cases.items():
        with pytest.raises(BadInput, match=reason):
            sign.sign(packed.directory, tmp_path / name)
    with pytest.raises(BadInput, match="is not a public key"):
        sign.verify(packed.directory, tmp_path / "release.key")
    assert not (packed.directory / "model.sig").exists()


def test_a_rotation_is_what_devices_take(tmp_path: Path, packed: bundle.Bundle) -> None:
    """A key that devices trust names the next one; what that signs is let in, the old key's no more."""
    old_private, old_public = sign.keygen(tmp_path / "keys" / "release")
    private, public = sign.keygen(tmp_path / "release-2")
    rotated = sign.rotate(old_private, public, tmp_path / "rotation.json", retire=True)
    assert (rotated.added.name, rotated.retires_older) == ("release-2", True)
    document = (tmp_path / "rotation.json").read_bytes()
    trust = Trust(old_public.parent, rotations=lambda: [document])
    sign.sign(packed.directory, private)
    assert trust.authenticate(archive.read_head(packed.directory)).name == "release-2"
    sign.sign(packed.directory, old_private)
    with pytest.raises(TrustError, match="retired key"):
        trust.authenticate(archive.read_head(packed.directory))


def test_serials_rise_by_themselves_or_are_given(tmp_path: Path) -> None:
    """The host's clock gives the serial, unless the user does; one out of bounds is bad input."""
    private, _ = sign.keygen(tmp_path / "release")
    _, public = sign.keygen(tmp_path / "next")
    assert sign.rotate(private, public, tmp_path / "r", retire=False).serial > 1_700_000_000
    assert sign.rotate(private, public, tmp_path / "r", retire=False, serial=7).serial == 7
    with pytest.raises(BadInput, match="out of bounds"):
        sign.rotate(private, public, tmp_path / "r", retire=False, serial=0)


def test_a_rotation_needs_two_pairs_and_a_place(tmp_path: Path) -> None:
    """A key cannot name itself; a private key in the place of a public one, or no directory, is bad input."""
    private, public = sign.keygen(tmp_path / "release")
    other, other_public = sign.keygen(tmp_path / "next")
    with pytest.raises(BadInput, match="public half"):
        sign.rotate(private, public, tmp_path / "r", retire=False)
    with pytest.raises(BadInput, match="not a public key"):
        sign.rotate(private, other, tmp_path / "r", retire=False)
    with pytest.raises(BadInput, match="cannot be written"):
        sign.rotate(private, other_public, tmp_path / "nowhere" / "r", retire=False)


def test_the_command_writes_a_rotation(tmp_path: Path) -> None:
    """``edgekit rotate-key`` says which key it names, and under which serial."""
    private, _ = sign.keygen(tmp_path / "release")
    _, public = sign.keygen(tmp_path / "next")
    options = ["--old", str(private), "--new", str(public), "--serial", "3", "--retire"]
    result = CliRunner().invoke(cli, ["rotate-key", str(tmp_path / "r"), *options])
    assert (result.exit_code, "serial 3" in result.output) == (0, True)
    assert rotation.parse((tmp_path / "r").read_bytes()).retires_older
