"""The recipe: what to do to the model, and the contract to meet.

A recipe file is TOML; every section and key may be left out, and the defaults make a whole recipe from
just a model and a profile. Command-line options override the file.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError

from edgekit.errors import BadInput, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_LATENCY = re.compile(r"(p50|p95|p99):(\d+(?:\.\d+)?)ms")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LatencyBound(_Frozen):
    """A bound on a quantile of the latency at batch 1."""

    quantile: Literal["p50", "p95", "p99"]
    ms: float = Field(gt=0)

    def __str__(self) -> str:
        return f"{self.quantile}:{self.ms:g}ms"


def parse_latency(text: Any) -> Any:
    """Turn ``p95:23ms`` into a bound; anything but a string is left for the type check."""
    if not isinstance(text, str):
        return text
    match = _LATENCY.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not like p95:23ms (p50, p95 or p99, then milliseconds)")
    return LatencyBound.model_validate({"quantile": match[1], "ms": float(match[2])})


class Contract(_Frozen):
    """What must hold for the result; None: not asked."""

    size: float | None = Field(None, gt=0, le=1)
    """Largest share of the original's parameters, a fraction. 0.35 where the model can be pruned."""
    max_drop: float | None = Field(None, ge=0)
    """Largest absolute loss of the metric on held-out data."""
    latency: Annotated[
        LatencyBound | None,
        BeforeValidator(parse_latency),
        PlainSerializer(lambda bound: None if bound is None else str(bound)),
    ] = None
    """Such as ``p95:23ms``: a quantile of the latency at batch 1."""


class Prune(_Frozen):
    """Structured pruning (docs/pruning.md)."""

    importance: Literal["magnitude", "taylor", "hessian", "activation", "activation2", "random"] = "magnitude"
    """Which channels go first: by their weights, by gradients on calibration data, or random (a control)."""
    allocation: Literal["sensitivity", "global", "uniform"] = "sensitivity"
    """Where channels go: where the outputs suffer least, by their rank over the whole model, or
    everywhere."""
    samples: int = Field(64, ge=1)
    """So many calibration samples, where gradients are asked for."""
    max_layer_ratio: float = Field(0.8, gt=0, lt=1)
    """No layer loses more than this share of its channels."""
    steps: int = Field(1, ge=1, le=16)
    """The size is reached in so many cuts, each the same share of what is left. After each the model recovers
    for its part of ``recover``'s epochs and time."""


class Search(_Frozen):
    """How long to look for what meets the contract."""

    trials: int = Field(3, ge=1)
    """At most so many prunings are recovered and measured in full."""
    budget_s: float | None = Field(None, ge=0)
    """No trial begins after this many seconds, so the machine's speed decides; None: no limit."""


class Recover(_Frozen):
    """Knowledge distillation from the original (Hinton et al., 2015); labels are not needed."""

    epochs: int = Field(8, ge=0)
    quantization_aware_epochs: int = Field(0, ge=0)
    """So many more with weights and activations rounded to 8 bits; the search adds some as a last resort."""
    feature_weight: float = Field(0.0, ge=0)
    """Of the distance of the activations after each block from the original's, beside the outputs'. Where
    widths differ, through a projection that is trained along and thrown away."""
    adapter_rank: int | None = Field(None, ge=1)
    """Train low-rank updates of this rank (LoRA) and the head, and add them to the weights at the end; None:
    train all weights."""
    patience: int | None = Field(None, ge=1)
    """Stop after so many epochs without a better loss on an eighth of the data, kept aside; None: never."""
    budget_s: float | None = Field(None, gt=0)
    """Stop after this many seconds, so the machine's speed decides; None: no limit."""
    batch_size: int = Field(64, ge=2)
    learning_rate: float = Field(2e-3, gt=0)
    temperature: float = Field(2.0, gt=0)

    def part(self, number: int, steps: int) -> Recover:
        """What the recovery after cut ``number`` of ``steps`` has of it, so that all together have it all.

        Training through rounding belongs to the last, whose numbers are shipped.
        """
        if steps == 1:
            return self
        epochs = self.epochs * number // steps - self.epochs * (number - 1) // steps
        budget_s = None if self.budget_s is None else self.budget_s / steps
        rounded = self.quantization_aware_epochs if number == steps else 0
        changes = {"epochs": epochs, "budget_s": budget_s, "quantization_aware_epochs": rounded}
        return self.model_copy(update=changes)


class Export(_Frozen):
    """The portable graph."""

    opset: int | None = Field(None, ge=11)
    """ONNX opset; None: the highest that the profile and this edgekit both know."""
    max_batch_size: int = Field(32, ge=1)
    """The largest batch that the bundle promises to serve."""


class Quantize(_Frozen):
    """INT8 by static calibration."""

    observer: Literal["auto", "minmax", "percentile", "entropy", "mse"] = "auto"
    """``auto`` keeps the one whose INT8 graph has the best signal-to-noise on samples held out for it."""
    percentile: float = Field(99.99, gt=50, le=100)
    """Used by the percentile observer only."""
    methods: tuple[Literal["equalization", "smoothing", "sparing", "rounding", "bias_correction"], ...] = (
        "equalization",
        "smoothing",
        "sparing",
        "rounding",
        "bias_correction",
    )
    """What is tried on top of the observer, each kept only if it helps; ``[]``: nothing."""
    method_budget_s: float | None = Field(None, ge=0)
    """No method begins after this many seconds, so the machine's speed decides; None: no limit."""
    max_kept_float: int | None = Field(None, ge=0)
    """Where INT8 misses the contract's ``max_drop``, so many layers may stay in float; None: all but one."""
    max_samples: int = Field(512, ge=1)
    """Calibration stops after this many samples."""


class Measure(_Frozen):
    """How the result is measured."""

    runs: int = Field(200, ge=10)
    """Timed runs of each candidate, interleaved with the original's."""
    warmup: int = Field(20, ge=1)
    max_samples: int = Field(5000, ge=1)
    """The metric is computed on at most this many held-out samples."""


class Postprocessing(_Frozen):
    """What the device computes behind the model, outside of its compression (docs/detection.md)."""

    graph: str
    """An ONNX file, relative to the recipe, or ``package.module:fn`` that returns an ONNX model."""


class Release(_Frozen):
    """How the bundle presents itself to devices."""

    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """The model's name on the device; None: the name of the model's source."""
    version: int = Field(1, ge=1)
    """A device refuses to go back to a lower version unless told to."""


class Recipe(_Frozen):
    """Settings of every stage, and the contract."""

    seed: int = Field(0, ge=0)
    threads: int | None = Field(None, ge=1, le=1024)
    """CPU threads of training and of measured runs; None: the CPUs that the process may use."""
    precision: Literal["auto", "fp32", "fp16", "int8"] = "auto"
    metric: str | None = None
    """``top1``, ``f1``, ``map``, ``cosine``, ``sqnr``, ``module:fn``; None: top1 with labels, else cosine."""
    contract: Contract = Contract()
    search: Search = Search()
    prune: Prune = Prune()
    recover: Recover = Recover()
    export: Export = Export()
    quantize: Quantize = Quantize()
    measure: Measure = Measure()
    release: Release = Release()
    preprocessing: dict[str, Any] | None = None
    """How raw samples become inputs (docs/preprocessing.md); None: taken from the model's own directory."""
    postprocessing: Postprocessing | None = None


def load_recipe(path: Path | None, overrides: dict[str, Any]) -> Recipe:
    """Read a recipe file and put the command line's settings over it.

    Args:
        path: a TOML file; None: the defaults.
        overrides: dotted keys such as ``contract.size``; None as a value means "not given".

    Raises:
        BadInput: the file is missing or malformed, or a key or value is wrong.
    """
    origin = str(path) if path else "the command line"
    raw = _read_toml(path) if path else {}
    for dotted, value in overrides.items():
        if value is not None:
            _put(raw, dotted.split("."), value)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise _explain(error, origin) from error


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(
            f"the recipe {path} cannot be read", f"{error.strerror}", "give an existing file"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"the recipe {path} is not TOML", str(error), "correct the file") from error


def _put(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        below = tree.setdefault(key, {})
        if not isinstance(below, dict):
            return  # the file's own value is wrong there, and validation says so
        tree = below
    tree[keys[-1]] = value


def _explain(error: ValidationError, origin: str) -> BadInput:
    """Three lines about the first problem; an unknown key gets the nearest valid one."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] != "extra_forbidden":
        return BadInput(f"{origin}: {where} is wrong", first["msg"], "docs/recipe.md lists every setting")
    return BadInput(
        f"{origin}: unknown key {where!r}",
        "no setting of a recipe has this name",
        nearest(str(first["loc"][-1]), _settings(first["loc"][:-1])),
    )


def _settings(section: tuple[int | str, ...]) -> list[str]:
    """Names of the settings in a section, such as ``("contract", "latency")``."""
    model: Any = Recipe
    for part in section:
        annotation = model.model_fields[part].annotation
        model = next((option for option in get_args(annotation) if option is not NoneType), annotation)
    return list(model.model_fields)
