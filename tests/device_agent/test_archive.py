"""Both forms of a bundle, and what an archive from a stranger cannot do."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from device_agent import archive, ustar
from device_agent.errors import AgentError, BadInput, ManifestError, TrustError
from storage_kit import FILES, make_bundle, make_key, signed_bundle

_PART = st.text("abcdefXYZ0189._-", min_size=1, max_size=60).filter(lambda part: part.strip("."))
_PATHS = st.lists(_PART, min_size=1, max_size=3).map("/".join).filter(lambda p: len(p) <= 150)


def _tree(directory: Path) -> Dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def _unpack(bundle: Path, destination: Path) -> archive.Head:
    head = archive.read_head(bundle)
    archive.unpack(bundle, head, destination)
    return head


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(extra=st.dictionaries(_PATHS, st.binary(max_size=2000), max_size=6), signed=st.booleans())
def test_both_forms_hold_the_same_bundle(
    tmp_path_factory: pytest.TempPathFactory, extra: Dict[str, bytes], signed: bool
) -> None:
    """Packing and unpacking gives the same files, digest and signature."""
    root = tmp_path_factory.mktemp("forms")
    try:
        make_bundle(root / "b", extra=extra)
    except (OSError, ManifestError):
        return  # one drawn path passes through another
    head = signed_bundle(root / "b", make_key(None), extra=extra) if signed else archive.read_head(root / "b")
    archive.pack(root / "b", root / "b.edgekit")
    assert _unpack(root / "b.edgekit", root / "from-file") == head
    assert _unpack(root / "b", root / "from-directory") == head
    assert _tree(root / "from-file") == _tree(root / "from-directory") == _tree(root / "b")


def test_the_single_file_is_reproducible(tmp_path: Path) -> None:
    """Times, owners and the order of creation leave no trace in the archive."""
    make_bundle(tmp_path / "a")
    make_bundle(tmp_path / "b", extra={})
    os.utime(str(tmp_path / "b" / "model.onnx"), (1, 1))
    (tmp_path / "b" / "model.onnx").chmod(0o600)
    for name in "ab":
        archive.pack(tmp_path / name, tmp_path / f"{name}.edgekit")
    assert (tmp_path / "a.edgekit").read_bytes() == (tmp_path / "b.edgekit").read_bytes()


def test_any_tar_program_can_look_inside(tmp_path: Path) -> None:
    """The single file is an ordinary tar archive with the manifest first."""
    make_bundle(tmp_path / "b")
    archive.pack(tmp_path / "b", tmp_path / "b.edgekit")
    with tarfile.open(str(tmp_path / "b.edgekit")) as tar:
        members = tar.getmembers()
        assert members[0].name == "manifest.json"
        assert sorted(m.name for m in members[1:]) == [m.name for m in members[1:]] == sorted(FILES)
        assert {(m.mtime, m.uid, m.gid, m.mode, m.uname) for m in members} == {(0, 0, 0, 0o644, "")}
        content = tar.extractfile("model.onnx")
        assert content is not None
        assert content.read() == FILES["model.onnx"]


Member = Tuple[bytes, bytes]


def _member(name: str, data: bytes = b"", kind: bytes = b"0", link: str = "") -> Member:
    """A member whose header is right but for what makes it an attack."""
    header = bytearray(ustar.header("x", len(data)))
    header[0:100] = name.encode().ljust(100, b"\0")
    header[156:157] = kind
    header[157:257] = link.encode().ljust(100, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header), data


def _members(directory: Path) -> List[Member]:
    """The members of a bundle's archive, in order."""
    names = ["manifest.json", *sorted(FILES)]
    return [_member(name, (directory / name).read_bytes()) for name in names]


def _write(path: Path, members: List[Member]) -> None:
    path.write_bytes(b"".join(h + d + ustar.padding(len(d)) for h, d in members) + ustar.END)


def _replace(*arguments: Any, **options: Any) -> Callable[[List[Member]], List[Member]]:
    """Put a member in the place of the last one, which is ``model.onnx``."""
    return lambda members: [*members[:-1], _member(*arguments, **options)]


ATTACKS: Dict[str, Tuple[Callable[[List[Member]], List[Member]], str]] = {
    "absolute path": (_replace("/etc/cron.d/x"), "leads out of the bundle"),
    "path traversal": (_replace("../../etc/passwd"), "leads out of the bundle"),
    "symbolic link": (_replace("model.onnx", kind=b"2", link="/etc/shadow"), "is a symbolic link"),
    "hard link": (_replace("model.onnx", kind=b"1", link="/etc/shadow"), "is a hard link"),
    "device": (_replace("model.onnx", kind=b"3"), "is a device"),
    "pipe": (_replace("model.onnx", kind=b"6"), "is a pipe"),
    "directory": (_replace("model.onnx", kind=b"5"), "is a directory"),
    "oversize member": (
        _replace("model.onnx", bytes(9999)),
        "9999 bytes, the manifest says 3500",
    ),
    "undersize member": (_replace("model.onnx", b"x"), "1 bytes, the manifest says 3500"),
    "unlisted member": (_replace("extra", b"x"), "the manifest does not list"),
    "duplicate": (lambda m: [*m[:2], m[1], *m[2:]], "twice, or out of its place"),
    "second manifest": (lambda m: [m[0], m[0], *m[1:]], "twice, or out of its place"),
    "missing member": (lambda m: m[:-1], "where model.onnx should begin"),
    "appended member": (lambda m: [*m, _member("late", b"x")], "the manifest does not list"),
    "no manifest": (lambda m: m[1:], "does not begin with manifest.json"),
    "manifest last": (lambda m: [*m[1:], m[0]], "does not begin with manifest.json"),
    "empty": (lambda m: [], "does not begin with manifest.json"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_archive_is_refused_with_its_own_reason(tmp_path: Path, name: str) -> None:
    """No archive gets anything onto the disk but the files of its manifest, and the error says why."""
    attack, reason = ATTACKS[name]
    make_bundle(tmp_path / "b")
    archive.pack(tmp_path / "b", tmp_path / "b.edgekit")
    _write(tmp_path / "same.edgekit", _members(tmp_path / "b"))
    assert (tmp_path / "same.edgekit").read_bytes() == (tmp_path / "b.edgekit").read_bytes()
    _write(tmp_path / "b.edgekit", attack(_members(tmp_path / "b")))
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(BadInput) as caught:
        _unpack(tmp_path / "b.edgekit", tmp_path / "out")
    assert reason in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_tampered_member_is_refused(tmp_path: Path) -> None:
    """Content of the right size and the wrong digest leaves nothing behind."""
    make_bundle(tmp_path / "b")
    archive.pack(tmp_path / "b", tmp_path / "b.edgekit")
    raw = (tmp_path / "b.edgekit").read_bytes().replace(b"weights", b"wEights")
    (tmp_path / "b.edgekit").write_bytes(raw)
    with pytest.raises(TrustError, match=r"was changed: model\.onnx"):
        _unpack(tmp_path / "b.edgekit", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bundle_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    """What is unpacked is what was authenticated, even if the archive is exchanged in between."""
    for name, version in (("a", 1), ("b", 2)):
        make_bundle(tmp_path / name, version=version)
        archive.pack(tmp_path / name, tmp_path / f"{name}.edgekit")
    head = archive.read_head(tmp_path / "a.edgekit")
    with pytest.raises(BadInput, match="changed while it was read"):
        archive.unpack(tmp_path / "b.edgekit", head, tmp_path / "out")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A signed single-file bundle."""
    root = tmp_path_factory.mktemp("packed")
    signed_bundle(root / "b", make_key(None), extra={"model.onnx": b"w" * 700})
    archive.pack(root / "b", root / "b.edgekit")
    return root / "b.edgekit"


@settings(max_examples=60)
@given(data=st.data())
def test_a_truncated_archive_is_refused(packed: Path, data: Any) -> None:
    """An interrupted copy is refused wherever it broke off."""
    raw = packed.read_bytes()
    cut = packed.with_name("cut.edgekit")
    cut.write_bytes(raw[: data.draw(st.integers(0, len(raw) - 1))])
    with pytest.raises(AgentError):
        _unpack(cut, packed.with_name("out"))
    assert not packed.with_name("out").exists()


@settings(max_examples=150)
@given(data=st.data())
def test_no_flipped_byte_goes_unnoticed(packed: Path, data: Any) -> None:
    """Every byte of an archive counts: a change is refused, or changes the identity or the signature."""
    raw = bytearray(packed.read_bytes())
    index = data.draw(st.integers(0, len(raw) - 1))
    raw[index] ^= data.draw(st.integers(1, 255))
    flipped, out = packed.with_name("flipped.edgekit"), packed.with_name("flipped")
    flipped.write_bytes(bytes(raw))
    original = archive.read_head(packed)
    try:
        head = archive.read_head(flipped)
        archive.unpack(flipped, head, out)
    except AgentError:
        assert not out.exists()
        return
    for path in sorted(out.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    out.rmdir()
    assert head.digest != original.digest or head.signature != original.signature


def test_trailing_data_is_refused(packed: Path) -> None:
    """Nothing can hide behind the end of an archive."""
    longer = packed.with_name("longer.edgekit")
    longer.write_bytes(packed.read_bytes() + b"\0")
    with pytest.raises(BadInput, match="something follows its end"):
        _unpack(longer, packed.with_name("out"))


@given(_PATHS, st.integers(0, ustar.MAX_MEMBER_BYTES))
def test_headers_are_what_tar_writes(path: str, size: int) -> None:
    """Every member header is one that Python's tarfile reads as the same path and size."""
    info = tarfile.TarInfo.frombuf(ustar.header(path, size), "utf-8", "strict")
    assert (info.name, info.size, info.isreg()) == (path, size, True)
    assert ustar.declared_name(ustar.header(path, size)) == path
    assert ustar.declared_size(ustar.header(path, size)) == size


def test_what_does_not_fit_the_format_says_so() -> None:
    """A file beyond the format's limit is an error that offers the directory form."""
    with pytest.raises(BadInput, match="directory form"):
        ustar.header("model.onnx", ustar.MAX_MEMBER_BYTES + 1)


def test_pipes_and_missing_paths_are_no_bundles(tmp_path: Path) -> None:
    """A path that is no bundle is an error at once, not a hang."""
    with pytest.raises(BadInput, match="cannot be read"):
        archive.read_head(tmp_path / "missing.edgekit")
    os.mkfifo(str(tmp_path / "pipe"))
    with pytest.raises(BadInput):
        archive.read_head(tmp_path / "pipe")
    (tmp_path / "dir").mkdir()
    os.mkfifo(str(tmp_path / "dir" / "manifest.json"))
    with pytest.raises(ManifestError):
        archive.read_head(tmp_path / "dir")
