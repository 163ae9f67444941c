"""Data: samples for calibration, recovery and measurement, streamed from any of its forms.

    dataset = load_data("photos/", model.preprocess, model.inputs)     images in class folders
    dataset = load_data("calib.npz", None, model.inputs)               one array for each input, ``labels``
    dataset = load_data("sentences.jsonl", model.preprocess, model.inputs)   texts, or images with boxes
    dataset = load_data("shards/{000..009}.tar", ...)                  WebDataset shards
    dataset = load_data("package.module:fn", None, model.inputs)       a function that yields dicts

    dataset.samples()        (inputs of one sample without batch axis, label or None); as often as wanted
    dataset.batches(32)      (inputs with the batch axis first, labels or None)
    dataset.take(512)        its first samples
    dataset.count, dataset.has_labels, dataset.digest

Every sample is checked against the model's signature when it is read, the first one at once. Files of
samples are read in an order that ``seed`` decides, so that the first hundred of a class-sorted folder
are of all classes; shards and functions keep their own order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from device_agent.manifest import TensorSpec
from edgekit import preprocess as preprocessing
from edgekit.data.batching import batched
from edgekit.errors import BadInput
from edgekit.objects import is_object_spec
from edgekit.preprocess import Preprocess
from edgekit.tensors import Arrays, check_sample

Label = int | float | np.ndarray[Any, Any]


class Sample(NamedTuple):
    """One sample: arrays by input name without batch axis, and its label if there is one."""

    inputs: Arrays
    label: Label | None


class Batch(NamedTuple):
    """Some samples: arrays by input name with the batch axis first, and their labels if there are any."""

    inputs: Arrays
    labels: np.ndarray[Any, Any] | None


@dataclass(frozen=True)
class Source:
    """Where samples come from, before they are checked.

    Attributes:
        read: starts over at every call; yields where a sample stands (for messages), inputs, label.
        count: number of samples; None where only reading tells.
        digest: of everything that decides what ``read`` yields.
    """

    read: Callable[[], Iterator[tuple[str, Arrays, Label | None]]]
    count: int | None
    digest: str


@dataclass(frozen=True)
class Dataset:
    """Checked samples that can be read again and again, always in the same order.

    Attributes:
        count: number of samples; None where only reading tells.
        has_labels: whether samples carry labels.
        digest: SHA-256 of everything that decides what is read, preprocessing and order included.
    """

    count: int | None
    has_labels: bool
    digest: str
    _read: Callable[[], Iterator[Sample]] = field(repr=False, compare=False)
    _pad_id: int = field(default=0, repr=False)

    def samples(self) -> Iterator[Sample]:
        """Read from the start.

        Raises:
            BadInput: a sample is damaged or does not fit the model; the message says which.
        """
        return self._read()

    def batches(self, size: int) -> Iterator[Batch]:
        """Read in batches of at most ``size``, the last one as small as it comes.

        Texts of different lengths are padded to the longest of their batch, with mask 0; so a batch of
        one is never padded. Other inputs of different sizes do not share a batch.
        """
        for inputs, labels in batched(self._read(), size, self._pad_id):
            yield Batch(inputs, labels)

    def take(self, count: int) -> Dataset:
        """The first ``count`` samples, or all if there are fewer."""
        known = None if self.count is None else min(count, self.count)
        return replace(
            self, count=known, digest=f"{self.digest}[:{count}]", _read=lambda: islice(self._read(), count)
        )

    def split(self, every: int) -> tuple[Dataset, Dataset]:
        """Two parts: what is left, and every ``every``-th sample, held out."""
        return (
            self._where(lambda position: position % every != every - 1, f"{self.digest}[not 1/{every}]"),
            self._where(lambda position: position % every == every - 1, f"{self.digest}[1/{every}]"),
        )

    def shuffled(self, samples: Sequence[Sample], seed: tuple[int, ...]) -> Dataset:
        """A data set of ``samples``, read from this one before, in an order drawn from ``seed``."""
        order = np.random.default_rng(seed).permutation(len(samples))
        return Dataset(
            len(samples),
            self.has_labels,
            f"{self.digest}[shuffled {seed}]",
            lambda: (samples[position] for position in order),
            self._pad_id,
        )

    def _where(self, keep: Callable[[int], bool], digest: str) -> Dataset:
        count = None if self.count is None else sum(map(keep, range(self.count)))
        return Dataset(
            count,
            self.has_labels,
            digest,
            lambda: (sample for position, sample in enumerate(self._read()) if keep(position)),
            self._pad_id,
        )


def load_data(
    spec: str | Path,
    preprocess: Preprocess | None,
    signature: Sequence[TensorSpec] | None,
    seed: int = 0,
) -> Dataset:
    """Open a data set in any of its forms, and check its first sample.

    Args:
        spec: a directory, a ``.npz`` or ``.jsonl`` file, ``.tar`` shards (``{000..009}`` expands), or
            ``package.module:fn``.
        preprocess: how images and texts become inputs; not applied to tensors.
        signature: the model's inputs; None, where they are not known yet, checks for finite values only
            and calls an image ``pixel_values``.
        seed: decides the order.

    Raises:
        BadInput: missing, empty, malformed, or not what the model takes.
    """
    source = _open(str(spec), preprocess, signature, seed)

    first = next(source.read(), None)
    if first is None:
        raise BadInput(
            f"the data {spec} is empty",
            "there is no sample in it",
            "give at least a few hundred samples that look like what the device will see",
        )
    pad_id = preprocess.pad_id if isinstance(preprocess, preprocessing.TextPreprocess) else 0
    read = partial(_checked, source, signature, first[2])
    next(read())
    return Dataset(source.count, first[2] is not None, source.digest, read, pad_id)


def _checked(source: Source, signature: Sequence[TensorSpec] | None, first: Label | None) -> Iterator[Sample]:
    for where, inputs, label in source.read():
        check_sample(inputs, signature, where)
        _check_label(label, first, where)
        yield Sample(inputs, label)


def _check_label(label: Label | None, first: Label | None, where: str) -> None:
    """Labels are numbers, and all like the first sample's: there, or not, and of its shape."""
    if (label is None) != (first is None):
        raise BadInput(
            f"{where} {'lacks a label' if label is None else 'has a label'}",
            f"the first sample has {'none' if first is None else 'one'}",
            "give every sample a label, or none",
        )
    if label is not None and np.asarray(label).dtype.kind not in "biuf":
        raise BadInput(
            f"{where} has a label that is no number",
            f"it is {str(label)[:40]!r}",
            "number the classes as the model does, from 0",
        )
    if np.shape(label) != np.shape(first):  # type: ignore[arg-type]  # neither is None, or both are
        raise BadInput(
            f"{where} has a label of the shape {list(np.shape(label))}",  # type: ignore[arg-type]
            f"the first sample's is {list(np.shape(first))}",  # type: ignore[arg-type]
            "fill labels up to one shape, as boxes with rows of class -1",
        )


def _open(
    text: str, preprocess: Preprocess | None, signature: Sequence[TensorSpec] | None, seed: int
) -> Source:
    from edgekit.data import annotated, arrays, function, images, shards, texts

    path = Path(text)
    if is_object_spec(text) and not path.exists():
        return function.open_source(text)
    names = [spec.name for spec in signature] if signature is not None else None
    if path.suffix == ".tar":
        return shards.open_source(text, preprocess, names)
    if not path.exists():
        raise BadInput(
            f"the data {text} does not exist",
            "there is no such file or directory, and it is not package.module:fn",
            "check the path",
        )
    if path.is_dir():
        return images.open_source(path, preprocess, names, seed)
    if path.suffix == ".npz":
        return arrays.open_source(path, signature, seed)
    if path.suffix == ".jsonl" and isinstance(preprocess, preprocessing.ImagePreprocess):
        return annotated.open_source(path, preprocess, names, seed)
    if path.suffix == ".jsonl":
        return texts.open_source(path, preprocess, names, seed)
    raise BadInput(
        f"{text} is not data that edgekit reads",
        f"'{path.suffix}' is none of .npz, .jsonl, .tar, a directory of images, package.module:fn",
        "convert it, or write a function that yields dicts of arrays",
    )
