"""What a training run is told: TOML, every key typed, and ``key=value`` on top.

Every section and most keys may be left out. Paths are relative to the working directory.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from host_trainer.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_CONFIG_BYTES = 1 << 20


class Section(BaseModel):
    """A part of the configuration: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Model(Section):
    """What is trained."""

    source: str
    """A Hugging Face directory (``config.json``, with or without weights), or ``package.module:factory``."""
    weights: str = ""
    """A safetensors file to start from, where ``source`` is a factory."""
    task: Literal["auto", "image-classification", "text-classification", "causal-lm"] = "auto"
    """The head of a Hugging Face model; ``auto``: the architecture that its ``config.json`` names."""
    labels: int = Field(0, ge=0)
    """Classes of a new head; 0: the head that is there."""


class Data(Section):
    """What it is trained on."""

    train: str
    """A directory with one folder of images a class, a ``.jsonl`` file (``text``, ``label``, ``image``),
    shards ``path-{000..009}.tar``, or ``package.module:function`` that gives a map-style dataset of dicts."""
    eval: str = ""
    """Held-out data of the same kind, judged after every epoch; empty: none."""
    image_size: int = Field(224, ge=1)
    """Height and width in pixels that images are resized to."""
    image_mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Subtracted from each channel, after division by 255; one number makes grey images."""
    image_std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Each channel is divided by it."""
    augment: bool = True
    """Random crops and mirror images, for images that are trained on."""
    tokenizer: str = ""
    """A ``tokenizer.json``; empty: the one in ``model.source``."""
    max_length: int = Field(128, ge=1)
    """Texts are cut to so many tokens."""
    workers: int = Field(2, ge=0)
    """Processes that prepare batches, on each training process."""


class Optimize(Section):
    """How the weights move."""

    epochs: int = Field(3, ge=0)
    """Passes over the data."""
    batch_size: int = Field(32, ge=1)
    """Samples of one optimizer step, over all processes: more GPUs only save time."""
    micro_batch_size: int = Field(0, ge=0)
    """Most samples that a process computes at once; gradients are accumulated. 0: its whole share."""
    learning_rate: float = Field(1e-3, gt=0)
    """The peak of the schedule."""
    weight_decay: float = Field(1e-2, ge=0)
    """AdamW's, on matrices and kernels only."""
    warmup_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of all steps that warms up linearly; a cosine down to zero follows."""
    clip_norm: float = Field(1.0, gt=0)
    """Largest norm of the gradient; ``inf``: never clipped."""
    loss: str = "auto"
    """``auto`` (the model's own where it computes one), ``cross_entropy``, ``contrastive``, or
    ``package.module:function`` that takes the model and a batch and gives a scalar."""


class Precision(Section):
    """What is computed in which precision, and what is kept for the backward pass."""

    amp: Literal["no", "bf16", "fp16"] = "no"
    """Automatic mixed precision; fp16 scales the loss, bf16 needs no scaling."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""
    compile: bool = False
    """``torch.compile``; where it fails, the run goes on without it and says why."""


class Parallel(Section):
    """How many processes, where, and what they share."""

    strategy: Literal["ddp", "fsdp"] = "ddp"
    """ddp: each process holds the whole model; fsdp: each holds a part of it (FSDP2)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto``: CUDA where there is a GPU."""
    processes: int = Field(0, ge=0)
    """On each node; 0: one for each GPU, or one on a CPU."""
    nodes: int = Field(1, ge=1)
    """Machines that train together."""
    rendezvous: str = ""
    """``host:port`` of the first node, where there are several."""
    job: str = "edgekit"
    """Name of the job, the same on each node."""
    numa: bool = True
    """Bind each process to the CPUs next to its GPU, where the machine has several memory nodes."""


class Lora(Section):
    """An adapter is trained, and the model stays as it is."""

    rank: int = Field(8, ge=1)
    """Of each layer's update."""
    alpha: int = Field(16, ge=1)
    """An update counts ``alpha / rank``."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """On the inputs of the updates."""
    targets: tuple[Literal["attention", "mlp", "convolution"], ...] = Field(
        ("attention", "mlp"), min_length=1
    )
    """Which layers of the repeated blocks get an update."""
    head: Literal["save", "frozen"] = "save"
    """What comes after the blocks: trained whole and kept in the adapter, or left as it is."""


class Distill(Section):
    """A teacher answers, and the model learns to answer as it does."""

    teacher: str
    """A Hugging Face directory, ``package.module:factory``, or an ``.onnx`` file."""
    teacher_weights: str = ""
    """A safetensors file, where ``teacher`` is a factory."""
    temperature: float = Field(2.0, gt=0)
    """Softens logits."""
    outputs: float = Field(1.0, ge=0)
    """Weight of the answers' difference; here and below, 0 leaves the term out."""
    features: float = Field(0.0, ge=0)
    """Weight of the difference of activations after each block."""
    attention: float = Field(0.0, ge=0)
    """Weight of the difference in what the two look at."""
    labels: float = Field(0.0, ge=0)
    """Weight of the loss that the model itself computes from labels."""


class Checkpoint(Section):
    """What survives a crash."""

    every_steps: int = Field(500, ge=1)
    """A ``kill -9`` loses at most so many steps."""
    keep: int = Field(2, ge=1)
    """The newest ones stay."""


class Monitor(Section):
    """What is watched, and what ends a run."""

    every_steps: int = Field(10, ge=1)
    """Steps between two records."""
    activations_every_steps: int = Field(0, ge=0)
    """Steps between two records of each layer's activations, which cost time; 0: never."""
    healthy_norm: tuple[float, float] = (0.1, 10.0)
    """The gradient's norm outside of this band is alerted."""
    stop_norm: float = Field(1000.0, gt=0)
    """A larger gradient norm, before clipping, is an explosion; ``inf``: only NaN and infinity are."""
    stop_loss_ratio: float = Field(10.0, gt=1)
    """So is a mean loss of 20 steps that is larger than the first 20 steps' by this factor."""
    rollbacks: int = Field(0, ge=0)
    """How often an explosion leads back to the last good checkpoint, half the learning rate; 0: never."""
    tensorboard: bool = True
    """Write TensorBoard's event files into the run's directory."""


class Config(Section):
    """A training run."""

    run: Path
    """Directory of the run: made, or continued."""
    seed: int = Field(0, ge=0, lt=2**32)
    """For everything random."""
    model: Model
    data: Data
    optimize: Optimize = Optimize()
    precision: Precision = Precision()
    parallel: Parallel = Parallel()
    lora: Lora | None = None
    distill: Distill | None = None
    checkpoint: Checkpoint = Checkpoint()
    monitor: Monitor = Monitor()

    @model_validator(mode="after")
    def _sections_agree(self) -> Config:
        for problem in _contradictions(self):
            raise ValueError(problem)
        return self


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration.

    Args:
        path: a TOML file.
        overrides: such as ``optimize.learning_rate=3e-4``; a value that is no TOML is taken as a string.

    Raises:
        ConfigError: the file, a key or a value is wrong, or two contradict each other; the key is named.
    """
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(
                f"{path} is too large", f"more than {MAX_CONFIG_BYTES} bytes", "give a configuration"
            )
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read", str(error), "give a TOML file") from error
    for override in overrides:
        _override(document, override)
    return parse(document, str(path))


def parse(document: dict[str, Any], where: str) -> Config:
    """Check a document.

    Raises:
        ConfigError: as ``load``.
    """
    try:
        return Config.model_validate(document)
    except ValidationError as error:
        raise _first_problem(error, where) from error


def check_processes(config: Config, processes: int) -> None:
    """See that every process gets the same number of samples, in micro-batches of one size.

    Raises:
        ConfigError: the key is named.
    """
    batch_size, largest = config.optimize.batch_size, config.optimize.micro_batch_size
    if batch_size % processes:
        raise ConfigError(
            f"optimize.batch_size {batch_size} cannot be shared by {processes} processes",
            "each takes the same number of samples",
            f"make optimize.batch_size a multiple of {processes}",
        )
    mine = batch_size // processes
    if largest and mine > largest and mine % largest:
        raise ConfigError(
            f"optimize.micro_batch_size {largest} does not divide the share of a process",
            f"each of {processes} processes takes {mine} of optimize.batch_size {batch_size}",
            "give a divisor, so that every micro-batch weighs the same",
        )


def _override(document: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    *sections, last = key.split(".")
    if not equals or not all((*sections, last)):
        raise ConfigError(
            f"'{text}' sets nothing", "an override is key=value", "such as optimize.learning_rate=3e-4"
        )
    for section in sections:
        document = document.setdefault(section, {})
        if not isinstance(document, dict):
            raise ConfigError(f"'{section}' in '{text}' is no section", "it has a value", "check the key")
    try:
        document[last] = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        document[last] = value


def _first_problem(error: ValidationError, where: str) -> ConfigError:
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        *sections, unknown = problem["loc"]
        return ConfigError(
            f"{where}: unknown key '{key}'", "nothing reads it", _nearest(sections, str(unknown))
        )
    if problem["type"] == "missing":
        return ConfigError(f"{where}: '{key}' is missing", "it has no default", "set it")
    reason = problem["msg"].removeprefix("Value error, ")
    if not key:  # two keys contradict each other, and the message names them
        return ConfigError(f"{where}: keys contradict each other", reason, "change one of them")
    return ConfigError(f"{where}: '{key}' is wrong", f"{reason}; got {problem['input']!r}", "change it")


def _nearest(sections: Sequence[int | str], unknown: str) -> str:
    fields: Any = Config.model_fields
    for section in sections:
        annotation = fields[section].annotation
        kinds = (annotation, *get_args(annotation))  # a section, or one that may be left out
        fields = next(kind for kind in kinds if hasattr(kind, "model_fields")).model_fields
    close = difflib.get_close_matches(unknown, fields, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else "the keys there are: " + ", ".join(fields)


def _contradictions(config: Config) -> Iterator[str]:
    optimize, monitor, data = config.optimize, config.monitor, config.data
    if optimize.micro_batch_size > optimize.batch_size:
        yield "optimize.micro_batch_size is larger than optimize.batch_size"
    processes = config.parallel.processes * config.parallel.nodes
    if processes and optimize.batch_size % processes:
        yield (
            f"optimize.batch_size {optimize.batch_size} cannot be shared by {processes} processes "
            "(parallel.processes x parallel.nodes)"
        )
    if config.parallel.nodes > 1 and not config.parallel.rendezvous:
        yield "parallel.nodes is above 1, and parallel.rendezvous names no host:port"
    if config.parallel.strategy == "fsdp" and config.precision.amp == "fp16":
        yield "precision.amp fp16 scales the loss, which parallel.strategy fsdp does not do; use bf16"
    distill = config.distill
    if distill is not None:
        if not any((distill.outputs, distill.features, distill.attention, distill.labels)):
            yield "distill.outputs, features, attention and labels are all 0: there is nothing to learn"
        if distill.teacher.endswith(".onnx") and (distill.features or distill.attention):
            yield "distill.features and distill.attention need blocks, and distill.teacher is a graph"
        if distill.teacher_weights and ":" not in distill.teacher:
            yield "distill.teacher_weights is for a factory; distill.teacher has its own"
        if config.optimize.loss != "auto":
            yield "optimize.loss is not used beside distill, which has its own"
    if len(data.image_mean) != len(data.image_std) or len(data.image_mean) not in (1, 3):
        yield "data.image_mean and data.image_std need one number each, or three"
    if config.model.weights and ":" not in config.model.source:
        yield "model.weights is for a factory; the weights of model.source lie in its directory"
    if not 0 <= monitor.healthy_norm[0] < monitor.healthy_norm[1]:
        yield "monitor.healthy_norm needs a lower and a higher bound"
    if monitor.stop_norm < monitor.healthy_norm[1]:
        yield "monitor.stop_norm lies inside monitor.healthy_norm"
