"""Bundles in OCI registries: push, pull, and what other tools make of it."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import oras.client
import pytest

sys.path.append(str(Path(__file__).parents[1] / "device_agent"))

from agent_testing import linear_bundle
from host_testing import Forker, assert_three_lines
from registry_kit import Front, Registry, TokenService, answer, artifact_of, needs_registry, request

from device_agent.oci.digests import digest_of
from device_agent.oci.transport import Security
from edgekit import docker_config, modelpack, registry, sign
from edgekit.errors import BadInput, Missing

Sent = list[tuple[str, int, bool]]
PLAIN = Security()


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """One real registry; tests use names of their own in it."""
    started = Registry(tmp_path_factory.mktemp("registry") / "files")
    yield started
    started.stop()


@pytest.fixture
def front(real: Registry) -> Iterator[Front]:
    """A server in front of the real registry."""
    started = Front(real.host)
    yield started
    started.stop()


@pytest.fixture(autouse=True)
def docker_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test sees the credentials of whoever runs it."""
    home = tmp_path / "docker"
    home.mkdir()
    monkeypatch.setenv("DOCKER_CONFIG", str(home))
    return home


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A small signed bundle's directory."""
    directory = linear_bundle(tmp_path / "bundle").directory
    private, _ = sign.keygen(tmp_path / "release")
    sign.sign(directory, private)
    return directory


def _push(bundle: Path, host: str, name: str, tag: str = "stable") -> tuple[registry.Pushed, Sent]:
    sent: Sent = []
    target = f"oci://{host}/{name}:{tag}"
    return registry.push(bundle, target, PLAIN, lambda *file: sent.append(file)), sent


def _files(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


@needs_registry
def test_what_is_pushed_is_pulled(real: Registry, bundle: Path, tmp_path: Path) -> None:
    """A bundle comes back bit for bit, by its tag and by the digest that push gave, signature included."""
    pushed, _ = _push(bundle, real.host, "models/first")
    assert pushed.signed
    by_tag = registry.pull(f"oci://{real.host}/models/first:stable", tmp_path / "tag", PLAIN)
    by_digest = registry.pull(
        f"oci://{pushed.reference}", tmp_path / "digest", PLAIN, key=tmp_path / "release.pub"
    )
    assert by_tag.reference == by_digest.reference == pushed.reference
    assert by_tag.digest == by_digest.digest == pushed.digest
    assert _files(by_tag.directory) == _files(by_digest.directory) == _files(bundle)
    assert by_digest.signer
    assert [path.name for path in (tmp_path / "tag").iterdir()] == ["model"]


@needs_registry
def test_files_that_are_there_are_not_sent_again(real: Registry, tmp_path: Path) -> None:
    """Of a new version, the files that it shares with the old one are neither sent nor fetched."""
    old, new = (linear_bundle(tmp_path / str(version), version=version) for version in (1, 2))
    _, first = _push(old.directory, real.host, "models/shared")
    pushed, second = _push(new.directory, real.host, "models/shared")
    assert all(sent for _, _, sent in first)
    assert [path for path, _, sent in second if sent] == ["manifest.json"]
    assert pushed.reused_bytes == sum(size for path, size, _ in second if path != "manifest.json")
    source = f"oci://{real.host}/models/shared"
    registry.push(old.directory, f"{source}:old", PLAIN, lambda *file: None)
    assert registry.pull(f"{source}:old", tmp_path / "out", PLAIN).fetched_bytes > 0
    pulled = registry.pull(f"{source}:stable", tmp_path / "out", PLAIN)
    assert (pulled.digest, pulled.fetched_bytes) == (new.digest, 0)
    assert _files(pulled.directory) == _files(new.directory)


@needs_registry
def test_the_artifact_is_a_modelpack(real: Registry, bundle: Path) -> None:
    """The media types, annotations and config are those of the CNCF ModelPack specification."""
    pushed, _ = _push(bundle, real.host, "models/pack")
    path = "/v2/models/pack/"
    accept = {"Accept": "application/vnd.oci.image.manifest.v1+json"}
    _, headers, data = request(real.host, "GET", path + "manifests/stable", headers=accept)
    assert f"models/pack@{headers['Docker-Content-Digest']}" in pushed.reference
    manifest = json.loads(data)
    assert manifest["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert manifest["config"]["mediaType"] == "application/vnd.cncf.model.config.v1+json"
    kinds = {
        layer["annotations"]["org.cncf.model.filepath"]: layer["mediaType"].split("model.")[1]
        for layer in manifest["layers"]
    }
    assert kinds == {
        "manifest.json": "weight.config.v1.raw",
        "model.sig": "weight.config.v1.raw",
        "model.onnx": "weight.v1.raw",
        "golden_inputs.npz": "dataset.v1.raw",
        "golden_outputs.npz": "dataset.v1.raw",
    }
    config = json.loads(request(real.host, "GET", f"{path}blobs/{manifest['config']['digest']}")[2])
    jsonschema.validate(config, MODELPACK_CONFIG)
    assert config["modelfs"]["diff_ids"] == [layer["digest"] for layer in manifest["layers"]]


#: The specification's own schema of the config, as far as it constrains what edgekit writes.
MODELPACK_CONFIG = {
    "type": "object",
    "required": ["descriptor", "config", "modelfs"],
    "additionalProperties": False,
    "properties": {
        "descriptor": {
            "type": "object",
            "additionalProperties": False,
            "properties": {"name": {"type": "string", "minLength": 1}, "version": {"type": "string"}},
        },
        "config": {
            "type": "object",
            "additionalProperties": False,
            "properties": {key: {"type": "string"} for key in ("architecture", "format", "precision")},
        },
        "modelfs": {
            "type": "object",
            "required": ["type", "diff_ids"],
            "additionalProperties": False,
            "properties": {
                "type": {"enum": ["layers"]},
                "diff_ids": {"type": "array", "minItems": 1, "items": {"type": "string"}},
            },
        },
    },
}


def test_the_same_bundle_is_the_same_artifact(bundle: Path) -> None:
    """Describing a bundle twice gives the same bytes, and so one digest in every registry."""
    assert modelpack.describe(bundle) == modelpack.describe(bundle)


@needs_registry
def test_oras_pulls_what_is_pushed(real: Registry, bundle: Path, tmp_path: Path) -> None:
    """The independent client writes the same files under the same names."""
    _push(bundle, real.host, "models/oras-out")
    client = oras.client.OrasClient(insecure=True)
    client.pull(target=f"{real.host}/models/oras-out:stable", outdir=str(tmp_path / "oras"))
    assert _files(tmp_path / "oras") == _files(bundle)


@needs_registry
def test_what_oras_pushes_is_pulled(
    real: Registry, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bundle's directory that the independent client pushed, file by file, is a bundle here too."""
    monkeypatch.chdir(bundle)
    client = oras.client.OrasClient(insecure=True)
    client.push(target=f"{real.host}/models/oras-in:stable", files=sorted(_files(bundle)), quiet=True)
    pulled = registry.pull(
        f"oci://{real.host}/models/oras-in:stable", tmp_path / "out", PLAIN, key=tmp_path / "release.pub"
    )
    assert _files(pulled.directory) == _files(bundle)


@needs_registry
def test_an_interrupted_pull_goes_on(front: Front, tmp_path: Path) -> None:
    """A pull that was cut leaves what it has; the next one asks only for the rest, and is whole."""
    made = linear_bundle(tmp_path / "big", name="big")
    weights = made.directory / "model.onnx"
    _pad(made.directory, weights, 300_000)
    _push(made.directory, front.host, "models/big")
    digest = digest_of(weights.read_bytes())
    front.cut_after_bytes = [30_000]
    with pytest.raises(Missing, match="came only in part"):
        registry.pull(f"oci://{front.host}/models/big:stable", tmp_path / "out", PLAIN)
    assert not (tmp_path / "out" / "big").exists()
    pulled = registry.pull(f"oci://{front.host}/models/big:stable", tmp_path / "out", PLAIN)
    assert _files(pulled.directory) == _files(made.directory)
    assert front.sent_bytes[digest] <= weights.stat().st_size * 1.01


def _pad(bundle: Path, path: Path, size_bytes: int) -> None:
    """Make a file of the bundle larger, and its manifest say so."""
    from device_agent import manifest as manifests
    from device_agent.manifest import FileEntry

    path.write_bytes(path.read_bytes() + bytes(size_bytes))
    parsed, _ = manifests.read(bundle)
    data = path.read_bytes()
    entry = FileEntry(path.name, digest_of(data).partition(":")[2], len(data))
    files = tuple(entry if old.path == path.name else old for old in parsed.files)
    (bundle / "manifest.json").write_bytes(manifests.dumps(replace(parsed, files=files)))


@needs_registry
def test_a_key_is_checked_before_the_large_files(front: Front, bundle: Path, tmp_path: Path) -> None:
    """A bundle that another key signed is refused, and its model was never fetched."""
    _push(bundle, front.host, "models/signed")
    _, stranger = sign.keygen(tmp_path / "stranger")
    with pytest.raises(BadInput, match="unknown key"):
        registry.pull(f"oci://{front.host}/models/signed:stable", tmp_path / "out", PLAIN, key=stranger)
    model = digest_of((bundle / "model.onnx").read_bytes())
    assert not [path for path in front.paths() if path.endswith(model)]


@needs_registry
def test_what_is_no_bundle_is_not_replaced(real: Registry, bundle: Path, tmp_path: Path) -> None:
    """A directory of the bundle's name that holds something else is left alone."""
    _push(bundle, real.host, "models/inway")
    (tmp_path / "out" / "model").mkdir(parents=True)
    (tmp_path / "out" / "model" / "thesis.txt").write_text("mine")
    with pytest.raises(BadInput, match="is in the way"):
        registry.pull(f"oci://{real.host}/models/inway:stable", tmp_path / "out", PLAIN)
    assert (tmp_path / "out" / "model" / "thesis.txt").read_text() == "mine"


@needs_registry
@pytest.mark.parametrize("wrong", ["../../escape", "/etc/passwd", "model/../../x"])
def test_names_in_an_artifact_are_never_paths(
    real: Registry, bundle: Path, tmp_path: Path, wrong: str
) -> None:
    """Whatever an artifact calls its layers, files get the names of the bundle's own manifest."""
    data, blobs = artifact_of(bundle)
    manifest = json.loads(data)
    for layer in manifest["layers"]:
        if layer["annotations"]["org.cncf.model.filepath"] not in ("manifest.json", "model.sig"):
            layer["annotations"] = {"org.cncf.model.filepath": wrong + layer["digest"][-4:]}
    _push(bundle, real.host, "models/names")
    headers = {"Content-Type": manifest.get("mediaType", "application/vnd.oci.image.manifest.v1+json")}
    for blob in blobs[:1]:  # the config; push sent the rest
        _upload(real.host, "models/names", blob)
    path = "/v2/models/names/manifests/odd"
    assert request(real.host, "PUT", path, json.dumps(manifest).encode(), headers)[0] == 201
    pulled = registry.pull(f"oci://{real.host}/models/names:odd", tmp_path / "out", PLAIN)
    assert _files(pulled.directory) == _files(bundle)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model"]


def _upload(host: str, name: str, blob: bytes) -> None:
    _, headers, _ = request(host, "POST", f"/v2/{name}/blobs/uploads/")
    location = headers["Location"]
    assert request(host, "PUT", f"{location}&digest={digest_of(blob)}", blob)[0] == 201


@needs_registry
@pytest.mark.parametrize(
    ("reference", "fragment"),
    [
        ("oci://{}/models/none:stable", "does not exist"),
        ("oci://{}/models/none", "names no version"),
        ("{}/models/none:stable", "is not a reference"),
        ("oci://{}/Models/None:stable", "is not a reference"),
        ("oci://{}/models/none@sha256:12", "is not a reference"),
        ("oci://{}/../../etc:stable", "is not a reference"),
    ],
)
def test_a_wrong_reference_is_explained(
    real: Registry, tmp_path: Path, reference: str, fragment: str
) -> None:
    """Each way to get a reference wrong has its own words and exit code 2."""
    with pytest.raises(BadInput) as caught:
        registry.pull(reference.format(real.host), tmp_path, PLAIN)
    assert fragment in str(caught.value)


def test_no_registry_is_exit_code_4(tmp_path: Path, bundle: Path) -> None:
    """A registry that cannot be reached is something missing, not bad input."""
    with pytest.raises(Missing, match="no answer from"):
        registry.push(bundle, "oci://127.0.0.1:1/models/x:1", PLAIN, lambda *file: None)


def test_plain_http_beyond_loopback_must_be_asked_for(bundle: Path) -> None:
    """A host that is not loopback is asked over TLS; and over plain HTTP no password leaves."""
    assert Security().base_url("registry.example.com") == "https://registry.example.com"
    assert Security().base_url("localhost:5000") == "http://localhost:5000"
    assert Security(ca_file="ca.pem").base_url("localhost:5000") == "https://localhost:5000"
    plain = Security(plain_http=True)
    assert plain.base_url("registry.example.com") == "http://registry.example.com"
    assert not plain.allows_secrets("http://registry.example.com/v2/")
    assert not Security().allows("http://registry.example.com/v2/")


# Credentials


def _write_config(home: Path, document: dict[str, Any]) -> None:
    (home / "config.json").write_text(json.dumps(document))


def _auth(user: str, password: str) -> str:
    return base64.b64encode(f"{user}:{password}".encode()).decode()


@needs_registry
def test_the_docker_login_is_used(front: Front, bundle: Path, docker_home: Path, tmp_path: Path) -> None:
    """Push and pull get a token with the user and password of the docker configuration."""
    TokenService(front, "ann", "s3cret")
    with pytest.raises(BadInput, match="wants other credentials"):
        _push(bundle, front.host, "models/auth")
    _write_config(docker_home, {"auths": {front.host: {"auth": _auth("ann", "s3cret")}}})
    pushed, _ = _push(bundle, front.host, "models/auth")
    pulled = registry.pull(f"oci://{front.host}/models/auth:stable", tmp_path / "out", PLAIN)
    assert pulled.reference == pushed.reference


@needs_registry
def test_a_token_that_expires_in_the_middle_is_renewed(front: Front, bundle: Path, docker_home: Path) -> None:
    """A push outlives its token: the blob that was refused is sent again, whole."""
    service = TokenService(front, "ann", "s3cret")
    _write_config(docker_home, {"auths": {front.host: {"auth": _auth("ann", "s3cret")}}})

    def expire_at_uploads(handler: Any) -> bool:
        if handler.command == "PUT" and "uploads" in handler.path and len(service.asked) == 1:
            service.expire()
        return False

    front.rules.insert(0, expire_at_uploads)
    pushed, _ = _push(bundle, front.host, "models/expire")
    assert len(service.asked) == 2
    assert pushed.sent_bytes + pushed.reused_bytes > 0


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"auth": _auth("ann", "a:b")}, {"username": "ann", "password": "a:b"}),
        ({"identitytoken": "refresh"}, {"refresh_token": "refresh"}),
        ({"registrytoken": "bearer"}, {"bearer_token": "bearer"}),
        ({}, {}),
    ],
)
def test_every_kind_of_entry_is_understood(
    docker_home: Path, entry: dict[str, str], expected: dict[str, str]
) -> None:
    """Passwords with a colon, identity tokens and registry tokens are read as docker writes them."""
    _write_config(docker_home, {"auths": {"https://reg.example.com/v2/": entry}})
    found = docker_config.credentials_for("reg.example.com")
    assert {key: value for key, value in vars(found).items() if value} == expected
    assert all(secret not in repr(found) for secret in ("a:b", "refresh'", "bearer'"))


@pytest.mark.parametrize("key", ["credHelpers", "credsStore"])
def test_credential_helpers_are_asked(
    docker_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """A helper program gets the host on standard input and answers with user and secret."""
    program = tmp_path / "bin" / "docker-credential-kit"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nread -r host\nprintf \'{"Username": "%s", "Secret": "x"}\' "$host"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    _write_config(docker_home, {key: {"reg.example.com": "kit"} if key == "credHelpers" else "kit"})
    found = docker_config.credentials_for("reg.example.com")
    assert (found.username, found.password) == ("reg.example.com", "x")


@pytest.mark.parametrize(
    ("document", "error", "fragment"),
    [
        ({"credsStore": "../../bin/sh"}, BadInput, "cannot be the name"),
        ({"credsStore": "not-installed-anywhere"}, Missing, "is not installed"),
        ({"auths": {"reg.example.com": {"auth": "%%%"}}}, BadInput, "is not base64"),
        ({"auths": []}, None, ""),
        ({"auths": "x"}, BadInput, "is not an object"),
    ],
)
def test_a_broken_docker_configuration_is_explained(
    docker_home: Path, document: dict[str, Any], error: type[Exception] | None, fragment: str
) -> None:
    """A helper's name never leads to another program, and what cannot be read says so."""
    _write_config(docker_home, document)
    if error is None:
        assert not docker_config.credentials_for("reg.example.com").secret
        return
    with pytest.raises(error, match=fragment):
        docker_config.credentials_for("reg.example.com")


@needs_registry
def test_a_busy_registry_is_tried_again(front: Front, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upload that the registry cannot take now is sent again, after a pause."""
    pauses: list[float] = []
    monkeypatch.setattr(registry.time, "sleep", pauses.append)
    refused: list[str] = []

    def busy_once(handler: Any) -> bool:
        if handler.command == "PUT" and "uploads" in handler.path and not refused:
            refused.append(handler.path)
            handler.rfile.read(int(handler.headers["Content-Length"]))
            return answer(handler, 503, b"", {"Retry-After": "7"})
        return False

    front.rules.append(busy_once)
    _push(bundle, front.host, "models/busy")
    assert (len(refused), pauses) == (1, [7.0])


# The command line


@needs_registry
def test_the_commands(
    real: Registry, bundle: Path, tmp_path: Path, forked: Forker, docker_home: Path
) -> None:
    """Push prints the reference by digest, pull takes it; errors are three lines."""
    env = {"DOCKER_CONFIG": str(docker_home)}
    target = f"oci://{real.host}/models/command:stable"
    pushed = forked.run("push", bundle, target, cwd=tmp_path, env=env)
    assert pushed.code == 0, pushed.err
    reference = pushed.out.strip()
    assert reference.startswith(f"{real.host}/models/command@sha256:")
    key = tmp_path / "release.pub"
    pulled = forked.run("pull", f"oci://{reference}", "out", "--key", key, "--json", cwd=tmp_path, env=env)
    assert pulled.code == 0, pulled.err
    document = pulled.json()
    assert (document["reference"], document["directory"]) == (reference, "out/model")
    assert document["signer"]
    missing = forked.run("pull", f"oci://{real.host}/models/nothing:1", "out", cwd=tmp_path, env=env)
    assert "does not exist" in assert_three_lines(missing, 2)
