"""Models from a Hugging Face directory: ``config.json`` and weights, all local, no code of their own."""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from device_agent.manifest import TensorSpec
from edgekit import preprocess
from edgekit.artifact import file_digest
from edgekit.errors import BadInput, nearest
from edgekit.models import Model, combined_digest, model_name
from edgekit.models.signature import outputs_of
from edgekit.preprocess.huggingface import read_json
from edgekit.tensors import Arrays

if TYPE_CHECKING:
    from edgekit.models import encoders

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
_DIGESTED = ("*.json", "*.safetensors", "*.txt", "*.model", "*/config.json")
_EXAMPLE_SEED = 0


def load(directory: Path, description: preprocess.Preprocess | None = None) -> Model:
    """Load an image or text encoder from its directory.

    Args:
        directory: as ``save_pretrained`` writes it.
        description: takes the place of the directory's own preprocessing.

    Raises:
        BadInput: files are missing or damaged, the architecture needs code that is not in transformers,
            or it takes neither images nor texts.
    """
    config = read_json(directory / "config.json")
    if not config:
        raise BadInput(
            f"{directory} is not a Hugging Face directory",
            "it has no config.json",
            "save the model there with model.save_pretrained(...)",
        )
    if not any((directory / name).is_file() for name in _WEIGHTS):
        raise BadInput(
            f"{directory} has no weights",
            f"there is none of {', '.join(_WEIGHTS)}",
            "save the model there with model.save_pretrained(...)",
        )
    description = description or preprocess.from_huggingface(directory)
    build = partial(_build, directory, config)
    module = build()
    inputs = _inputs(module, description)
    examples = partial(_examples, inputs, int(config.get("vocab_size", 1)))
    return Model(
        kind="torch",
        name=model_name(directory.resolve().name),
        digest=_digest(directory),
        inputs=inputs,
        outputs=outputs_of(module.named, inputs, examples, str(directory)),
        path=directory,
        preprocess=description,
        _examples=examples,
        _build=build,
    )


def _build(directory: Path, config: dict[str, Any]) -> encoders.ImageEncoder | encoders.TextEncoder:
    """The encoder of the directory in a wrapper with plain tensors as inputs and one tensor as output."""
    from edgekit.models import encoders

    model = _pretrained(directory, config)
    main_input = getattr(model, "main_input_name", "")
    if getattr(model.config, "is_encoder_decoder", False) or main_input not in ("input_ids", "pixel_values"):
        raise BadInput(
            f"{directory} holds a model that edgekit does not take",
            f"a {type(model).__name__} is neither an image encoder nor a text encoder",
            "wrap the part to be compressed in a module and give it as package.module:factory",
        )
    if main_input == "pixel_values":
        return encoders.ImageEncoder(model).eval()
    parameters = inspect.signature(model.forward).parameters
    takes_types = "token_type_ids" in parameters and int(config.get("type_vocab_size") or 0) > 1
    pooling = _sentence_pooling(directory)
    if pooling is None:
        return encoders.TextEncoder(model, takes_types).eval()
    return encoders.SentenceEncoder(model, takes_types, *pooling).eval()


def _pretrained(directory: Path, config: dict[str, Any]) -> Any:
    import transformers

    architecture = (config.get("architectures") or ["AutoModel"])[0]
    model_class = getattr(transformers, architecture, None)
    if model_class is None:
        raise BadInput(
            f"{directory} needs the architecture '{architecture}'",
            "transformers has no such class, and code that comes with a model is never executed",
            nearest(architecture, _architectures()) + " or give the model as package.module:factory",
        )
    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, loading = model_class.from_pretrained(
            directory,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            # Plain matrix products: what pruning and both exporters follow.
            attn_implementation="eager",
        )
    except Exception as error:  # transformers, safetensors and torch raise a dozen types for damaged files
        raise BadInput(
            f"the model in {directory} cannot be loaded",
            f"{type(error).__name__}: {str(error).strip().splitlines()[0]}",
            "check that config.json and the weights belong together and are whole",
        ) from error
    _refuse_missing(directory, loading)
    return model.float()


def _refuse_missing(directory: Path, loading: Any) -> None:
    # A pooler that was never trained is common, and none of our outputs comes from it.
    missing = sorted(key for key in loading["missing_keys"] if "pooler." not in key)
    if missing:
        raise BadInput(
            f"the weights in {directory} are incomplete",
            f"there is no '{missing[0]}', so it would be random",
            "give a model that was trained and saved with this architecture",
        )


def _architectures() -> list[str]:
    import transformers

    return [name for name in dir(transformers) if "For" in name or name.endswith("Model")]


def _sentence_pooling(directory: Path) -> tuple[str, bool] | None:
    """How a sentence-transformers directory makes one vector of a text: pooling, and whether of length 1."""
    import json

    modules_file = directory / "modules.json"
    if not modules_file.is_file():
        return None
    try:
        modules = json.loads(modules_file.read_text(encoding="utf-8"))
        kinds = [str(module["type"]).rsplit(".", 1)[-1] for module in modules]
        pooling_path = next(str(m["path"]) for m in modules if str(m["type"]).endswith(".Pooling"))
    except (ValueError, TypeError, KeyError, StopIteration) as error:
        raise _unsupported_modules(directory, f"modules.json cannot be understood: {error!r}") from error
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise _unsupported_modules(directory, f"its modules are {', '.join(kinds)}")
    config = read_json(directory / pooling_path / "config.json")
    modes = {
        mode for mode in ("mean_tokens", "cls_token", "max_tokens") if config.get(f"pooling_mode_{mode}")
    }
    modes |= {f"{config['pooling_mode']}_token"} if config.get("pooling_mode") else set()
    names = {mode.split("_")[0] for mode in modes}
    if len(names) != 1 or not names <= {"mean", "cls", "max"}:
        raise _unsupported_modules(directory, f"its pooling is {', '.join(sorted(names)) or 'unknown'}")
    return names.pop(), "Normalize" in kinds


def _unsupported_modules(directory: Path, why: str) -> BadInput:
    return BadInput(
        f"the sentence encoder in {directory} is not one that edgekit takes",
        why,
        "edgekit takes Transformer, Pooling (mean, cls or max) and Normalize; wrap anything else in a module",
    )


def _inputs(
    module: encoders.ImageEncoder | encoders.TextEncoder, description: preprocess.Preprocess | None
) -> tuple[TensorSpec, ...]:
    from edgekit.models import encoders

    if not isinstance(module, encoders.ImageEncoder):
        return tuple(TensorSpec(name, "INT64", (-1, -1)) for name in module.input_names)
    if isinstance(description, preprocess.ImagePreprocess):
        return (TensorSpec("pixel_values", "FP32", (-1, len(description.channels), *description.size)),)
    config: Any = module.encoder.config
    size = getattr(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    return (TensorSpec("pixel_values", "FP32", (-1, int(config.num_channels), int(height), int(width))),)


def _examples(inputs: tuple[TensorSpec, ...], vocabulary: int, batch: int, length: int) -> Arrays:
    rng = np.random.default_rng(_EXAMPLE_SEED)
    shapes = {spec.name: (batch, *(length if n == -1 else n for n in spec.shape[1:])) for spec in inputs}
    makers: dict[str, Any] = {
        "pixel_values": lambda shape: rng.standard_normal(shape, np.float32),
        "input_ids": lambda shape: rng.integers(0, vocabulary, shape),
        "attention_mask": lambda shape: np.ones(shape, np.int64),
        "token_type_ids": lambda shape: np.zeros(shape, np.int64),
    }
    return {name: makers[name](shape) for name, shape in shapes.items()}


def _digest(directory: Path) -> str:
    """Over the files that decide what is computed; notes, images and other formats beside them do not."""
    found = {path for pattern in _DIGESTED for path in directory.glob(pattern) if path.is_file()}
    if not any(path.suffix == ".safetensors" for path in found):
        found.add(directory / "pytorch_model.bin")
    return combined_digest({path.relative_to(directory).as_posix(): file_digest(path) for path in found})
