"""Which files some code consists of: what it imports, and what that imports, and so on."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable
from pathlib import Path


def closure(modules: Iterable[str], find: Callable[[str], Path | None]) -> dict[str, Path]:
    """The sources of some modules and of all that they import, transitively.

    Args:
        modules: names.
        find: the source of a module that counts; None for the others, which are not looked into.
    """
    found: dict[str, Path] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        path = find(name)
        if name not in found and path is not None:
            found[name] = path
            waiting.extend(_imports(name, path))
    return found


def _imports(module: str, path: Path) -> list[str]:
    """Every module that a module may import, imports inside functions included."""
    names = []
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            source = ".".join(filter(None, (above, node.module)))
            names += [source, *(f"{source}.{alias.name}" for alias in node.names)]
    return names
