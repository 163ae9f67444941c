"""Low-rank adapters (Hu et al., "LoRA", ICLR 2022), through peft: put on, written, read, merged.

On disk it is peft's own form (``adapter_config.json``, ``adapter_model.safetensors``), named after the plain
model's layers, so that ``peft.PeftModel.from_pretrained`` reads it too. The base's weights are not in it.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from host_trainer.errors import MissingError, TrainingError
from host_trainer.structure import Layers, survey
from host_trainer.tensor_file import write_tensors

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

Part = Literal["attention", "mlp", "convolution"]
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 4 << 20
#: Largest difference that merging in fp32 may make, as a share of the largest output.
MERGE_TOLERANCE = 1e-4
#: What ``torch.compile`` and data-parallel wrappers put in front of names.
_WRAPPERS = ("_orig_mod", "module")


@dataclass(frozen=True)
class Attached:
    """A model with an adapter.

    Attributes:
        model: the wrapped model; only the adapter and the saved head are trainable.
        adapted: names of the layers that have one.
        head: names of the layers that are trained whole.
        skipped: grouped convolutions, left as they are.
        trainable_fraction: of the model's own parameters.
    """

    model: PeftModel
    adapted: tuple[str, ...]
    head: tuple[str, ...]
    skipped: tuple[str, ...]
    trainable_fraction: float


def attach(
    model: nn.Module,
    parts: Iterable[Part],
    rank: int,
    alpha: int,
    dropout: float = 0.0,
    train_head: bool = True,
) -> Attached:
    """Put an adapter on a model, in place. The model computes the same until it is trained.

    Args:
        model: in the precision that it is trained in.
        parts: which of its layers.
        rank: of each update.
        alpha: an update counts ``alpha / rank``.
        dropout: on the inputs of the updates.
        train_head: train the layers after the body whole, and keep them in the adapter.

    Raises:
        TrainingError: the model has no layer of such a part.
    """
    peft = _peft()

    layers = survey(model)
    wanted = set(parts)
    chosen = {part: getattr(layers, part) for part in ("attention", "mlp", "convolution") if part in wanted}
    names = tuple(name for part in chosen.values() for name in part)
    skipped = layers.grouped if "convolution" in wanted else ()
    if not names:
        raise _nothing_to_adapt(layers, wanted)
    head = layers.head if train_head else ()
    own = sum(parameter.numel() for parameter in model.parameters())
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=_only(model, names),
        modules_to_save=_unmistakable(model, head) or None,
        # GPT-2 and its kin in transformers store weights as (in, out).
        fan_in_fan_out=all(type(model.get_submodule(name)).__name__ == "Conv1D" for name in names),
    )
    wrapped = _wrapped(model, config)
    trainable = sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)
    return Attached(wrapped, names, head, skipped, trainable / own)


def save(model: nn.Module, directory: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write the adapter of a model, whatever it is wrapped in.

    Args:
        model: that ``attach`` or ``load`` gave, maybe compiled or data-parallel.
        directory: exists.
        weights: of the whole model, where its own are shared among processes.
    """
    from peft import get_peft_model_state_dict

    plain = unwrapped(model)
    config = plain.peft_config["default"].to_dict()
    described = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    described |= {"base_model_name_or_path": None, "inference_mode": True}
    state = get_peft_model_state_dict(
        plain, None if weights is None else dict(weights), save_embedding_layers=False
    )
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
    (directory / CONFIG_FILE).write_text(json.dumps(described, indent=1, sort_keys=True) + "\n")
    write_tensors(directory / WEIGHTS_FILE, tensors)


def load(model: nn.Module, directory: Path) -> PeftModel:
    """Put an adapter from disk on the model that it was trained for, in place; nothing is unpickled.

    Raises:
        TrainingError: a file is missing or damaged, or the adapter belongs to another model.
    """
    peft = _peft()
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = _read_config(directory)
    try:
        tensors = load_file(directory / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"{directory / WEIGHTS_FILE} cannot be read", str(error), "give the directory of an adapter"
        ) from error
    try:
        wrapped = _wrapped(model, config)
        expected = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        differing = sorted(set(expected) ^ set(tensors)) or sorted(
            name for name in tensors if tensors[name].shape != expected[name].shape
        )
        if differing:
            raise ValueError(f"'{differing[0]}' differs")
        peft.set_peft_model_state_dict(wrapped, tensors)
    except ValueError as error:
        raise TrainingError(
            f"the adapter in {directory} does not fit the model",
            str(error),
            "give the model that it was trained on; prune before training an adapter, not after",
        ) from error
    return wrapped.eval()


@dataclass(frozen=True)
class Merged:
    """A model with its adapter inside.

    Attributes:
        model: plain, in eval mode.
        merge_error: largest difference to the outputs before merging, as a share of the largest output.
        cast_error: largest difference that the cast to the wanted precision made after that, likewise.
    """

    model: nn.Module
    merge_error: float
    cast_error: float


def merge(
    wrapped: PeftModel, forward: Callable[[nn.Module], Tensor], dtype: torch.dtype = torch.float32
) -> Merged:
    """Add the updates to the weights in fp32, compare outputs, then cast.

    Args:
        wrapped: that ``load`` or ``attach`` gave; used up.
        forward: runs a model on some real inputs; gives one output.
        dtype: of the merged model.

    Raises:
        TrainingError: the merged model answers otherwise, or not with numbers.
    """
    wrapped.float().eval()
    want = _outputs(wrapped, forward)
    try:
        merged = wrapped.merge_and_unload(safe_merge=True).eval()
    except ValueError as error:  # safe_merge found NaN
        raise _bad_merge(str(error)) from error
    for parameter in merged.parameters():
        parameter.requires_grad_(True)
    got = _outputs(merged, forward)
    merge_error = _difference(want, got)
    if not merge_error <= MERGE_TOLERANCE:
        allowed = f"{MERGE_TOLERANCE:g} is allowed"
        raise _bad_merge(f"outputs differ by {merge_error:.2g} of the largest; {allowed}")
    merged.to(dtype)
    return Merged(merged, merge_error, _difference(got, _outputs(merged, forward)))


@contextmanager
def adapted(model: nn.Module, rank: int, seed: int, forward: Callable[[nn.Module], Tensor]) -> Iterator[None]:
    """Train low-rank updates of a model's layers, and its head, within the block; then merge them, in place.

    Args:
        model: attention, mlp and convolutions of its blocks get an update that counts twice.
        rank: of each update.
        seed: of the first values.
        forward: runs a model on some real inputs, to compare it before and after merging; gives one output.

    Raises:
        TrainingError: as ``attach`` and ``merge``.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        attached = attach(model, ("attention", "mlp", "convolution"), rank, 2 * rank)
    yield
    merge(attached.model, forward)


def unwrapped(model: nn.Module) -> Any:
    """The model inside ``torch.compile`` and data-parallel wrappers."""
    inner = next((model._modules[name] for name in _WRAPPERS if set(model._modules) == {name}), None)
    return model if inner is None else unwrapped(inner)


def _peft() -> Any:
    try:
        import peft
    except ModuleNotFoundError as error:
        raise MissingError("peft is not installed", str(error), "pip install 'edgekit[train]'") from error
    return peft


def _wrapped(model: nn.Module, config: LoraConfig) -> PeftModel:
    peft = _peft()

    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            # In eval mode its fused kernel takes the weights and never calls the layers that have adapters.
            module.activation_relu_or_gelu = 0
    with warnings.catch_warnings():  # peft asks transformers for an attribute by its old name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        wrapped: PeftModel = peft.get_peft_model(model, config)
    return wrapped


def _only(model: nn.Module, names: tuple[str, ...]) -> list[str] | str:
    """What makes peft adapt these layers alone: it takes a list's names for ends of names, too."""
    ends = tuple(f".{name}" for name in names)
    others = [name for name, _ in model.named_modules() if name.endswith(ends) and name not in names]
    if not others:
        return list(names)
    return "|".join(re.escape(name) for name in names)


def _unmistakable(model: nn.Module, head: tuple[str, ...]) -> list[str]:
    """The head's names, if they are not also the ends of other layers' names, as peft would take them."""
    for name, _ in model.named_modules():
        if name not in head and name.endswith(head or ("\0",)):
            raise TrainingError(
                "the head cannot be trained whole",
                f"its name is also the end of '{name}', and peft would take both",
                "set lora.head to 'frozen', or rename the head",
            )
    return list(head)


def _nothing_to_adapt(layers: Layers, wanted: set[Part]) -> TrainingError:
    why = f"it has {len(layers.attention)} attention, {len(layers.mlp)} mlp and {len(layers.convolution)} "
    why += "convolution layers"
    if layers.grouped:
        why += f"; {len(layers.grouped)} convolutions are grouped, and a low-rank update would mix the groups"
    return TrainingError(f"the model has no layer for {', '.join(sorted(wanted))}", why, "set lora.targets")


def _read_config(directory: Path) -> LoraConfig:
    peft = _peft()

    path = directory / CONFIG_FILE
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"it is larger than {MAX_CONFIG_BYTES} bytes")
        document = json.loads(path.read_text(encoding="utf-8"))
        if document.get("peft_type") != "LORA":
            raise ValueError(f"it describes {document.get('peft_type')!r}, not LORA")
        described = {key: value for key, value in document.items() if key != "auto_mapping"}
        config: LoraConfig = peft.LoraConfig(**described)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise TrainingError(
            f"{path} cannot be read", str(error), "give the directory of a LoRA adapter"
        ) from error
    return config


def _outputs(model: nn.Module, forward: Callable[[nn.Module], Tensor]) -> Tensor:
    with torch.no_grad():
        return forward(model).float()


def _difference(want: Tensor, got: Tensor) -> float:
    return float((want - got).abs().max() / want.abs().max().clamp_min(1e-12))


def _bad_merge(why: str) -> TrainingError:
    return TrainingError("the merged model is not the model with its adapter", why, "keep the adapter apart")
