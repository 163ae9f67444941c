"""Models that are torch.export programs: ``.pt2`` archives.

``torch.export.load`` unpickles without restraint where an archive asks for it, evaluates the text of
symbolic sizes, and loads compiled code. So an archive is looked through before torch may read it, and one
that would make torch execute anything is refused.
"""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from device_agent.manifest import TensorSpec
from edgekit.artifact import file_digest
from edgekit.errors import BadInput, EdgekitError
from edgekit.models import Model, model_name
from edgekit.models.signature import outputs_of, plain_examples
from edgekit.tensors import protocol_dtype

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

# What an archive may hold, below its one top directory. Anything else is refused: compiled code, opaque
# objects, and names that torch's reader of archives might take for others.
_PROGRAM = re.compile(r"models/[^/]+\.json")
_PAYLOADS = re.compile(r"data/(weights/[^/]+_weights|constants/[^/]+_constants)_config\.json")
_SAMPLE_INPUTS = re.compile(r"data/sample_inputs/[^/]+\.pt")
_PLAIN = re.compile(
    r"archive_format|archive_version|byteorder|version|\.data/[^/]+|extra/.+"
    r"|data/weights/weight_\d+|data/constants/tensor_\d+"
)
_PLAIN_PAYLOAD = re.compile(r"(weight|tensor)_\d+")
# What a symbolic size may consist of: names, numbers, operators, calls of sympy's classes.
_ARITHMETIC = (
    ast.Expression, ast.Call, ast.keyword, ast.Name, ast.Load, ast.Constant, ast.UnaryOp, ast.BinOp,
    ast.BoolOp, ast.Compare, ast.operator, ast.unaryop, ast.boolop, ast.cmpop,
)  # fmt: skip
_SYMPY_CLASS = re.compile(r"[A-Z][A-Za-z0-9]*")
_SIZE = re.compile(r"[a-z]+\d+")
_SYMBOL = re.compile(r"[A-Za-z]+(_?[A-Za-z0-9]+)*")


def load(path: Path) -> Model:
    """Read a program saved with ``torch.export.save``.

    Raises:
        BadInput: damaged, of an older format, or something that would execute code.
    """
    _screen(path)
    program = _read(path)
    inputs = _inputs(path, program)
    examples = partial(plain_examples, inputs)
    return Model(
        kind="exported",
        name=model_name(path.stem),
        digest=file_digest(path),
        inputs=inputs,
        outputs=outputs_of(_callable(program, inputs), inputs, examples, str(path)),
        path=path,
        preprocess=None,
        _examples=examples,
        _build=partial(_build, path),
    )


def _build(path: Path) -> nn.Module:
    _screen(path)
    program = _read(path)
    return _callable(program, _inputs(path, program))


def _callable(program: ExportedProgram, inputs: tuple[TensorSpec, ...]) -> nn.Module:
    """The program's module, taking its inputs by position even if it was exported with keywords."""
    from edgekit.models.positional import Positional

    positional, keywords = (spec.num_children for spec in program.call_spec.in_spec.children())
    if not keywords:
        return program.module()
    return Positional(program.module(), [spec.name for spec in inputs], positional)


def _read(path: Path) -> ExportedProgram:
    import torch

    try:
        return torch.export.load(path)
    except Exception as error:  # torch raises a dozen types for a damaged archive
        reason = str(error).strip().splitlines() or [""]
        raise _damaged(path, f"{type(error).__name__}: {reason[0]}") from error


# Looking through the archive


def _screen(path: Path) -> None:
    """Raise BadInput unless reading the archive executes nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = _members(path, archive.namelist())
            if not any(_PROGRAM.fullmatch(member) for member in members):
                raise _damaged(path, "it holds no program; archives from before torch 2.8 are not read")
            for member, name in members.items():
                _screen_member(path, member, archive, name)
    except EdgekitError:
        raise
    except Exception as error:  # zipfile, zlib and json raise a dozen types for a damaged archive
        raise _damaged(path, f"{type(error).__name__}: {error}") from error


def _members(path: Path, names: list[str]) -> dict[str, str]:
    """Names below the one top directory, with the names as they stand in the archive."""
    members = {name.partition("/")[2]: name for name in names}
    if len({name.partition("/")[0] for name in names}) > 1 or len(members) != len(names):
        raise _refused(path, "it has more than one top directory, or one name twice")
    return members


def _screen_member(path: Path, member: str, archive: zipfile.ZipFile, name: str) -> None:
    if _SAMPLE_INPUTS.fullmatch(member):
        _screen_pickle(path, name, archive.read(name))
    elif _PAYLOADS.fullmatch(member):
        for key, payload in json.loads(archive.read(name))["config"].items():
            if payload["use_pickle"] or not _PLAIN_PAYLOAD.fullmatch(payload["path_name"]):
                raise _refused(path, f"'{key}' is stored as a pickle")
    elif _PROGRAM.fullmatch(member):
        for expression in _expressions(json.loads(archive.read(name))):
            if not is_arithmetic(expression):
                raise _refused(path, f"a size is not arithmetic: {expression[:60]!r}")
    elif not _PLAIN.fullmatch(member):
        raise _refused(path, f"'{name}' is no part of a program of tensors")


def _screen_pickle(path: Path, name: str, content: bytes) -> None:
    import torch

    if not content:
        return
    try:
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever it is: torch would go on to unpickle it without restraint
        raise _refused(path, f"'{name}' is a pickle that would execute code, or it is damaged") from error


def _expressions(value: Any) -> Iterator[str]:
    """Every text that torch hands to a parser of expressions, wherever it stands in the program."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key == "expr_str" and isinstance(item, str):
                yield item
            else:
                yield from _expressions(item)
    elif isinstance(value, list):
        for item in value:
            yield from _expressions(item)


def is_arithmetic(expression: str) -> bool:
    """Whether the text of a symbolic size holds nothing but arithmetic over named sizes."""
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    names = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    texts = {
        id(node.args[0])
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "Symbol"
        and node.args
    }
    return all(
        _is_plain(node, is_called=id(node) in names, is_symbol=id(node) in texts) for node in ast.walk(tree)
    )


def _is_plain(node: ast.AST, *, is_called: bool, is_symbol: bool) -> bool:
    if not isinstance(node, _ARITHMETIC):
        return False
    if isinstance(node, ast.Name):
        return (_SYMPY_CLASS if is_called else _SIZE).fullmatch(node.id) is not None
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return is_symbol and _SYMBOL.fullmatch(node.value) is not None
    return not is_called


# The signature


def _inputs(path: Path, program: ExportedProgram) -> tuple[TensorSpec, ...]:
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    specs = []
    for name in program.graph_signature.user_inputs:
        value: Any = values.get(name) if isinstance(name, str) else None
        if not hasattr(value, "shape"):
            raise BadInput(
                f"the model {path} is not one that edgekit takes",
                f"its input '{name}' is not a tensor",
                "export the model with tensors as its only inputs",
            )
        shape = tuple(size if isinstance(size, int) else -1 for size in value.shape)
        specs.append(TensorSpec(str(name), protocol_dtype(_numpy(value.dtype)), shape))
    return tuple(specs)


def _numpy(dtype: Any) -> np.dtype[Any]:
    import torch

    return torch.empty(0, dtype=dtype).numpy().dtype


def _damaged(path: Path, why: str) -> BadInput:
    return BadInput(
        f"the model {path} cannot be read",
        why,
        "save it again with torch.export.save and the torch in use here",
    )


def _refused(path: Path, why: str) -> BadInput:
    return BadInput(
        f"the model {path} is refused",
        f"{why}; nothing of it was executed",
        "export a model of tensors only with torch.export.save",
    )
