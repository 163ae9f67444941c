"""Models: read from a Hugging Face directory or a factory, and written as ``edgekit compress`` reads them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from host_trainer.config import Model
from host_trainer.data import call
from host_trainer.errors import ConfigError
from host_trainer.tensor_file import write_tensors

_HEADS = {
    "image-classification": "AutoModelForImageClassification",
    "text-classification": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
}
#: Files of a Hugging Face directory that say how inputs are made; the trained model needs them too.
_COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "preprocessor_config.json",
)


def load(model: Model, seed: int) -> nn.Module:
    """Build the model, in float32; what has no weights yet is drawn from the seed.

    Raises:
        ConfigError: the source or the weights cannot be read, or do not fit.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if ":" not in model.source:
            return _from_directory(model)
        module = call(model.source, "model.source")
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"model.source '{model.source}' gives no model",
            f"it gave {type(module).__name__}",
            "return a Module",
        )
    if model.weights:
        load_weights(module, Path(model.weights))
    return module


def load_weights(module: nn.Module, path: Path) -> None:
    """Fill the module from a safetensors file.

    Raises:
        ConfigError: the file cannot be read, or does not fit the module.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    try:
        load_model(module, path)
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"the weights {path} do not fit the model", reason, "check model.weights"
        ) from error


def save(module: nn.Module, state: Mapping[str, Tensor], source: Model, out: Path) -> Path:
    """Write the trained model.

    Args:
        module: the model as ``load`` gave it.
        state: its weights, on the CPU.
        source: where it came from.
        out: directory to write into.

    Returns:
        What ``edgekit compress`` takes: the directory, or the file for ``--weights``.
    """
    out.mkdir(parents=True, exist_ok=True)
    save_pretrained: Any = getattr(module, "save_pretrained", None)
    if save_pretrained is not None:
        save_pretrained(out, state_dict=dict(state))
        for name in _COMPANIONS:
            if (Path(source.source) / name).is_file():
                shutil.copy(Path(source.source) / name, out / name)
        return out
    write_tensors(out / "model.safetensors", {name: tensor.contiguous() for name, tensor in state.items()})
    return out / "model.safetensors"


def _from_directory(model: Model) -> nn.Module:
    import transformers

    directory = Path(model.source)
    try:
        config = transformers.AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False,
            **({"num_labels": model.labels} if model.labels else {}),
        )  # fmt: skip
        head = _head(model.task, config)
        if not any(directory.glob("*.safetensors")):
            built: nn.Module = head.from_config(config) if hasattr(head, "from_config") else head(config)
            return built.float()
        loaded: nn.Module = head.from_pretrained(
            directory, config=config, local_files_only=True, use_safetensors=True, dtype=torch.float32,
            ignore_mismatched_sizes=bool(model.labels),
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"model.source '{directory}' cannot be loaded", reason, "check the directory"
        ) from error
    return loaded


def _head(task: str, config: Any) -> Any:
    import transformers

    if task != "auto":
        return getattr(transformers, _HEADS[task])
    names = config.architectures or []
    if not names or not hasattr(transformers, names[0]):
        raise ConfigError(
            "the model's config.json names no architecture", f"architectures: {names}", "set model.task"
        )
    return getattr(transformers, names[0])
