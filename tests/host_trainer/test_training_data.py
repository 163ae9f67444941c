"""Training data: every form becomes the samples that a model takes, and each is seen as often as promised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from host_trainer import config as configuration
from host_trainer.config import Config
from host_trainer.data import Share, open_samples
from host_trainer.data.collate import collate
from host_trainer.data.order import held_out_batches, training_loader
from host_trainer.errors import ConfigError


def _config(train: str, **data: Any) -> Config:
    return configuration.parse(
        {
            "run": "unused",
            "model": {"source": "zoo:net"},
            "data": {"train": train, "workers": 0, "image_size": 8, **data},
            "optimize": {"batch_size": 4},
            "parallel": {"device": "cpu"},
        },
        "the test",
    )


class _Numbers:
    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        return {"number": np.float32(key[1])}

    def order(self, seed: int, epoch: int) -> np.ndarray[Any, Any]:
        return np.random.default_rng((seed, epoch)).permutation(self._count)


@settings(max_examples=60)
@given(
    count=st.integers(1, 60), world=st.integers(1, 3), micro=st.integers(1, 3), accumulated=st.integers(1, 3),
    first=st.integers(0, 5), epoch=st.integers(0, 3),
)  # fmt: skip
def test_a_step_holds_the_same_samples_on_any_number_of_processes(
    count: int, world: int, micro: int, accumulated: int, first: int, epoch: int
) -> None:
    """All processes' shares together are the run of samples that one process takes, from any step on."""
    batch_size = world * micro * accumulated
    numbers = _Numbers(count)
    order = numbers.order(0, epoch)
    if count < batch_size:
        with pytest.raises(ConfigError, match="fewer than one step"):
            training_loader(numbers, _config("x"), Share(batch_size, micro, 0, world))
        return
    loaders = [
        training_loader(numbers, _config("x"), Share(batch_size, micro, rank, world)) for rank in range(world)
    ]
    steps = count // batch_size
    assert {loader.steps_per_epoch for loader in loaders} == {steps}
    shares = [list(loader.batches(epoch, first)) for loader in loaders]
    for number, parts in enumerate(zip(*shares, strict=True), start=first):
        seen = [float(n) for part in parts for micro_batch in part for n in micro_batch["number"]]
        assert seen == order[number * batch_size : (number + 1) * batch_size].tolist()
    assert len(shares[0]) == max(0, steps - first)


@given(count=st.integers(1, 40), world=st.integers(1, 4), micro=st.integers(1, 5))
def test_held_out_samples_count_once(count: int, world: int, micro: int) -> None:
    """Over all processes each counts once, and all processes compute the same number of batches."""
    counted: list[float] = []
    rounds = set()
    for rank in range(world):
        batches = list(
            held_out_batches(_Numbers(count), _config("x"), Share(micro * world, micro, rank, world))
        )
        rounds.add(len(batches))
        counted += [float(n) for batch, counts in batches for n in batch["number"][:counts]]
    assert sorted(counted) == list(range(count))
    assert len(rounds) == 1


def test_sequences_are_filled_up() -> None:
    """To the longest, in multiples of 8; the mask is 0 and labels are -100 where something was filled in."""
    samples = [
        {"input_ids": np.arange(n), "attention_mask": np.ones(n, np.int64), "labels": np.arange(n)}
        for n in (3, 9)
    ]
    batch = collate(samples)
    assert batch["input_ids"].shape == (2, 16)
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 9]
    assert batch["labels"][0, 3:].eq(-100).all()


def _folder(root: Path) -> Path:
    for label, name in enumerate(("cats", "dogs")):
        (root / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (20, 12), (100 * label + number, 0, 0)).save(root / name / f"{number}.png")
    return root


def test_class_folders_give_images_and_labels(tmp_path: Path) -> None:
    """Float32, channels first, normalised; labels by the folders' sorted names."""
    samples = open_samples(str(_folder(tmp_path / "images")), _config("x"), training=False)
    assert len(samples) == 6
    sample = samples[0, 4]
    assert sample["pixel_values"].shape == (3, 8, 8)
    assert sample["pixel_values"].dtype == np.float32
    assert sample["labels"] == 1
    expected = (101 / 255 - 0.485) / 0.229
    assert np.allclose(sample["pixel_values"][0], expected, atol=1e-5)


def test_augmentation_depends_on_the_epoch_and_the_sample_alone(tmp_path: Path) -> None:
    """Another epoch gives another crop; asked again, in any order, the same crop comes."""
    noise = np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    (tmp_path / "images" / "a").mkdir(parents=True)
    Image.fromarray(noise).save(tmp_path / "images" / "a" / "0.png")
    samples = open_samples(str(tmp_path / "images"), _config("x"), training=True)
    first, other, again = (samples[epoch, 0]["pixel_values"] for epoch in (0, 1, 0))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_damaged_image_is_named_wherever_it_is_read(tmp_path: Path) -> None:
    """With worker processes too, the error says which file it is."""
    root = _folder(tmp_path / "images")
    (root / "cats" / "1.png").write_bytes(b"no image")
    for workers in (0, 1):
        config = _config(str(root), workers=workers)
        loader = training_loader(open_samples(str(root), config, training=True), config, Share(6, 6))
        with pytest.raises(ConfigError, match=r"cats/1\.png cannot be read"):
            list(loader.batches(0, 0))


def _tokenizer(path: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "good": 1, "bad": 2, "film": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))
    return path


def test_records_give_texts_images_and_pairs(tmp_path: Path) -> None:
    """A record's text and image become the inputs that a model of pairs takes."""
    _folder(tmp_path / "images")
    records = [
        {"text": "good film", "image": "images/cats/0.png"},
        {"text": "bad", "image": "images/dogs/2.png"},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    config = _config(str(path), tokenizer=str(_tokenizer(tmp_path / "tokenizer.json")))
    samples = open_samples(str(path), config, training=False)
    batch = collate([samples[0, 0], samples[0, 1]])
    assert batch["input_ids"][:, :2].tolist() == [[1, 3], [2, 0]]
    assert batch["attention_mask"].sum(dim=1).tolist() == [2, 1]
    assert batch["pixel_values"].shape == (2, 3, 8, 8)
    assert "labels" not in batch


def test_shards_give_the_samples_of_their_folder(tmp_path: Path) -> None:
    """What was written from class folders is read back with the same pixels and labels."""
    from host_trainer.shards.writer import write

    root = _folder(tmp_path / "images")
    config = _config("x")
    folder = open_samples(str(root), config, training=False)
    shards = open_samples(write(root, tmp_path / "shards", 1 << 20).spec, config, training=False)
    keys = lambda samples: sorted(  # noqa: E731
        (int(s["labels"]), s["pixel_values"].tobytes()) for s in (samples[0, n] for n in range(len(samples)))
    )
    assert keys(folder) == keys(shards)


@pytest.mark.parametrize(
    ("line", "said"),
    [("{", "is not JSON"), ('{"text": 3}', "has no text"), ('{"text": "a", "label": "b"}', "label")],
)
def test_a_bad_record_is_named(tmp_path: Path, line: str, said: str) -> None:
    """The file, the record and what is wrong with it."""
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "good", "label": 1}\n' + line + "\n")
    config = _config(str(path), tokenizer=str(_tokenizer(tmp_path / "tokenizer.json")))
    samples = open_samples(str(path), config, training=True)
    assert samples[0, 0]["labels"] == 1
    with pytest.raises(ConfigError, match=said) as caught:
        samples[0, 1]
    assert "record 2" in caught.value.what


@pytest.mark.parametrize("spec", ["nowhere", "no.module:here", "json:nothing", "nowhere.jsonl"])
def test_data_that_is_not_there_is_named(spec: str) -> None:
    """A path, a module or a function that does not exist."""
    with pytest.raises(ConfigError):
        open_samples(spec, _config("x"), training=True)


def test_batches_are_tensors_with_samples_first() -> None:
    """Whatever the sample's values are, arrays or numbers."""
    batch = collate(
        [{"x": np.ones((2, 3), np.float32), "labels": 1.5}, {"x": np.ones((2, 3), np.float32), "labels": 2.0}]
    )
    assert batch["x"].shape == (2, 2, 3)
    assert torch.equal(batch["labels"], torch.tensor([1.5, 2.0], dtype=torch.float64))
