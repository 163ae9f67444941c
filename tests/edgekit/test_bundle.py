"""Packing, opening and describing bundles on the host."""

from __future__ import annotations

import io
import json
import resource
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_agent.manifest import Contract, Golden, Manifest, TensorSpec, Tolerance
from edgekit import bundle, sign
from edgekit.errors import BadInput

FILES = {"model.onnx": b"weights" * 100, "golden/inputs.npz": b"in", "golden/outputs.npz": b"out"}


def make_staging(directory: Path, files: dict[str, bytes]) -> Path:
    """Write the files of a bundle that is to be packed."""
    for path, data in files.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(data)
    return directory


def make_manifest(**changes: Any) -> Manifest:
    """What is known of a bundle before it is packed."""
    known: dict[str, Any] = {
        "schema": 1,
        "name": "demo",
        "version": 1,
        "profile": "x86-cpu",
        "architecture": "x86_64",
        "graph": "model.onnx",
        "precision": "fp32",
        "inputs": (TensorSpec("x", "FP32", (-1, 8)),),
        "outputs": (TensorSpec("y", "FP32", (-1, 4)),),
        "max_batch_size": 8,
        "files": (),
        "engines": (),
        "golden": Golden("golden/inputs.npz", "golden/outputs.npz", {"y": Tolerance(1e-4, 1e-4)}),
        "contract": Contract(),
    }
    return Manifest(**{**known, **changes})


@pytest.fixture
def staging(tmp_path: Path) -> Path:
    """The files of a bundle."""
    return make_staging(tmp_path / "staging", FILES)


def test_both_forms_are_published(tmp_path: Path, staging: Path) -> None:
    """A packed bundle is there as a directory and as one file, and both open as the same bundle."""
    packed = bundle.pack(staging, make_manifest(), tmp_path / "out")
    assert (packed.directory, packed.archive) == (tmp_path / "out/demo", tmp_path / "out/demo.edgekit")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["demo", "demo.edgekit"]
    assert [entry.path for entry in packed.manifest.files] == sorted(FILES)
    for form in (packed.directory, packed.archive):
        with bundle.open_bundle(form) as opened:
            assert (opened.manifest, opened.digest) == (packed.manifest, packed.digest)
            assert {path: (opened.directory / path).read_bytes() for path in FILES} == FILES
    assert not opened.directory.exists()


@settings(max_examples=20)
@given(extra=st.dictionaries(st.text("abc", min_size=1, max_size=9), st.binary(max_size=3000), max_size=4))
def test_the_same_content_gives_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, extra: dict[str, bytes]
) -> None:
    """Neither the place, the order of creation nor the time shows in a bundle."""
    root = tmp_path_factory.mktemp("pack")
    files = {**FILES, **extra}
    first = bundle.pack(make_staging(root / "a", files), make_manifest(), root / "x")
    second = bundle.pack(make_staging(root / "b", dict(reversed(files.items()))), make_manifest(), root / "y")
    assert first.digest == second.digest
    assert first.archive.read_bytes() == second.archive.read_bytes()


def test_packing_again_replaces_or_keeps(tmp_path: Path, staging: Path) -> None:
    """Other content replaces the bundle; the same content leaves it alone, with a signature it has."""
    first = bundle.pack(staging, make_manifest(), tmp_path / "out")
    (first.directory / "model.sig").write_bytes(b"signature")
    assert bundle.pack(staging, make_manifest(), tmp_path / "out").digest == first.digest
    assert (first.directory / "model.sig").exists()
    (staging / "model.onnx").write_bytes(b"other")
    second = bundle.pack(staging, make_manifest(), tmp_path / "out")
    assert second.digest != first.digest
    assert not (second.directory / "model.sig").exists()
    with bundle.open_bundle(second.archive) as opened:
        assert opened.digest == second.digest


def test_packing_again_keeps_a_signed_single_file(tmp_path: Path, staging: Path) -> None:
    """A single file that was signed after it was packed is not replaced by an unsigned one."""
    packed = bundle.pack(staging, make_manifest(), tmp_path / "out")
    private, public = sign.keygen(tmp_path / "release")
    sign.sign(packed.archive, private)
    bundle.pack(staging, make_manifest(), tmp_path / "out")
    assert sign.verify(packed.archive, public).signed
    packed.archive.write_bytes(packed.archive.read_bytes()[:-1])
    bundle.pack(staging, make_manifest(), tmp_path / "out")
    assert bundle.inspect(packed.archive)["digest"] == packed.digest


def test_an_interrupted_run_is_no_hindrance(tmp_path: Path, staging: Path) -> None:
    """What a killed run left beside the bundle is cleaned up by the next one."""
    (tmp_path / "out/.demo.new/half").mkdir(parents=True)
    (tmp_path / "out/.demo.old").mkdir()
    bundle.pack(staging, make_manifest(), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["demo", "demo.edgekit"]


def test_a_directory_that_is_no_bundle_is_not_overwritten(tmp_path: Path, staging: Path) -> None:
    """A user's own directory under the bundle's name stays."""
    precious = tmp_path / "out" / "demo" / "thesis.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("years of work")
    with pytest.raises(BadInput, match="is in the way"):
        bundle.pack(staging, make_manifest(), tmp_path / "out")
    assert precious.read_text() == "years of work"


def test_what_cannot_be_packed(tmp_path: Path, staging: Path) -> None:
    """Links, reserved names, missing files and a missing directory are errors that leave nothing behind."""
    with pytest.raises(BadInput, match="not a directory"):
        bundle.pack(tmp_path / "absent", make_manifest(), tmp_path / "out")
    with pytest.raises(BadInput, match="not among the files"):
        bundle.pack(staging, make_manifest(graph="absent.onnx"), tmp_path / "out")
    (staging / "manifest.json").write_text("{}")
    with pytest.raises(BadInput, match="listed as a file"):
        bundle.pack(staging, make_manifest(), tmp_path / "out")
    (staging / "manifest.json").unlink()
    (staging / "link").symlink_to("/etc/passwd")
    with pytest.raises(BadInput, match="link cannot be part"):
        bundle.pack(staging, make_manifest(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_costs_no_bundle(tmp_path: Path, staging: Path) -> None:
    """If a bundle cannot be written, the error says why and the one before is still whole."""
    before = bundle.pack(staging, make_manifest(), tmp_path / "out")
    (staging / "model.onnx").write_bytes(bytes(200_000))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(BadInput, match="cannot be read or written"):
            bundle.pack(staging, make_manifest(), tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    for form in (before.directory, before.archive):
        with bundle.open_bundle(form) as opened:
            assert opened.digest == before.digest
    assert bundle.pack(staging, make_manifest(), tmp_path / "out").digest != before.digest


@pytest.mark.parametrize("form", ["directory", "archive"])
def test_a_damaged_bundle_does_not_open(tmp_path: Path, staging: Path, form: str) -> None:
    """A changed byte is found in both forms."""
    packed = bundle.pack(staging, make_manifest(), tmp_path / "out")
    path = packed.archive if form == "archive" else packed.directory / "model.onnx"
    path.write_bytes(path.read_bytes().replace(b"weights", b"wEights", 1))
    with (
        pytest.raises(BadInput, match=r"was changed: model\.onnx"),
        bundle.open_bundle(getattr(packed, form)),
    ):
        pass


def test_a_newer_schema_is_named(tmp_path: Path) -> None:
    """A bundle from the future says that it is one."""
    (tmp_path / "manifest.json").write_text(json.dumps({"schema": 99}))
    with pytest.raises(BadInput, match="newer than this agent: schema 99"):
        bundle.inspect(tmp_path)


def test_an_ordinary_tar_is_no_bundle(tmp_path: Path) -> None:
    """An archive that someone else made is refused, whatever it holds."""
    with tarfile.open(tmp_path / "x.edgekit", "w") as tar:
        tar.addfile(tarfile.TarInfo("../../evil"), io.BytesIO())
    with pytest.raises(BadInput, match=r"does not begin with manifest\.json"):
        bundle.inspect(tmp_path / "x.edgekit")


def test_errors_of_the_caller_pass_through(tmp_path: Path, staging: Path) -> None:
    """open_bundle cleans up and does not touch errors from inside its block."""
    packed = bundle.pack(staging, make_manifest(), tmp_path / "out")
    with pytest.raises(KeyError), bundle.open_bundle(packed.archive) as opened:
        raise KeyError
    assert not opened.directory.exists()


def test_inspection_is_json(tmp_path: Path, staging: Path) -> None:
    """``inspect`` gives the manifest and what the bundle is, as one JSON document, alike for both forms."""
    packed = bundle.pack(staging, make_manifest(measurements={"metric": 0.5}), tmp_path / "out")
    directory, single = bundle.inspect(packed.directory), bundle.inspect(packed.archive)
    assert json.loads(json.dumps(single))["measurements"] == {"metric": 0.5}
    assert (directory.pop("form"), single.pop("form")) == ("directory", "file")
    assert (directory.pop("path"), single.pop("path")) == (str(packed.directory), str(packed.archive))
    assert directory == single
    assert (single["digest"], single["signed"], single["key_fingerprint"]) == (packed.digest, False, None)
    sizes = sum(entry.size_bytes for entry in packed.manifest.files)
    assert single["size_bytes"] == sizes + (packed.directory / "manifest.json").stat().st_size
