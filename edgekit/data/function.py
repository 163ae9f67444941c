"""Functions that yield samples: ``package.module:fn``."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from edgekit.data import Label, Source
from edgekit.data.digests import source_digest
from edgekit.errors import BadInput, EdgekitError
from edgekit.objects import load_callable, load_module
from edgekit.objects import source_digest as module_digest
from edgekit.tensors import Arrays

LABEL = "label"
# A stream may have no end; its identity is that of its source and of its first samples.
_DIGESTED_SAMPLES = 256


def open_source(spec: str) -> Source:
    """Import the function; it is called anew for every reading.

    It yields dicts: one array (or tensor) by input name, without batch axis, and maybe ``label``.

    Raises:
        BadInput: it cannot be imported, or it does not yield such dicts.
    """
    read = partial(_read, spec, load_callable(spec))
    content = [spec, module_digest(load_module(spec)), _content_digest(read)]
    return Source(read=read, count=None, digest=source_digest(content, None, None))


def _read(spec: str, function: Callable[[], Any]) -> Iterator[tuple[str, Arrays, Label | None]]:
    samples = _called(spec, function)
    index = 0
    while True:
        where = f"{spec}, sample {index}"
        try:
            sample = next(samples)
        except StopIteration:
            return
        except EdgekitError:
            raise
        except Exception as error:  # whatever a user's function raises
            raise _failed(where, error) from error
        if not isinstance(sample, Mapping):
            raise BadInput(
                f"{where} is not a dict",
                f"the function yielded a {type(sample).__name__}",
                "yield {'input': array, 'label': number}, one sample at a time",
            )
        arrays = {name: _array(value, name, where) for name, value in sample.items() if name != LABEL}
        yield where, arrays, _label(sample.get(LABEL))
        index += 1


def _called(spec: str, function: Callable[[], Any]) -> Iterator[Any]:
    try:
        return iter(function())
    except Exception as error:  # whatever a user's function raises
        raise _failed(spec, error) from error


def _failed(where: str, error: Exception) -> BadInput:
    return BadInput(
        f"{where} failed", f"{type(error).__name__}: {error}", "the function is called without arguments"
    )


def _array(value: Any, name: str, where: str) -> np.ndarray[Any, Any]:
    array = np.asarray(value.detach().cpu().numpy() if hasattr(value, "detach") else value)
    if array.dtype.kind not in "biuf":
        raise BadInput(
            f"{where}: '{name}' is no array of numbers", f"it is {array.dtype}", "yield NumPy arrays"
        )
    return array


def _label(value: Any) -> Label | None:
    if value is None or isinstance(value, int | float):
        return value
    array = np.asarray(value.detach().cpu().numpy() if hasattr(value, "detach") else value)
    return array if array.ndim else array.item()


def _content_digest(read: Callable[[], Iterator[tuple[str, Arrays, Label | None]]]) -> str:
    digest = hashlib.sha256()
    for _, inputs, label in islice(read(), _DIGESTED_SAMPLES):
        for name, array in sorted(inputs.items()):
            digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        digest.update(b"" if label is None else np.asarray(label).tobytes())
    return digest.hexdigest()
