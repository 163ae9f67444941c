"""The parts of a model, found by its structure: its blocks, its head, which layers do what.

What repeats is the body: the children of a container that holds several of one class. What comes after the
last such container is the head. Inside the body, what lies below a class that calls itself attention projects
for it; the other linear layers are the feed-forward part. Without repetition, the last layer is the head and
all before it the body.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd


@dataclass(frozen=True)
class Layers:
    """Names of a model's layers by their part in it.

    Attributes:
        attention: projections of attention.
        mlp: linear layers of the feed-forward part.
        convolution: convolutions over all channels.
        grouped: convolutions over groups of channels: a low-rank update would not stay within the groups.
        head: what comes after the body and is not shared with the embedding.
    """

    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    convolution: tuple[str, ...]
    grouped: tuple[str, ...]
    head: tuple[str, ...]


def survey(model: nn.Module) -> Layers:
    """Sort a model's layers."""
    names = [name for name, _ in _projections(model)]
    body = _body(model)
    inside = [name for name in names if _is_below(name, body)]
    if inside:
        head = names[names.index(inside[-1]) + 1 :]
    else:
        inside, head = names[:-1], names[-1:]
    modules = dict(model.named_modules())
    attention = {name for name in inside if _attends(modules, name)}
    rest = [name for name in inside if name not in attention]
    convolutions = [name for name in rest if isinstance(modules[name], _ConvNd)]
    tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return Layers(
        attention=tuple(name for name in inside if name in attention),
        mlp=tuple(name for name in rest if name not in convolutions),
        convolution=tuple(name for name in convolutions if modules[name].groups == 1),
        grouped=tuple(name for name in convolutions if modules[name].groups != 1),
        head=tuple(name for name in head if id(modules[name].weight) not in tied),
    )


def blocks(model: nn.Module) -> list[str]:
    """Names of the outermost blocks that repeat, in the order in which they were registered."""
    modules = dict(model.named_modules())
    found: list[str] = []
    for container in _body(model):
        if not _is_below(container, found):
            prefix = f"{container}." if container else ""
            children = modules[container].named_children()
            found += [f"{prefix}{name}" for name, child in children if _has_parts(child)]
    return found


def _projections(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Layers with a matrix or a kernel, in the order in which they were registered."""
    for name, child in model.named_children():
        full = f"{prefix}{name}"
        if isinstance(child, (nn.Linear, nn.MultiheadAttention, _ConvNd)) or _is_transposed_linear(child):
            yield full, child  # MultiheadAttention as a whole: its parts are not called
        else:
            yield from _projections(child, f"{full}.")


def _is_transposed_linear(module: nn.Module) -> bool:
    """The linear layer of GPT-2 and its kin in transformers, whose weight is stored (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _body(model: nn.Module) -> list[str]:
    """Names of the containers whose children repeat."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and _repeats(module)
    ]


def _repeats(container: nn.Module) -> bool:
    kinds = Counter(type(child) for child in container.children() if _has_parts(child))
    fewest = 1 if isinstance(container, nn.ModuleList) else 2  # a list may have one block, and is a list
    return any(count >= fewest for count in kinds.values())


def _has_parts(module: nn.Module) -> bool:
    return next(module.children(), None) is not None  # an empty container counts as false


def _is_below(name: str, containers: list[str]) -> bool:
    return any(name.startswith(f"{container}.") or not container for container in containers)


def _attends(modules: dict[str, nn.Module], name: str) -> bool:
    parts = name.split(".")
    classes = (type(modules[".".join(parts[:end])]).__name__.lower() for end in range(1, len(parts) + 1))
    return any("attention" in text or "attn" in text for text in classes)
