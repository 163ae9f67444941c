"""Profiles: what a device is. Data only; one TOML file each, read strictly.

    load("x86-cpu")            a profile that ships with edgekit, by name
    load("boards/mine.toml")   one of your own, by file
    validate(path)             the same, plus a plausibility check of its figures
    names()                    what ships
    to_toml(profile)           TOML that loads as an equal profile
    digest(profile)            its identity, independent of formatting and comments

Every figure that decides something (a peak, a bandwidth, a power mode) names its source. A file may start
from a profile that ships (``extends = "jetson-agx-orin"``) and say only what differs, key by key.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Annotated, Literal, get_args

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from edgekit import plausibility, profile_files
from edgekit.errors import BadInput, nearest
from edgekit.profile_files import names as names
from edgekit.toml_writer import toml_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Precision = Literal["fp32", "fp16", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def _specifier(text: str) -> str:
    try:
        SpecifierSet(text)
    except InvalidSpecifier as error:
        raise ValueError("is not a version specifier such as '>=3.8,<3.9'") from error
    return text


Text = Annotated[str, Field(min_length=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(gt=0)]
Specifier = Annotated[Text, AfterValidator(_specifier)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Peak(_Strict):
    """Dense peak rate of one precision, multiply and add counted as two operations."""

    ops_per_second: Positive
    source: Text


class Accelerator(_Strict):
    """What the arithmetic runs on.

    Attributes:
        kind: ``cpu`` or ``gpu``.
        name: the part's name.
        sm: CUDA compute capability times ten (Volta's 7.2 is 72); None where it is no NVIDIA GPU.
        cores: CPU cores, or CUDA cores.
        clock_mhz: the clock that the peaks are for.
        ops_per_cycle: operations that one core starts a cycle, by precision; tensor cores' share is spread
            over the CUDA cores. Only the plausibility check reads it.
        saturating_int8: whether its u8 x s8 products are added in pairs in 16 bits, which saturate: x86
            without VNNI. Weights then get 7 bits.
        source: where cores, clock and operations come from.
    """

    kind: Literal["cpu", "gpu"]
    name: Text
    sm: PositiveInt | None = None
    cores: PositiveInt
    clock_mhz: Positive
    ops_per_cycle: dict[Precision, Positive] = {}
    saturating_int8: bool = False
    source: Text


class Memory(_Strict):
    """Main memory that the accelerator computes from.

    Attributes:
        size_bytes, bandwidth_bytes_per_second: as the data sheet says.
        bus_bits, megatransfers_per_second: width and rate of the bus; only the plausibility check reads them.
        source: where the figures come from.
    """

    size_bytes: PositiveInt
    bandwidth_bytes_per_second: Positive
    bus_bits: PositiveInt | None = None
    megatransfers_per_second: Positive | None = None
    source: Text


class Runtime(_Strict):
    """The runtime that serves on the device.

    Attributes:
        name: of the runtime.
        versions: of it that the profile stands for.
        provider: the execution provider, where ONNX Runtime does not run on the CPU.
        cuda: version of CUDA on the device.
        executed: what of edgekit ran on such a device; None: nothing did.
    """

    name: Literal["onnxruntime", "tensorrt", "tensorrt_rtx"]
    versions: Specifier
    provider: Literal["cuda", "migraphx"] | None = None
    cuda: Text | None = None
    executed: Text | None = None


class Dla(_Strict):
    """Deep learning accelerators beside the GPU (NVDLA).

    Attributes:
        cores: how many TensorRT can use; 0: none, whatever the chip has.
        core: the one that engines are built for, the GPU running what it cannot; None: the GPU runs all.
        generation: 1 on Xavier, 2 on Orin.
        int8_ops_per_second: dense, of each.
        source: where the figures come from.
    """

    cores: Annotated[int, Field(ge=0)]
    generation: Literal[1, 2]
    int8_ops_per_second: Positive
    source: Text
    core: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _has_the_core(self) -> Dla:
        if self.core is not None and self.core >= self.cores:
            raise ValueError(f"core is {self.core}, of {self.cores} that TensorRT can use")
        return self


class PowerMode(_Strict):
    """A power mode of the device; ``watts`` is None where the mode has no budget."""

    name: Text
    watts: Positive | None = None
    source: Text


class Serving(_Strict):
    """What of the device a model runs on, where the agent's own configuration does not say.

    Attributes:
        threads: of one inference; 0: as many as its cores; None: as the agent's other models.
        cpus: the cores that its threads may use, such as ``0-1,4``; empty: any.
        numa_node: the node that its memory comes from; None: any.
    """

    threads: Annotated[int, Field(ge=0)] | None = None
    cpus: Annotated[str, Field(pattern=r"^(\d{1,3}(-\d{1,3})?(,\d{1,3}(-\d{1,3})?)*)?$")] = ""
    numa_node: Annotated[int, Field(ge=0)] | None = None


class Profile(_Strict):
    """A device.

    Attributes:
        name, description: for people; the name is also what ``--profile`` takes.
        architecture: of the processor.
        accelerator: what the arithmetic runs on.
        peak: by precision, dense.
        memory: size and bandwidth.
        runtime: what serves there.
        precisions: those that the runtime can run there, whether or not they pay.
        alignment: channel counts that the kernels like are multiples of this, by precision.
        highest_opset: the newest ONNX opset that every version in ``runtime.versions`` reads.
        python: versions of Python on the device.
        dla: if the device has any.
        power_modes: if the device has any.
        serving: threads and cores that bundles for it ask for; None: whatever the agent gives.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
    description: Text
    architecture: Literal["x86_64", "aarch64"]
    highest_opset: Annotated[int, Field(ge=13)]
    python: Specifier
    precisions: Annotated[tuple[Precision, ...], Field(min_length=1, strict=False)]
    accelerator: Accelerator
    runtime: Runtime
    memory: Memory
    alignment: dict[Precision, PositiveInt]
    peak: dict[Precision, Peak]
    dla: Dla | None = None
    power_modes: Annotated[tuple[PowerMode, ...], Field(strict=False)] = ()
    serving: Serving | None = None

    @model_validator(mode="after")
    def _complete(self) -> Profile:
        if len(set(self.precisions)) != len(self.precisions):
            raise ValueError("precisions lists one twice")
        for table in ("alignment", "peak"):
            missing = [p for p in self.precisions if p not in getattr(self, table)]
            if missing:
                raise ValueError(f"{table} says nothing about {missing[0]}, which precisions lists")
        if self.runtime.name != "onnxruntime" and self.accelerator.sm is None:
            raise ValueError("a profile with TensorRT has to say accelerator.sm, which engines are built for")
        return self


def load(name_or_path: str | Path) -> Profile:
    """Read a profile by its shipped name, or from a TOML file.

    Raises:
        BadInput: no such profile, or a malformed one; the message names the file, the key and, for a
            misspelt key, the nearest valid one.
    """
    name = str(name_or_path)
    if name in names():
        return _parse(profile_files.text(name), f"{name}.toml")
    path = Path(name_or_path)
    if path.suffix != ".toml" and not path.exists():
        raise BadInput(
            f"there is no profile '{name}'",
            "it is neither the name of a profile that ships with edgekit nor a .toml file",
            nearest(name, names()),
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"the profile {path} cannot be read",
            str(error),
            "give a TOML file; `edgekit profiles export NAME` prints one to start from",
        ) from error
    return _parse(text, str(path))


def validate(path: str | Path) -> Profile:
    """Read a profile and check that its figures can be true.

    Raises:
        BadInput: as ``load``, or a stated peak does not fit cores x clock x operations a cycle, or the
            bandwidth does not fit the bus.
    """
    profile = load(path)
    plausibility.check(profile, path)
    return profile


def shared(profile: Profile, further: tuple[Profile, ...]) -> Profile:
    """The profile for the stages that several devices share: widths that suit all of them.

    Raises:
        BadInput: another one needs INT8 weights of seven bits, which the first one's graph would not have.
    """
    for other in further:
        if other.accelerator.saturating_int8 and not profile.accelerator.saturating_int8:
            raise BadInput(
                f"the profile {other.name} cannot share the graph of {profile.name}",
                "its processor saturates, so its INT8 weights have to have seven bits",
                f"name {other.name} first, or compress for it alone",
            )
    alignment = {
        precision: math.lcm(
            *(p.alignment[precision] for p in (profile, *further) if precision in p.alignment)
        )
        for precision in profile.alignment
    }
    return profile.model_copy(update={"alignment": alignment})


def digest(profile: Profile) -> str:
    """Lower-case hex SHA-256 of the profile's content."""
    canonical = json.dumps(profile.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def to_toml(profile: Profile) -> str:
    """The profile as TOML; ``load`` of it gives an equal profile."""
    return toml_text(profile.model_dump(mode="json", exclude_none=True))


# Reading


def _parse(text: str, where: str) -> Profile:
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"the profile {where} is not TOML", str(error), "correct that line") from error
    try:
        return Profile.model_validate(profile_files.extended(raw, where))
    except ValidationError as error:
        raise _explain(error, where) from error


def _explain(error: ValidationError, where: str) -> BadInput:
    """The first fault of the file; a misspelt key before what it leaves missing."""
    faults = sorted(error.errors(include_url=False), key=lambda fault: fault["type"] != "extra_forbidden")
    fault = faults[0]
    keys = [str(part) for part in fault["loc"] if part != "[key]"]
    dotted = ".".join(keys)
    if fault["type"] == "extra_forbidden":
        return BadInput(
            f"the profile {where} has the unknown key '{dotted}'",
            f"'{keys[-1]}' is no setting of {'a profile' if len(keys) == 1 else '.'.join(keys[:-1])}",
            nearest(keys[-1], _valid_keys(keys[:-1])),
        )
    if fault["type"] == "missing":
        return BadInput(
            f"the profile {where} lacks the key '{dotted}'",
            "a profile has to say everything that a plan depends on",
            f"add '{keys[-1]}'; docs/profiles.md lists all keys",
        )
    if fault["loc"] and fault["loc"][-1] == "[key]":
        return BadInput(
            f"the profile {where} has the unknown key '{dotted}'",
            f"'{keys[-1]}' is no precision",
            nearest(keys[-1], PRECISIONS),
        )
    return BadInput(
        f"the profile {where} has a wrong value" + (f" for '{dotted}'" if dotted else ""),
        fault["msg"].removeprefix("Value error, "),
        "correct it; docs/profiles.md lists all keys and what they take",
    )


_TABLES: dict[str, type[_Strict]] = {
    "accelerator": Accelerator,
    "runtime": Runtime,
    "memory": Memory,
    "dla": Dla,
    "peak": Peak,
    "power_modes": PowerMode,
    "serving": Serving,
}


def _valid_keys(table: list[str]) -> list[str]:
    return list((_TABLES[table[0]] if table else Profile).model_fields)
