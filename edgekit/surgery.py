"""The shape of a pruned model, kept without pickle.

Structured pruning changes the shapes of parameters and buffers, and the numbers in modules that describe
them (``out_channels``, ``num_features``, ``num_heads``, ...). Both are kept: the tensors in a safetensors
file, the numbers as a list of edits in JSON. Applied to a fresh copy of the original, they give the pruned
model again, on any machine that has the original's code.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.errors import BadInput

if TYPE_CHECKING:
    from torch import nn

Edits = dict[str, dict[str, Any]]

STRUCTURE_FILE = "structure.json"
WEIGHTS_FILE = "weights.safetensors"


def edits_between(original: nn.Module, changed: nn.Module) -> Edits:
    """List the numbers by which ``changed`` differs from ``original``.

    Args:
        original: the model before pruning.
        changed: a copy of it, rewritten (``edgekit.pruning.rewriting``) and pruned: the same modules under
            the same names.

    Returns:
        Module name -> attribute -> new value (an int, a bool, or a list of ints).
    """
    import copy

    from edgekit.pruning.rewriting import rewrite

    before = dict(rewrite(copy.deepcopy(original)).named_modules())
    edits: Edits = {}
    for name, module in changed.named_modules():
        numbers = _numbers(module)
        previous = _numbers(before[name])
        differing = {key: value for key, value in numbers.items() if previous.get(key) != value}
        if differing:
            edits[name] = differing
    return edits


def apply_edits(model: nn.Module, edits: Edits, tensors: dict[str, Any]) -> None:
    """Give a fresh copy of the original the recorded numbers and tensors, in place.

    Raises:
        BadInput: the model has no such module or tensor: it is not the model that was pruned.
    """
    import torch
    from torch import nn

    modules = dict(model.named_modules())
    for name, numbers in edits.items():
        if name not in modules:
            raise _other_model(f"it has no module {name!r}")
        for key, value in numbers.items():
            setattr(modules[name], key, tuple(value) if isinstance(value, list) else value)
    expected = set(model.state_dict())
    if expected != set(tensors):
        raise _other_model(f"its tensors differ: {sorted(expected ^ set(tensors))[0]!r}")
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        module = modules[owner]
        if leaf in module._parameters:
            trainable = module._parameters[leaf].requires_grad
            module._parameters[leaf] = nn.Parameter(torch.clone(tensor), requires_grad=trainable)
        else:
            module._buffers[leaf] = torch.clone(tensor)


def save(directory: Path, edits: Edits, model: nn.Module) -> None:
    """Write ``structure.json`` and ``weights.safetensors``; the same model gives the same bytes."""
    import json

    from safetensors.torch import save as serialized

    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}
    (directory / STRUCTURE_FILE).write_text(json.dumps(edits, sort_keys=True, indent=1) + "\n")
    # save_file() would report a full disk as an error of its own kind
    (directory / WEIGHTS_FILE).write_bytes(serialized(tensors))


def load_into(model: nn.Module, directory: Path) -> nn.Module:
    """Turn a fresh copy of the original into the model that ``save`` wrote, in eval mode."""
    import json

    from safetensors.torch import load_file

    from edgekit.pruning.rewriting import rewrite

    edits = json.loads((directory / STRUCTURE_FILE).read_text())
    apply_edits(rewrite(model), edits, load_file(directory / WEIGHTS_FILE))
    return model.eval()


def _numbers(module: nn.Module) -> dict[str, Any]:
    """Attributes of a module that are ints, bools or tuples of ints, but for its mode."""
    found: dict[str, Any] = {}
    for key, value in vars(module).items():
        if key.startswith("_") or key == "training":
            continue
        if isinstance(value, (int, bool)):
            found[key] = value
        elif isinstance(value, (tuple, list)) and value and all(type(item) is int for item in value):
            found[key] = list(value)
    return found


def _other_model(why: str) -> BadInput:
    return BadInput(
        "the pruned weights do not fit this model",
        why,
        "use the model that was pruned, or remove the working directory to start again",
    )
