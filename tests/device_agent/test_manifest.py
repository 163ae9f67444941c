"""The contract between host and device: strict, canonical, and safe to read from a stranger."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable, Dict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_agent import manifest
from device_agent.errors import ManifestError
from device_agent.manifest_checks import safe_path
from storage_kit import FILES, make_bundle, manifest_for

_WORD = st.text("abcXYZ019._-", min_size=1, max_size=20)


def _raw() -> Dict[str, Any]:
    document: Dict[str, Any] = json.loads(manifest.dumps(manifest_for(FILES)).decode())
    return document


def _encode(document: Any) -> bytes:
    return json.dumps(document).encode()


@given(
    version=st.integers(1, 10**9),
    shapes=st.lists(st.lists(st.just(-1) | st.integers(1, 4096), max_size=5), min_size=1, max_size=4),
    measurements=st.dictionaries(
        _WORD, st.none() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    ),
    extra=st.dictionaries(_WORD.filter(lambda w: w.strip(".") and w not in FILES), st.binary(max_size=50)),
)
def test_what_is_written_is_what_is_read(version: int, shapes: Any, measurements: Any, extra: Any) -> None:
    """A manifest survives writing and reading unchanged, and always has the same bytes."""
    specs = tuple(manifest.TensorSpec(f"x{i}", "FP32", tuple(shape)) for i, shape in enumerate(shapes))
    written = manifest_for({**FILES, **extra}, version=version, inputs=specs, measurements=measurements)
    data = manifest.dumps(written)
    assert manifest.loads(data) == written
    assert manifest.dumps(manifest.loads(data)) == data


def _set(path: str, value: Any) -> Callable[[Dict[str, Any]], None]:
    def change(document: Dict[str, Any]) -> None:
        *parents, last = path.split(".")
        target: Any = document
        for key in parents:
            target = target[int(key)] if key.isdigit() else target[key]
        target[last] = value

    return change


def _delete(key: str) -> Callable[[Dict[str, Any]], None]:
    def change(document: Dict[str, Any]) -> None:
        del document[key]

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_set("schema", 5), "newer than this agent"),
        (_set("schema", True), "not a positive integer"),
        (_set("schema", "1"), "not a positive integer"),
        (_delete("schema"), "not a positive integer"),
        (_delete("graph"), "graph"),
        (_set("surprise", 1), "unknown key 'surprise'"),
        (_set("golden.surprise", 1), "unknown key 'surprise'"),
        (_set("name", "../evil"), "name"),
        (_set("name", ".hidden"), "name"),
        (_set("name", ""), "name"),
        (_set("version", 0), "version is below 1"),
        (_set("version", 1.5), "wrong type"),
        (_set("version", True), "wrong type"),
        (_set("max_batch_size", 0), "max_batch_size"),
        (_set("inputs", []), "no inputs"),
        (_set("inputs.0.dtype", "FP33"), "unknown dtype"),
        (_set("inputs.0.shape", [0]), "impossible shape"),
        (_set("inputs.0.shape", [-2]), "impossible shape"),
        (_set("inputs.0.shape", [True]), "not a list of int"),
        (_set("files.0.path", "/etc/passwd"), "leaves the bundle"),
        (_set("files.0.path", "../model.onnx"), "leaves the bundle"),
        (_set("files.0.path", "a/../../b"), "leaves the bundle"),
        (_set("files.0.path", "a//b"), "leaves the bundle"),
        (_set("files.0.path", "a\\b"), "leaves the bundle"),
        (_set("files.0.path", "a\nb"), "leaves the bundle"),
        (_set("files.0.path", "n" * 101), "leaves the bundle"),
        (_set("files.0.path", "manifest.json"), "listed as a file"),
        (_set("files.0.path", "model.sig"), "listed as a file"),
        (_set("files.0.path", "model.sig/x"), "passes through another file"),
        (_set("files.0.path", "golden/inputs.npz/x"), "passes through another file"),
        (_set("files.0.path", "golden/inputs.npz"), "listed twice"),
        (_set("files.0.path", "other"), "not among the files"),
        (_set("files.0.sha256", "A" * 64), "not a SHA-256"),
        (_set("files.0.size_bytes", -1), "size is negative"),
        (_set("precision", "int3"), "precision"),
        (_set("golden.tolerances", {}), "tolerances do not match"),
        (_set("golden.tolerances.y.absolute", -1.0), "tolerance is negative"),
        (_set("contract", []), "not an object"),
        (_set("contract.latency_quantile", "p90"), "latency_quantile"),
        (
            _set(
                "engines",
                [
                    {
                        "runtime": "tensorrt",
                        "path": "model.onnx",
                        "precision": "fp16",
                        "fingerprint": {"sm": 7},
                    }
                ],
            ),
            "fingerprint",
        ),
        (_set("files", {}), "not a list"),
    ],
)
def test_malformed_manifests_are_refused(change: Callable[[Dict[str, Any]], None], reason: str) -> None:
    """Whatever is wrong with a manifest, the error names it."""
    document = _raw()
    change(document)
    with pytest.raises(ManifestError) as caught:
        manifest.loads(_encode(document))
    assert reason in str(caught.value)


_BUILD = {
    "runtime": "tensorrt",
    "graph": "model.onnx",
    "precision": "fp16",
    "requires": {"sm": "72", "tensorrt": "8.5"},
    "shapes": {"x": {"least": [1, 3], "usual": [8, 3], "most": [32, 3]}},
    "workspace_bytes": 1 << 30,
    "calibration_cache": "",
    "layer_precisions": "",
    "dla_core": None,
}


def test_engines_to_build_travel_in_the_manifest() -> None:
    """How a device builds an engine is read as it was written, and agents that know no builds refuse it."""
    written = manifest.loads(_encode({**_raw(), "schema": 4, "builds": [_BUILD]}))
    assert manifest.loads(manifest.dumps(written)) == written
    assert manifest.schema_of(written) == 4
    assert b"builds" not in manifest.dumps(manifest_for(FILES))
    with pytest.raises(ManifestError, match="schema 3 has no 'builds'"):
        manifest.loads(_encode({**_raw(), "schema": 3, "builds": [_BUILD]}))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"runtime": "tvm"}, "unknown runtime"),
        ({"precision": "int4"}, "unknown runtime or precision"),
        ({"calibration_cache": "../secret"}, "not among the files"),
        ({"workspace_bytes": -1}, "negative"),
        ({"dla_core": -1}, "negative"),
        ({"shapes": {"x": {"least": [4, 3], "usual": [8, 3], "most": [2, 3]}}}, "impossible shapes"),
        ({"shapes": {"x": {"least": [1], "usual": [8, 3], "most": [8, 3]}}}, "impossible shapes"),
        ({"shapes": {"x": {"least": [0], "usual": [1], "most": [1]}}}, "impossible shapes"),
    ],
)
def test_engines_to_build_that_mean_nothing_are_refused(change: Dict[str, Any], reason: str) -> None:
    """A device is never asked to build what cannot be, or from files that the signature does not cover."""
    with pytest.raises(ManifestError, match=reason):
        manifest.loads(_encode({**_raw(), "schema": 4, "builds": [{**_BUILD, **change}]}))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not JSON"),
        (b"[]", "not an object"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b" " * (manifest.MAX_MANIFEST_BYTES + 1), "the limit is"),
        (b'{"schema": 1, "schema": 1}', "twice"),
        (b'{"schema": NaN}', "not a JSON number"),
        (b'{"schema": 1e999}', "too large"),
        (b'{"name": "\\ud800"}', "not JSON"),
    ],
)
def test_hostile_json_is_refused(data: bytes, reason: str) -> None:
    """Input that is no honest JSON object gets an error, not an exception from deep inside."""
    with pytest.raises(ManifestError) as caught:
        manifest.loads(data)
    assert reason in str(caught.value)


@given(st.binary(max_size=200) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(_encode))
def test_no_input_breaks_the_reader(data: bytes) -> None:
    """Arbitrary bytes either are a manifest or raise ManifestError."""
    with pytest.raises(ManifestError):
        manifest.loads(data)


@given(st.text(max_size=200))
def test_a_safe_path_stays_below_its_directory(path: str) -> None:
    """A path that is called safe names something below the directory that it is joined to."""
    if safe_path(path):
        root = Path("/bundle")
        joined = root / path
        assert root in joined.parents
        assert ".." not in joined.parts
        assert joined.relative_to(root).as_posix() == path


def test_a_directory_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    """A missing manifest, or a link in its place, is refused with the bundle's path."""
    with pytest.raises(ManifestError, match="is not a bundle"):
        manifest.read(tmp_path)
    (tmp_path / "elsewhere").write_bytes(manifest.dumps(manifest_for(FILES)))
    (tmp_path / "manifest.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ManifestError, match="is not a bundle"):
        manifest.read(tmp_path)


def test_the_digest_is_the_manifests_sha256(tmp_path: Path) -> None:
    """The identity of a bundle can be checked with ``sha256sum manifest.json``."""
    head = make_bundle(tmp_path)
    assert manifest.read(tmp_path) == (head.manifest, head.digest)
    assert head.digest == manifest.digest((tmp_path / "manifest.json").read_bytes())
