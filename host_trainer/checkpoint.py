"""Checkpoints: whole or absent, written while training goes on, and readable on any number of processes.

One directory a checkpoint: ``model.safetensors``, ``optimizer.safetensors`` and ``state.json``. Tensors go by
the names of parameters and are whole, however many processes shared them. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from host_trainer.errors import ConfigError
from host_trainer.tensor_file import write_tensors

_GONE = ".gone"
_NAME = re.compile(r"step-(\d{9})")
_MAX_STATE_BYTES = 16 << 20
_SEPARATOR = "\t"  # no parameter's name holds a tab


@dataclass(frozen=True)
class Snapshot:
    """A run at one step, on the CPU; empty in every process but the first.

    Attributes:
        step: steps done.
        model: trained weights and buffers by name; frozen weights are left out.
        optimizer: tensors by ``parameter<tab>key``.
        state: everything else, as JSON.
    """

    step: int
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Any]


def take(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, extra: Mapping[str, Any]) -> Snapshot:
    """Copy a run's state to the CPU; every process takes part."""
    from torch.distributed.checkpoint.state_dict import get_state_dict

    # torch's own annotation of the two is far wider than what they hold.
    weights: Any
    moments: Any
    bare = _bare(optimizer)
    stepped = bool(bare.state)
    weights, moments = get_state_dict(model, bare, options=_options())
    if not stepped:  # torch has taken a step with zeros, and the first real one would count as the second
        bare.state.clear()
        moments["state"] = {}
    tensors, others = _flatten(moments.get("state", {}))
    state = {"step": step, "groups": moments.get("param_groups", []), "others": others, **extra}
    return Snapshot(step, _copied(weights), _copied(tensors), state)


def restore(snapshot: Snapshot, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Bring a run back to a snapshot; every process takes part, each with the whole snapshot.

    Raises:
        ConfigError: it is of another model.
    """
    from torch.distributed.checkpoint.state_dict import set_state_dict

    bare = _bare(optimizer)
    # What the run is told now counts, such as another weight decay; the checkpoint knows what it was told.
    options = [{key: value for key, value in group.items() if key != "params"} for group in bare.param_groups]
    moments: Any = {
        "state": _unflatten(snapshot.optimizer, snapshot.state["others"]),
        "param_groups": [dict(group) for group in snapshot.state["groups"]],
    }
    try:
        set_state_dict(
            model, bare, model_state_dict=dict(snapshot.model), optim_state_dict=moments,
            options=_options(strict=False),
        )  # fmt: skip
    except (KeyError, RuntimeError, ValueError) as error:
        raise ConfigError(
            "the checkpoint does not fit the model", " ".join(str(error).split())[:300],
            "continue with the model that the run began with, or give another run directory",
        ) from error  # fmt: skip
    for group, told in zip(bare.param_groups, options, strict=True):
        group.update(told)


class Store:
    """The checkpoints of a run. Only the first process writes."""

    def __init__(self, directory: Path, keep: int) -> None:
        self._directory = directory
        self._keep = keep
        self._writing: threading.Thread | None = None
        self._failure: OSError | None = None

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are whole, oldest first."""
        if not self._directory.is_dir():
            return []
        found = (_NAME.fullmatch(path.name) for path in self._directory.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def begin(self, snapshot: Snapshot) -> OSError | None:
        """Write a snapshot while training goes on; gives what made the one before it fail, if it did."""
        failure = self.wait()
        self._writing = threading.Thread(target=self._write_or_note, args=(snapshot,), name="checkpoint")
        self._writing.start()
        return failure

    def wait(self) -> OSError | None:
        """Wait for the last write; gives what made it fail."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        failure, self._failure = self._failure, None
        return failure

    def write(self, snapshot: Snapshot) -> None:
        """Write under another name, rename, then delete the oldest: at no time is there less than before.

        Raises:
            OSError: the disk is full, say; the checkpoints that were there stay.
        """
        final = self._directory / f"step-{snapshot.step:09d}"
        partial = self._directory / f".{final.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            write_tensors(partial / "model.safetensors", snapshot.model)
            write_tensors(partial / "optimizer.safetensors", snapshot.optimizer)
            (partial / "state.json").write_text(json.dumps(snapshot.state), encoding="utf-8")
            for path in (*partial.iterdir(), partial):
                _to_disk(path)
            if final.exists():  # a run that went back comes by again
                _delete(final)
            partial.rename(final)
            _to_disk(self._directory)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        for gone in self._directory.glob(f".*{_GONE}"):  # a crash came between
            shutil.rmtree(gone)
        for step in self.steps()[: -self._keep]:
            _delete(self._directory / f"step-{step:09d}")

    def read(self, step: int) -> Snapshot:
        """Read a checkpoint.

        Raises:
            ConfigError: it is damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        directory = self._directory / f"step-{step:09d}"
        try:
            if (directory / "state.json").stat().st_size > _MAX_STATE_BYTES:
                raise ValueError("state.json is too large")
            state = json.loads((directory / "state.json").read_text(encoding="utf-8"))
            if state["step"] != step:
                raise ValueError(f"it is of step {state['step']}")
            model = load_file(directory / "model.safetensors")
            optimizer = load_file(directory / "optimizer.safetensors")
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ConfigError(
                f"the checkpoint {directory} is damaged", str(error), "delete it: the one before it is used"
            ) from error
        return Snapshot(step, model, optimizer, state)

    def forget_after(self, step: int) -> None:
        """Delete the checkpoints after ``step``: the run went back behind them."""
        for later in self.steps():
            if later > step:
                _delete(self._directory / f"step-{later:09d}")

    def _write_or_note(self, snapshot: Snapshot) -> None:
        try:
            self.write(snapshot)
        except OSError as error:
            self._failure = error


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """All weights and buffers on the CPU, frozen ones too; every process takes part, the first gets them."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    weights: Any = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    return _copied(weights)


def _options(strict: bool = True) -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    # Frozen weights are the model's own: an adapter's checkpoint is the adapter.
    return StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=strict)


def _bare(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's."""
    return getattr(optimizer, "optimizer", optimizer)  # type: ignore[no-any-return]


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Training goes on while the copy is written; tensors that share memory are written once."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _flatten(moments: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, others = {}, {}
    for parameter, entries in moments.items():
        for key, value in entries.items():
            name = f"{parameter}{_SEPARATOR}{key}"
            if isinstance(value, Tensor):
                tensors[name] = value
            else:
                others[name] = value
    return tensors, others


def _unflatten(tensors: Mapping[str, Tensor], others: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    moments: dict[str, dict[str, Any]] = {}
    for name, value in (*tensors.items(), *others.items()):
        parameter, key = name.split(_SEPARATOR)
        moments.setdefault(parameter, {})[key] = value
    return moments


def _delete(checkpoint: Path) -> None:
    """Delete one so that a crash in the middle leaves none that is half there."""
    gone = checkpoint.with_name(f".{checkpoint.name}{_GONE}")
    shutil.rmtree(gone, ignore_errors=True)
    checkpoint.rename(gone)
    shutil.rmtree(gone)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def agree(value: Any) -> Any:
    """What the first process says, in every process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    said = [value]
    dist.broadcast_object_list(said)
    return said[0]
