"""Shards: every sample once an epoch, in one order, whoever reads; bytes repeat; nothing half-written."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from host_trainer.errors import TrainingError
from host_trainer.shards import index
from host_trainer.shards.members import files
from host_trainer.shards.order import epoch_order
from host_trainer.shards.reader import ShardDataset
from host_trainer.shards.writer import write


def _texts(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"text": f"text {n}", "label": n % 3}) + "\n" for n in range(count)))
    return path


def _folder(root: Path) -> Path:
    for label, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (8, 8), (label * 100, number, 0)).save(root / name / f"{number}.png")
    return root


def _tar(path: Path, members: Iterable[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]  # the mode is not literal
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def _all(spec: str | Path) -> list[dict[str, bytes]]:
    dataset = ShardDataset(str(spec))
    return [dataset[n].parts for n in range(len(dataset))]


@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    seed=st.integers(0, 2**32 - 1),
    epoch=st.integers(0, 5),
    window=st.integers(1, 50),
)
def test_an_epoch_has_every_sample_once(counts: list[int], seed: int, epoch: int, window: int) -> None:
    """Whatever the shards' sizes; the same seed and epoch give the same order, shards stay together."""
    order = epoch_order(counts, seed, epoch, window)
    assert sorted(order) == list(range(sum(counts)))
    assert np.array_equal(order, epoch_order(counts, seed, epoch, window))
    owner = np.repeat(np.arange(len(counts)), counts)
    for begin in range(0, len(order), window):  # a window of samples touches as few shards as it can
        touched = len(set(owner[order[begin : begin + window]]))
        assert touched <= 2 + window // min(counts)


def test_epochs_and_seeds_differ() -> None:
    """Another epoch or seed is another order."""
    orders = [epoch_order([50, 50], seed, epoch).tolist() for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_texts_come_back_and_are_spread(tmp_path: Path) -> None:
    """Each record once, in mixed order, in shards of about the size that was asked for."""
    written = write(_texts(tmp_path / "t.jsonl", 200), tmp_path / "out", shard_bytes=40_000, seed=1)
    assert written.shards > 2
    records = [json.loads(parts["json"]) for parts in _all(written.spec)]
    assert sorted(r["text"] for r in records) == sorted(f"text {n}" for n in range(200))
    assert [r["text"] for r in records] != sorted((r["text"] for r in records), key=lambda t: int(t[5:]))
    sizes = [path.stat().st_size for path in index.expand(written.spec)]
    assert max(sizes) < 40_000 + 2 * tarfile.RECORDSIZE
    assert sum(sizes) == written.size_bytes


def test_images_come_back_byte_for_byte(tmp_path: Path) -> None:
    """Files are not encoded again; classes are numbered by the folders' sorted names, and named beside."""
    root = _folder(tmp_path / "images")
    written = write(root, tmp_path / "out", shard_bytes=1 << 20)
    want = {
        (path.read_bytes(), str(n))
        for n, name in enumerate(("cat", "dog"))
        for path in (root / name).iterdir()
    }
    assert {(parts["png"], parts["cls"].decode()) for parts in _all(written.spec)} == want
    assert json.loads((tmp_path / "out" / "shards.json").read_text())["classes"] == ["cat", "dog"]


def test_pairs_of_image_and_text(tmp_path: Path) -> None:
    """A record that names an image takes the file along."""
    _folder(tmp_path / "images")
    (tmp_path / "p.jsonl").write_text(json.dumps({"text": "a cat", "image": "images/cat/0.png"}) + "\n")
    [parts] = _all(write(tmp_path / "p.jsonl", tmp_path / "out", 1 << 20).spec)
    assert parts["png"] == (tmp_path / "images" / "cat" / "0.png").read_bytes()
    assert json.loads(parts["json"])["text"] == "a cat"


def test_the_same_data_and_seed_give_the_same_bytes(tmp_path: Path) -> None:
    """No times, no owners, no order of the file system; another seed is another order."""
    data = _texts(tmp_path / "t.jsonl", 50)
    digests = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write(data, tmp_path / name, 10_000, seed)
        digests.append([path.read_bytes() for path in sorted((tmp_path / name).glob("*.tar"))])
    assert digests[0] == digests[1] != digests[2]


def test_the_webdataset_package_reads_what_is_written(tmp_path: Path) -> None:
    """The shards are WebDataset's: its own reader gives the same members."""
    pytest.importorskip("webdataset")
    written = write(_texts(tmp_path / "t.jsonl", 40), tmp_path / "out", 10_000)
    program = (
        "import sys, webdataset\n"
        "for sample in webdataset.WebDataset(sys.argv[1], shardshuffle=False):\n"
        "    print(sample['json'].decode())\n"
    )
    theirs = subprocess.run(
        [sys.executable, "-c", program, written.spec], capture_output=True, text=True, check=True
    )
    assert theirs.stdout.splitlines() == [parts["json"].decode() for parts in _all(written.spec)]


@given(
    parts=st.lists(
        st.tuples(st.text("abc./é", min_size=1, max_size=300), st.binary(max_size=1500)),
        min_size=1,
        max_size=4,
    ),
    layout=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_headers_are_read_as_tarfile_reads_them(parts: list[tuple[str, bytes]], layout: int) -> None:
    """Any name and size, in any of the formats that tarfile writes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=layout) as archive:
        for name, content in parts:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            with contextlib.suppress(ValueError):  # ustar has no room for some long names
                archive.addfile(member, io.BytesIO(content))
        end = archive.offset
    with tarfile.open(fileobj=io.BytesIO(buffer.getvalue())) as archive:
        wanted = [(m.name, archive.extractfile(m).read()) for m in archive]  # type: ignore[union-attr]
    found = [(name.rstrip("/"), data) for name, data in files(buffer.getvalue()[:end])]
    assert found == [(name.rstrip("/"), data) for name, data in wanted]


def test_shards_of_others_are_read(tmp_path: Path) -> None:
    """Without an index, with directories, hidden files, long names (PAX and GNU), keys in folders."""
    long = "d/" + "x" * 120
    for number, layout in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        with tarfile.open(tmp_path / f"s-{number}.tar", "w", format=layout) as archive:
            folder = tarfile.TarInfo("d")
            folder.type = tarfile.DIRTYPE
            archive.addfile(folder)
            for name, content in (
                ("d/.DS_Store", b"?"),
                (f"{long}.txt", b"one"),
                (f"{long}.cls", b"1"),
                ("d/b.seg.png", b"2"),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    assert _all(tmp_path / "s-{0..1}.tar") == [{"txt": b"one", "cls": b"1"}, {"seg.png": b"2"}] * 2


def test_batches_and_copies(tmp_path: Path) -> None:
    """A batch comes in the order asked for; a spawned worker's copy reads on its own; the end is an end."""
    dataset = ShardDataset(write(_texts(tmp_path / "t.jsonl", 20), tmp_path / "out", 5_000).spec)
    assert dataset.__getitems__([7, 3, 11]) == [dataset[7], dataset[3], dataset[11]]
    assert pickle.loads(pickle.dumps(dataset))[7] == dataset[7]
    with pytest.raises(IndexError):
        dataset[20]


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("missing", "does not exist"),
        ("empty", "is empty"),
        ("compressed", "cannot be read"),
        ("cut", "is damaged"),
        ("twice", "two members"),
        ("range", "cannot be expanded"),
        ("stale", "does not belong"),
        ("garbled", "is damaged"),
    ],
)
def test_bad_shards_are_named(name: str, what: str, tmp_path: Path) -> None:
    """Each with the shard, the cause and what to do; never a sample that is not what was written."""
    spec = tmp_path / "s.tar"
    sample = [("a.txt", b"x" * 2000), ("a.cls", b"1"), ("b.txt", b"y" * 2000)]
    if name == "empty":
        _tar(spec, [])
    elif name == "compressed":
        _tar(spec, sample, "w:gz")
    elif name == "twice":
        _tar(spec, [("a.txt", b"1"), ("a.txt", b"2")])
    elif name == "range":
        spec = tmp_path / "s-{9..0}.tar"
    elif name in ("cut", "stale", "garbled"):
        _tar(spec, sample)
        index.save(index.find(str(spec))[0])
        if name == "stale":
            _tar(spec, sample * 20)
        elif name == "garbled":
            spec.write_bytes(b"\1" * spec.stat().st_size)
        else:
            dataset = ShardDataset(str(spec))
            with spec.open("r+b") as stream:
                stream.truncate(700)
            with pytest.raises(TrainingError, match=what):
                dataset[0]
            return
    with pytest.raises(TrainingError, match=what) as caught:
        _all(spec)
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize("damage", ["a header", "the end"])
def test_a_shard_without_an_index_is_read_to_its_end_or_not_at_all(damage: str, tmp_path: Path) -> None:
    """A header that is damaged, or a copy that stopped between two files, is an error, not fewer samples."""
    spec = tmp_path / "s.tar"
    _tar(spec, [("a.txt", b"a"), ("b.txt", b"b"), ("c.txt", b"c")])
    assert len(ShardDataset(str(spec))) == 3
    with spec.open("r+b") as stream:
        if damage == "a header":
            stream.seek(2 * tarfile.BLOCKSIZE)
            stream.write(b"\1")
        else:
            stream.truncate(2 * tarfile.BLOCKSIZE)
    with pytest.raises(TrainingError, match=r"s\.tar is damaged at byte 1024"):
        ShardDataset(str(spec))


@pytest.mark.parametrize("kind", ["archive", "vast"])
def test_an_index_from_elsewhere_is_not_trusted(kind: str, tmp_path: Path) -> None:
    """Several arrays, or one that says it is larger than memory, are an error that names the file."""
    spec = tmp_path / "s.tar"
    _tar(spec, [("a.txt", b"a")])
    with (tmp_path / "s.idx").open("wb") as stream:
        if kind == "archive":
            np.savez(stream, starts=np.zeros(2, np.int64))
        else:
            header = {"descr": "<i8", "fortran_order": False, "shape": (1 << 50,)}
            np.lib.format.write_array_header_1_0(stream, header)
    with pytest.raises(TrainingError, match=r"s\.idx is damaged"):
        ShardDataset(str(spec))


def test_nothing_half_written_stays(tmp_path: Path) -> None:
    """A line that is no sample ends the writing: no directory stays; what exists is left alone."""
    data = _texts(tmp_path / "t.jsonl", 10)
    with data.open("a") as stream:
        stream.write("[1]\n")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(TrainingError, match="line 11"):
        write(data, tmp_path / "out", 1000)
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "out").mkdir()
    with pytest.raises(TrainingError, match="exists"):
        write(data, tmp_path / "out", 1000)
