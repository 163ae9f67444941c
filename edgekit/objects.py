"""Objects that a user names as ``package.module:name``: model factories, data functions, metrics.

The current directory is importable, as with ``python -m``.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import sys
import sysconfig
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from edgekit.errors import BadInput, nearest
from edgekit.source_code import closure

_INSTALLED = {Path(sysconfig.get_path(kind)) for kind in ("stdlib", "platstdlib", "purelib", "platlib")}
_SPEC = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_object_spec(spec: str) -> bool:
    """Whether ``spec`` has the form ``package.module:name``."""
    return _SPEC.fullmatch(spec) is not None


def load_callable(spec: str) -> Callable[..., Any]:
    """Import ``package.module:name``.

    Raises:
        BadInput: the module is not found, fails while it is imported, or has no such function.
    """
    name = spec.partition(":")[2]
    module = load_module(spec)
    found = getattr(module, name, None)
    if not callable(found):
        functions = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise BadInput(
            f"{spec} is not a function",
            f"the module {module.__name__} has no function '{name}'",
            nearest(name, functions) if functions else "define it there",
        )
    return found  # type: ignore[no-any-return]  # checked callable just above


def load_module(spec: str) -> ModuleType:
    """Import the module of ``package.module:name``; raises BadInput as ``load_callable``."""
    module_name = spec.partition(":")[0]
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if module_name == missing or module_name.startswith(missing + "."):
            why, fix = (
                f"there is no module '{missing}'",
                "run from the directory that holds it, or install it",
            )
        else:
            why, fix = f"it imports '{missing}', which is not installed", f"install {missing}"
        raise BadInput(f"{spec} cannot be imported", why, fix) from error
    except Exception as error:  # whatever a user's module raises while it is imported
        raise BadInput(
            f"{spec} cannot be imported",
            f"the module broke on import: {type(error).__name__}: {error}",
            f"`python -c 'import {module_name}'` shows where",
        ) from error


def source_digest(module: ModuleType) -> str:
    """SHA-256 over a module's source and over those of the modules beside it that it has imported.

    What it imports of installed packages is not looked into. A module without a source (built in,
    interactive) counts by its name.
    """
    digest = hashlib.sha256(module.__name__.encode())
    for name, path in sorted(closure((module.__name__,), partial(_counted, module.__name__)).items()):
        digest.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _counted(first: str, name: str) -> Path | None:
    """The source of a module that was imported, unless it is another one and installed."""
    file = getattr(sys.modules.get(name), "__file__", None)
    path = Path(file) if file else None
    if path is None or path.suffix != ".py" or not path.is_file():
        return None
    installed = any(path.is_relative_to(place) for place in _INSTALLED)
    return path if name == first or not installed else None
