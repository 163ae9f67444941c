"""Images: a folder a class, and what turns a file into numbers."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from host_trainer.config import Config, Data
from host_trainer.data import Sample, shuffled
from host_trainer.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
#: Random crops keep at least this share of the area.
_SMALLEST_CROP = 0.35
#: Images are made this much larger before the centre of them is judged.
_MARGIN = 8 / 7


@dataclass(frozen=True)
class ImageFolder:
    """Images in class folders; the label is the folder's place among the sorted names."""

    files: tuple[tuple[Path, int], ...]
    data: Data
    seed: int
    training: bool

    @classmethod
    def open(cls, directory: Path, config: Config, training: bool) -> ImageFolder:
        """List the images.

        Raises:
            ConfigError: there are no class folders, or no images in them.
        """
        classes = sorted(p for p in directory.iterdir() if p.is_dir() and not p.name.startswith("."))
        files = tuple(
            (path, label)
            for label, folder in enumerate(classes)
            for path in sorted(folder.rglob("*"))
            if path.suffix.lower() in SUFFIXES and path.is_file()
        )
        if not files:
            raise ConfigError(
                f"the data {directory} holds no image in a class folder",
                "images lie in one folder a class, such as cats/1.jpg and dogs/7.jpg",
                "check the path",
            )
        return cls(files, config.data, config.seed, training)

    def __len__(self) -> int:
        return len(self.files)

    def order(self, seed: int, epoch: int) -> np.ndarray[Any, Any]:
        """Any sample may come next."""
        return shuffled(len(self), seed, epoch)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        path, label = self.files[index]
        generator = np.random.default_rng((self.seed, epoch, index)) if self.training else None
        return {
            "pixel_values": pixels(read(path, str(path)), self.data, generator),
            "labels": np.int64(label),
        }


def read(file: Path | IO[bytes], where: str) -> Image:
    """Decode an image, turned upright as its camera noted.

    Raises:
        ConfigError: it is damaged, or no image.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings(), Image.open(file) as image:
            warnings.simplefilter("ignore", UserWarning)  # metadata that cannot be read changes no pixel
            image.load()
            return ImageOps.exif_transpose(image)
    except Exception as error:  # decoders raise whatever a damaged file makes them trip over
        raise ConfigError(
            f"the image {where} cannot be read",
            f"{type(error).__name__}: {error}",
            "remove or replace the file",
        ) from error


def pixels(image: Image, data: Data, generator: np.random.Generator | None) -> np.ndarray[Any, Any]:
    """Float32 [channels, height, width], normalised.

    Args:
        image: any mode.
        data: size, mean and deviation; ``augment`` asks for random crops and mirror images.
        generator: where the randomness comes from; None: the centre of the image.
    """
    from PIL import Image

    image = image.convert("L" if len(data.image_mean) == 1 else "RGB")
    if generator is not None and data.augment:
        box, mirrored = _random_crop(image, generator), bool(generator.integers(2))
    else:
        box, mirrored = _centre(image), False
    image = image.resize((data.image_size, data.image_size), Image.Resampling.BILINEAR, box=box)
    array = np.asarray(image, dtype=np.float32).reshape(data.image_size, data.image_size, -1) / 255
    mean, std = np.array((data.image_mean, data.image_std), np.float32)
    array = (array - mean) / std
    return np.ascontiguousarray((array[:, ::-1] if mirrored else array).transpose(2, 0, 1))


def _centre(image: Image) -> tuple[float, float, float, float]:
    side = min(image.size) / _MARGIN
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return left, top, left + side, top + side


def _random_crop(image: Image, generator: np.random.Generator) -> tuple[float, float, float, float]:
    """A part of random area, shape and place (Szegedy et al., "Going deeper with convolutions", 2015)."""
    area = image.width * image.height * generator.uniform(_SMALLEST_CROP, 1)
    ratio = np.exp(generator.uniform(np.log(3 / 4), np.log(4 / 3)))
    width, height = min(image.width, np.sqrt(area * ratio)), min(image.height, np.sqrt(area / ratio))
    left, top = generator.uniform(0, image.width - width), generator.uniform(0, image.height - height)
    return left, top, left + width, top + height
