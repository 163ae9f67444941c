"""Models that arrive inside a load request, kept in a temporary directory of bounded size."""

from __future__ import annotations

import re
import shutil
import threading
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Dict, Mapping, Optional

from device_agent.errors import BadInput
from device_agent.temporary import OwnDirectory

MAX_FILES = 256
_PART = re.compile(r"[^/\\\0\ud800-\udfff]{1,100}")
_NAME = re.compile(r"[^./\0][^/\0]*")


class Uploads:
    """What clients uploaded, by model name.

    Args:
        limit_bytes: of all files together.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._sizes: Dict[Path, int] = {}
        self._own: Optional[OwnDirectory] = None  # where they lie, once there is one
        self._numbers = count()
        self._reserving = threading.Lock()

    def add(self, name: str, files: Mapping[str, bytes]) -> Path:
        """Write the files of a model.

        Args:
            name: the model's.
            files: content by path inside the model's directory, such as ``1/model.onnx``.

        Returns:
            The model's directory, of that name, to be given to :meth:`remove`.

        Raises:
            BadInput: a name that no directory can have, a path that leaves the directory, or too much.
        """
        if not _NAME.fullmatch(name):  # an empty one would be the directory above, with what is not ours
            raise BadInput(
                f"model '{name[:200]}' cannot be loaded from files",
                "its name cannot be that of a directory",
                "choose a name without slashes that does not begin with a dot",
            )
        paths = [_checked(name, path) for path in files]
        directory: Optional[Path] = None
        try:
            directory = self._reserve(name, files)
            directory.mkdir(parents=True)
            for path, data in zip(paths, files.values()):
                target = directory / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
        except OSError as error:
            if directory is not None:
                self.remove(directory)
            raise BadInput(
                f"the files uploaded for model '{name}' cannot be stored",
                error.strerror or str(error),
                "free space where temporary files are kept (TMPDIR)",
            ) from error
        return directory

    def _reserve(self, name: str, files: Mapping[str, bytes]) -> Path:
        """A place, and room for the files: uploads that come together share what there is."""
        size = sum(map(len, files.values()))
        with self._reserving:
            if len(files) > MAX_FILES or size + sum(self._sizes.values()) > self._limit_bytes:
                raise BadInput(
                    f"the files uploaded for model '{name}' are too large",
                    f"uploaded models may take {self._limit_bytes} bytes in {MAX_FILES} files each",
                    "unload a model that was uploaded, or raise limits.max_upload_bytes",
                )
            directory = self._home() / str(next(self._numbers)) / name
            self._sizes[directory] = size
        return directory

    def _home(self) -> Path:
        if self._own is None:
            self._own = OwnDirectory("upload")
        return self._own.path

    def remove(self, directory: Path) -> None:
        """Delete what :meth:`add` returned; any other directory is left alone."""
        if self._sizes.pop(directory, None) is not None:
            shutil.rmtree(directory.parent, ignore_errors=True)

    def clear(self) -> None:
        """Delete everything."""
        self._sizes.clear()
        own, self._own = self._own, None
        if own is not None:
            own.remove()


def _checked(model: str, path: str) -> PurePosixPath:
    parts = path.split("/")
    if len(path) > 1024 or any(part in (".", "..") or not _PART.fullmatch(part) for part in parts):
        raise _unusable(model, path)
    return PurePosixPath(path)


def _unusable(model: str, path: str) -> BadInput:
    return BadInput(
        f"a file uploaded for model '{model[:200]}' has no usable path",
        f"'{path[:200]}' is not inside the model's directory",
        "name it as in file:1/model.onnx",
    )
