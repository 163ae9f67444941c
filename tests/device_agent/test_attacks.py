"""Attacks on a running agent: each is refused with its own reason, stores nothing, and the model serves on.

The table is printed in ``docs/security.md``, and checked against it here.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Tuple

import numpy as np
import pytest
from onnx import TensorProto, helper

from agent_testing import AgentProcess, connect, linear, linear_bundle, make_model, read_response
from device_agent import archive, manifest, signature, ustar
from device_agent.errors import AgentError
from device_agent.manifest import TensorSpec
from device_agent.server import control
from storage_kit import make_key, rotation_to, sign_bundle

SECURITY = Path(__file__).parents[2] / "docs" / "security.md"
MAX_BODY_BYTES = 1024 * 1024


class Target:
    """An agent that serves version 3 of ``model`` and takes signed bundles only."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.agent = AgentProcess(root, f"[limits]\nmax_body_bytes = {MAX_BODY_BYTES}\n")
        config = self.agent.config.read_text().replace("allow_unsigned = true", "allow_unsigned = false")
        self.agent.config.write_text(config)
        self.key, self.legacy = make_key(root / "keys"), make_key(root / "keys", "legacy")
        self.rotations = {
            serial: rotation_to(make_key(None), self.key, serial, f"release-{serial}") for serial in (1, 2)
        }
        self.agent.start()
        for document in (*self.rotations.values(), rotation_to(make_key(None), self.legacy, 1, retire=True)):
            self.ask({"op": "trust", "document": document.decode()})
        self.good = self.bundle("good", 3)
        self.ask({"op": "install", "bundle": str(self.good)})
        self.digest = archive.read_head(self.good).digest

    def ask(self, message: Dict[str, Any]) -> Any:
        """Ask over the control socket."""
        return control.request(self.agent.control, message, lambda state: None)

    def bundle(self, name: str, version: int = 4, key: Any = None) -> Path:
        """Make a signed bundle of a real model."""
        path = self.root / name
        shutil.rmtree(str(path), ignore_errors=True)
        linear_bundle(path, seed=version, version=version)
        sign_bundle(path, key or self.key)
        return path

    def refusal(self, message: Dict[str, Any]) -> str:
        """Ask for what must be refused; return the error's three lines."""
        with pytest.raises(AgentError) as caught:
            self.ask(message)
        return str(caught.value)

    def install(self, path: Path) -> str:
        """Try to install a bundle, and return why that was refused."""
        return self.refusal({"op": "install", "bundle": str(path)})

    def trust(self, document: bytes) -> str:
        """Try to hand over a rotation document, and return why that was refused."""
        return self.refusal({"op": "trust", "document": document.decode()})

    def http(self, data: bytes) -> str:
        """Send bytes to the inference port; return the status and the body of the error."""
        with connect(self.agent) as sock, sock.makefile("rb") as stream:
            sock.sendall(data)
            status, _, body = read_response(stream)
        assert status >= 400
        return f"{status} {body.decode()}"

    def stored(self) -> Dict[str, str]:
        """Everything on the device's disk but the journal, which keeps the reason of the refusal."""
        files = (path for path in (self.root / "state").rglob("*") if path.name != "journal.json")
        return {
            str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
            for path in files
        }


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    """The agent under attack, in a directory that every user may enter."""
    root = Path(tempfile.mkdtemp(prefix="edgekit-attack-"))
    root.chmod(0o755)
    made = Target(root)
    yield made
    made.agent.kill()
    shutil.rmtree(str(root))


# Making bundles wrong


def _rewrite(bundle: Path, change: Callable[[Dict[str, Any]], None]) -> None:
    """Change the manifest's JSON; the signature no longer fits."""
    document = json.loads((bundle / "manifest.json").read_text())
    change(document)
    (bundle / "manifest.json").write_text(json.dumps(document))


def _resign(target: Target, bundle: Path, files: Dict[str, bytes]) -> Path:
    """Put other files into a bundle, and sign it as its owner would: the signer is the attacker."""
    for path, data in files.items():
        (bundle / path).write_bytes(data)
    parsed, _ = manifest.read(bundle)
    entries = tuple(
        replace(
            entry,
            sha256=hashlib.sha256((bundle / entry.path).read_bytes()).hexdigest(),
            size_bytes=(bundle / entry.path).stat().st_size,
        )
        for entry in parsed.files
    )
    (bundle / "manifest.json").write_bytes(manifest.dumps(replace(parsed, files=entries)))
    sign_bundle(bundle, target.key)
    return bundle


def _packed(target: Target, edit: Callable[[bytes, int], bytes]) -> str:
    """Try an archive that was edited where ``model.onnx`` begins."""
    bundle = target.bundle("packed")
    path = target.root / "packed.edgekit"
    archive.pack(bundle, path)
    data = path.read_bytes()
    size = (bundle / "model.onnx").stat().st_size
    path.write_bytes(edit(data, data.index(ustar.header("model.onnx", size))))
    return target.install(path)


def _header(name: str, size_bytes: int, kind: bytes = b"0") -> bytes:
    """A header of any kind of member, with a right checksum."""
    header = bytearray(ustar.header(name, size_bytes))
    header[156:157] = kind
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def _with_header(make: Callable[[int], bytes]) -> Callable[[Target], str]:
    """An archive with another header where that of ``model.onnx`` should be."""

    def attack(target: Target) -> str:
        size = (target.good / "model.onnx").stat().st_size
        return _packed(target, lambda data, at: data[:at] + make(size) + data[at + 512 :])

    return attack


# The attacks


def _tampered(target: Target) -> str:
    bundle = target.bundle("tampered")
    data = bytearray((bundle / "model.onnx").read_bytes())
    data[-1] ^= 1
    (bundle / "model.onnx").write_bytes(bytes(data))
    return target.install(bundle)


def _swapped_manifest(target: Target) -> str:
    bundle = target.bundle("swapped")
    _rewrite(bundle, lambda document: document.update(version=99))
    return target.install(bundle)


def _stripped(target: Target) -> str:
    bundle = target.bundle("stripped")
    (bundle / "model.sig").unlink()
    return target.install(bundle)


def _borrowed_name(target: Target) -> str:
    """Another key's signature under the trusted key's name."""
    bundle = target.bundle("borrowed", key=make_key(None))
    good = json.loads((target.good / "model.sig").read_text())
    forged = json.loads((bundle / "model.sig").read_text())
    forged["verificationMaterial"] = good["verificationMaterial"]
    (bundle / "model.sig").write_text(json.dumps(forged))
    return target.install(bundle)


def _forged_rotation(target: Target) -> str:
    taken = json.loads(target.rotations[2].decode())
    forged = json.loads(rotation_to(make_key(None), make_key(None), 9).decode())
    forged["verificationMaterial"] = taken["verificationMaterial"]
    return target.trust(json.dumps(forged).encode())


def _traversal(target: Target) -> str:
    bundle = target.bundle("traversal")
    _rewrite(bundle, lambda document: document["files"][0].update(path="../../../etc/cron.d/evil"))
    return target.install(bundle)


def _path_in_name(target: Target) -> str:
    bundle = target.bundle("named")
    _rewrite(bundle, lambda document: document.update(name="../../etc"))
    return target.install(bundle)


def _twins(target: Target) -> str:
    """``MODEL.ONNX`` beside ``model.onnx``, then a composed character beside a decomposed one."""
    answers = []
    for names in (["MODEL.ONNX"], ["caf\u00e9", "cafe\u0301"]):
        bundle = target.bundle("twins")
        entries = [{"path": name, "sha256": "0" * 64, "size_bytes": 0} for name in names]
        _rewrite(bundle, lambda document, more=entries: document["files"].extend(more))  # type: ignore[misc]
        answers.append(target.install(bundle))
    assert answers[0] == answers[1]
    return answers[0]


def _link(target: Target) -> str:
    bundle = target.bundle("linked")
    (bundle / "model.onnx").unlink()
    (bundle / "model.onnx").symlink_to("/etc/passwd")
    return target.install(bundle)


def _added_file(target: Target) -> str:
    bundle = target.bundle("added")
    (bundle / "evil.so").write_bytes(b"\x7fELF")
    return target.install(bundle)


def _twice(target: Target) -> str:
    def edit(data: bytes, at: int) -> bytes:
        first = data.index(
            ustar.header("golden_inputs.npz", (target.good / "golden_inputs.npz").stat().st_size)
        )
        second = data.index(b"golden_outputs.npz", first)
        return data[:at] + data[first:second] + data[at:]

    return _packed(target, edit)


def _enormous(target: Target) -> str:
    """A file that is said to have a pebibyte, in a manifest that is rightly signed."""
    bundle = target.bundle("enormous")
    parsed, _ = manifest.read(bundle)
    first = replace(parsed.files[0], size_bytes=2**50)
    data = manifest.dumps(replace(parsed, files=(first, *parsed.files[1:])))
    (bundle / "manifest.json").write_bytes(data)
    signed = signature.sign(manifest.loads(data), manifest.digest(data), target.key)
    (bundle / "model.sig").write_bytes(signed)
    return target.install(bundle)


def _zip_bomb(target: Target) -> str:
    bundle = target.bundle("bomb")
    zeros = bytes(1024 * 1024)
    with zipfile.ZipFile(
        str(bundle / "golden_inputs.npz"), "w", zipfile.ZIP_DEFLATED, compresslevel=1
    ) as npz, npz.open("x.npy", "w") as member:
        for _ in range(257):
            member.write(zeros)
    return target.install(_resign(target, bundle, {}))


def _pickle(target: Target) -> str:
    bundle = target.bundle("pickled")
    np.savez(bundle / "golden_inputs.npz", x=np.array([{"evil": 1}], dtype=object))
    return target.install(_resign(target, bundle, {}))


def _external_data(target: Target) -> str:
    model = linear()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    bundle = target.bundle("external")
    return target.install(_resign(target, bundle, {"model.onnx": model.SerializeToString()}))


def _own_operator(target: Target) -> str:
    model = make_model(
        [helper.make_node("Run", ["x"], ["scores"], domain="evil")],
        [TensorSpec("x", "FP32", (-1, 8))],
        [TensorSpec("scores", "FP32", (-1, 4))],
    )
    model.opset_import.append(helper.make_opsetid("evil", 1))
    bundle = target.bundle("operator")
    return target.install(_resign(target, bundle, {"model.onnx": model.SerializeToString()}))


def _huge_manifest(target: Target) -> str:
    path = target.root / "huge.edgekit"
    path.write_bytes(_header("manifest.json", 2**33 - 1) + bytes(512))
    return target.install(path)


def _other_user(target: Target) -> str:
    """Connect to the control socket as another user; what the child prints is what it got."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        code = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).connect_ex(str(target.agent.control))
        os.write(write, os.strerror(code).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with os.fdopen(read) as stream:
        return stream.read()


def _long_control_line(target: Target) -> str:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(str(target.agent.control))
        client.sendall(b"x" * (control.MAX_LINE_BYTES + 1))
        return client.makefile("r").readline()


def _long_head(target: Target) -> str:
    return target.http(b"GET /v2 HTTP/1.1\r\nHost: d\r\nX: " + b"a" * 40_000 + b"\r\n\r\n")


def _long_body(target: Target) -> str:
    return target.http(_post(b"", b"Content-Length: %d\r\n" % (MAX_BODY_BYTES + 1)))


def _gzip_bomb(target: Target) -> str:
    body = gzip.compress(bytes(8 * MAX_BODY_BYTES))
    return target.http(_post(body, b"Content-Encoding: gzip\r\nContent-Length: %d\r\n" % len(body)))


def _post(body: bytes, headers: bytes) -> bytes:
    return b"POST /v2/models/model/infer HTTP/1.1\r\nHost: d\r\n%s\r\n%s" % (headers, body)


def _path_in_url(target: Target) -> str:
    return target.http(b"GET /v2/models/..%2F..%2Fetc/config HTTP/1.1\r\nHost: d\r\n\r\n")


Attack = Tuple[Callable[[Target], str], str]
ATTACKS: Dict[str, Attack] = {
    "tampered file": (_tampered, "was changed: model.onnx"),
    "file added to a bundle": (_added_file, "does not list: evil.so"),
    "swapped manifest": (_swapped_manifest, "is for another bundle"),
    "stripped signature": (_stripped, "is not signed"),
    "wrong key": (
        lambda t: t.install(t.bundle("wrong", key=make_key(None))),
        "the bundle is signed with an unknown key",
    ),
    "wrong key under a trusted key's name": (_borrowed_name, "the signature is wrong"),
    "retired key": (
        lambda t: t.install(t.bundle("retired", key=t.legacy)),
        "the bundle is signed with the retired key",
    ),
    "downgrade: an old bundle played again": (
        lambda t: t.install(t.bundle("old", version=2)),
        "is older than what this device committed",
    ),
    "rotation played again": (lambda t: t.trust(t.rotations[1]), "the rotation document is old"),
    "rotation by a stranger": (
        lambda t: t.trust(rotation_to(make_key(None), make_key(None), 9)),
        "the rotation document is signed with an unknown key",
    ),
    "rotation by a retired key": (
        lambda t: t.trust(rotation_to(make_key(None), t.legacy, 9)),
        "the rotation document is signed with the retired key",
    ),
    "forged rotation": (_forged_rotation, "the rotation document's signature is wrong"),
    "bundle's signature as a rotation": (
        lambda t: t.trust((t.good / "model.sig").read_bytes()),
        "not a usable rotation document",
    ),
    "path traversal in a manifest": (_traversal, "a file's path leaves the bundle"),
    "absolute path in an archive": (
        _with_header(lambda size: _header("/etc/cron.d/evil", size)),
        "leads out of the bundle",
    ),
    "path in a model's name": (_path_in_name, "is not 1 to 64 letters"),
    "paths that case or Unicode tells apart": (_twins, "differ only in case or Unicode form"),
    "symbolic link": (_link, "it is a symbolic link"),
    "hard link in an archive": (_with_header(lambda size: _header("model.onnx", 0, b"1")), "is a hard link"),
    "device node in an archive": (_with_header(lambda size: _header("model.onnx", 0, b"3")), "is a device"),
    "duplicate member": (_twice, "is there twice"),
    "size lie in an archive": (
        _with_header(lambda size: _header("model.onnx", size + 1)),
        "bytes, the manifest says",
    ),
    "truncated archive": (lambda t: _packed(t, lambda data, at: data[: at + 100]), "it is truncated"),
    "oversized header in an archive": (_huge_manifest, "manifest.json has 8589934591 bytes; the limit is"),
    "enormous file": (_enormous, "there is no space for the bundle"),
    "zip bomb in golden files": (_zip_bomb, "it unpacks to"),
    "pickle in golden files": (_pickle, "allow_pickle=False"),
    "graph that reads a file of the device": (
        _external_data,
        "takes data from a file outside of its directory",
    ),
    "graph with an operator of its own": (_own_operator, "is not a registered function/op"),
    "unauthenticated control: another user": (_other_user, "Permission denied"),
    "unauthenticated control: a relative path": (
        lambda t: t.refusal({"op": "install", "bundle": "../evil"}),
        "is not an absolute path",
    ),
    "oversized control line": (_long_control_line, "a line is longer than"),
    "oversized HTTP header": (_long_head, "head is longer than"),
    "oversized HTTP body": (_long_body, "the body has 1048577 bytes; the limit is"),
    "compression bomb in an HTTP body": (_gzip_bomb, "bytes when decompressed"),
    "path in a URL": (_path_in_url, "404 {"),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_with_its_own_reason(target: Target, name: str) -> None:
    """Whatever is tried, the answer says what it was, nothing is stored, and the old version serves on."""
    attack, reason = ATTACKS[name]
    before = target.stored()
    answer = attack(target)
    assert [other for _, other in ATTACKS.values() if other in answer] == [reason], answer
    assert target.stored() == before
    (status,) = target.ask({"op": "status"})
    assert status["serving"] == status["active"] == target.digest
    body = json.dumps({
        "inputs": [{"name": "x", "shape": [1, 8], "datatype": "FP32", "data": [0.5] * 8}]
    }).encode()  # fmt: skip
    with connect(target.agent) as sock, sock.makefile("rb") as stream:
        sock.sendall(_post(body, b"Content-Length: %d\r\n" % len(body)))
        assert read_response(stream)[0] == 200


def test_the_printed_table_is_the_tested_one() -> None:
    """Every attack of the table in docs/security.md is tested, and every tested one is in the table."""
    table = SECURITY.read_text(encoding="utf-8").split("## Attacks")[1]
    rows = re.findall(r"^\| ([^|]+) \| `([^|]+)` \|$", table, re.MULTILINE)
    assert rows == [(name, reason) for name, (_, reason) in ATTACKS.items()]
