"""Directories of images: one folder a class, labels by the folders' sorted names."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING

from edgekit import preprocess as preprocessing
from edgekit.artifact import file_digest
from edgekit.data import Label, Source
from edgekit.data.digests import order, source_digest
from edgekit.errors import BadInput
from edgekit.preprocess import ImagePreprocess, Preprocess
from edgekit.tensors import Arrays

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
#: The input's name where the model's signature is not known yet.
DEFAULT_NAME = "pixel_values"


def open_source(
    directory: Path, preprocess: Preprocess | None, names: Sequence[str] | None, seed: int
) -> Source:
    """List the images; they are opened as they are read.

    Raises:
        BadInput: the directory holds no class folders with images, or the model takes no images.
    """
    description = image_preprocess(str(directory), preprocess)
    entries = _entries(directory)
    contents = [(path.relative_to(directory).as_posix(), file_digest(path)) for path, _ in entries]
    return Source(
        read=partial(_read, entries, order(len(entries), seed), description, names),
        count=len(entries),
        digest=source_digest(contents, preprocess, seed),
    )


def image_preprocess(what: str, preprocess: Preprocess | None) -> ImagePreprocess:
    """The preprocessing, if it is for images; raises BadInput otherwise."""
    if not isinstance(preprocess, ImagePreprocess):
        raise BadInput(
            f"the data {what} holds images, but nothing says how they become inputs",
            "the model's directory has no preprocessor_config.json, and the recipe describes no images",
            "add preprocessing with kind = 'image', size, mean and std to the recipe",
        )
    return preprocess


def open_image(file: Path | IO[bytes], where: str) -> Image:
    """Decode an image wholly, and turn it upright as its camera noted.

    Raises:
        BadInput: it is damaged, or no image.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings(), Image.open(file) as image:
            # Metadata that cannot be read, such as a date, changes no pixel.
            warnings.simplefilter("ignore", UserWarning)
            image.load()
            return ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow's decoders raise whatever a damaged file makes them trip over
        raise BadInput(
            f"the image {where} cannot be read",
            f"{type(error).__name__}: {error}",
            "remove the file, or save it again",
        ) from error


def image_inputs(preprocess: ImagePreprocess, image: Image, names: Sequence[str] | None) -> Arrays:
    """The one input that an image gives."""
    return preprocessing.apply(preprocess, image, names or (DEFAULT_NAME,))


def _entries(directory: Path) -> list[tuple[Path, int]]:
    classes = sorted(path for path in directory.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise BadInput(
            f"the data {directory} has no class folders",
            "images lie in one folder a class, such as cats/1.jpg and dogs/7.jpg",
            "move the images into folders; a single folder will do for calibration",
        )
    return [(path, label) for label, folder in enumerate(classes) for path in _images(folder)]


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def _read(
    entries: list[tuple[Path, int]],
    indices: list[int],
    preprocess: ImagePreprocess,
    names: Sequence[str] | None,
) -> Iterator[tuple[str, Arrays, Label | None]]:
    for index in indices:
        path, label = entries[index]
        yield str(path), image_inputs(preprocess, open_image(path, str(path)), names), label
