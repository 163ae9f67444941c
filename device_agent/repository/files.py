"""The files of a model repository: ``NAME/config.pbtxt``, ``NAME/LABELS``, ``NAME/VERSION/model.onnx``."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import List, Optional, Tuple

from device_agent.errors import BadInput
from device_agent.manifest import open_regular
from device_agent.repository.document import ConfigError, from_json, from_text
from device_agent.repository.model_config import ModelConfig, read

CONFIG_NAME = "config.pbtxt"
MAX_CONFIG_BYTES = 1024 * 1024
MAX_LABELS_BYTES = 16 * 1024 * 1024
MAX_VERSIONS = 1024

_CHUNK_BYTES = 1024 * 1024
_VERSION = re.compile(r"[1-9][0-9]{0,17}")


def check_root(root: Path) -> None:
    """Make sure that a repository can be read.

    Raises:
        BadInput: it is no directory, or not readable.
    """
    if not root.is_dir() or not os.access(root, os.R_OK | os.X_OK):
        raise BadInput(
            f"{root} is not a model repository",
            "it is no directory that this user may read",
            "give --model-repository a directory that holds NAME/1/model.onnx",
        )


def model_names(root: Path) -> List[str]:
    """Every model of a repository: its directories that are not hidden."""
    try:
        return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and entry.name[0] != ".")
    except OSError:
        return []  # a card that was pulled out holds no models


def versions(directory: Path) -> List[int]:
    """The versions of a model, ascending: its directories that are named with a number above zero.

    Raises:
        BadInput: there is no such directory, or it has more than ``MAX_VERSIONS``.
    """
    try:
        entries = [entry for entry in directory.iterdir() if _VERSION.fullmatch(entry.name)]
    except OSError as error:
        raise _unreadable(directory, error.strerror or str(error)) from error
    numbers = [int(entry.name) for entry in entries if entry.is_dir()]
    if len(numbers) > MAX_VERSIONS:
        raise ConfigError(
            f"{directory.name} has {len(numbers)} versions",
            f"the agent looks at up to {MAX_VERSIONS}",
            "remove old ones",
        )
    return sorted(numbers)


def read_config(directory: Path, override: Optional[str] = None) -> ModelConfig:
    """The configuration of a model.

    Args:
        directory: the model's.
        override: a configuration in JSON that replaces the file.

    Returns:
        What was asked for; an empty one where there is neither.

    Raises:
        ConfigError: it is malformed or asks for what this agent does not do.
        BadInput: the file cannot be read.
    """
    name = directory.name
    if override is not None:
        return read(from_json(override, f"the configuration given for '{name}'"), name)
    path = directory / CONFIG_NAME
    if not path.exists():
        return ModelConfig(name)
    return read(from_text(_text(path, MAX_CONFIG_BYTES), f"{name}/{CONFIG_NAME}"), name)


def read_labels(path: Path) -> Tuple[str, ...]:
    """The names of classes, one a line, the first that of class 0.

    Raises:
        BadInput: the file is missing, unreadable, too long or not UTF-8.
    """
    return tuple(_text(path, MAX_LABELS_BYTES).splitlines())


def digest(directory: Path, version: int, config: ModelConfig) -> str:
    """Identity of a version: what is configured, the labels, and every file of its directory.

    Raises:
        BadInput: a file cannot be read.
    """
    identity = hashlib.sha256(f"{version}\n{sorted(config.document.items())}\n".encode())
    labels = [directory / tensor.label_filename for tensor in config.outputs if tensor.label_filename]
    graph_files = sorted(path for path in (directory / str(version)).rglob("*") if path.is_file())
    for path in [*graph_files, *labels]:
        identity.update(
            f"{path.relative_to(directory)}\n{_file_digest(path)}\n".encode("utf-8", "surrogateescape")
        )
    return identity.hexdigest()


def _file_digest(path: Path) -> str:
    content = hashlib.sha256()
    try:
        with open_regular(path) as stream:
            for chunk in iter(lambda: stream.read(_CHUNK_BYTES), b""):
                content.update(chunk)
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from error
    return content.hexdigest()


def _text(path: Path, limit_bytes: int) -> str:
    try:
        with open_regular(path) as stream:
            data = stream.read(limit_bytes + 1)
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from error
    if len(data) > limit_bytes:
        raise _unreadable(path, f"it has more than {limit_bytes} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _unreadable(path, f"it is not UTF-8: {error}") from error


def _unreadable(path: Path, why: str) -> BadInput:
    return BadInput(f"{path} cannot be used", why, "correct the file, and load the model again")
