"""Engines for one or many processes, with or without mixed precision.

accelerate places the model, wraps it for DDP and does the mixed precision. Its FSDP wants a GPU; ours is
torch's ``fully_shard`` itself, so that the same code is proven with gloo on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from host_trainer import blocks
from host_trainer.config import Config
from host_trainer.errors import Diverged, MissingError
from host_trainer.loop import TrainSettings, adamw

#: fp16 looks for its loss scale by skipping steps; more in a row than this is no search any more.
_MOST_SKIPPED = 30


class Parallel:
    """One of the processes that torchrun started, or the only one."""

    def __init__(self, config: Config) -> None:
        """Join the others.

        Raises:
            MissingError: a GPU was asked for and there is none.
        """
        cpu = config.parallel.device == "cpu" or not torch.cuda.is_available()
        if cpu and config.parallel.device == "cuda":
            raise MissingError(
                "there is no GPU here", "parallel.device is cuda, and torch sees none",
                "check the driver with nvidia-smi, or set parallel.device=cpu",
            )  # fmt: skip
        from accelerate import Accelerator, DistributedDataParallelKwargs

        self._config = config
        self._fsdp = config.parallel.strategy == "fsdp"
        # FSDP has a mixed precision of its own.
        self.accelerator = Accelerator(
            cpu=cpu,
            mixed_precision="no" if self._fsdp else config.precision.amp,
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=_spares_weights(config))],
        )
        self.rank = self.accelerator.process_index
        self.world = self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device
        self._skipped = 0
        if self._fsdp and not dist.is_initialized():
            alone = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group("gloo" if cpu else "nccl", store=alone, rank=0, world_size=1)

    def prepare(self, model: nn.Module, settings: TrainSettings) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The model as it is called from now on, and its optimizer."""
        if self._config.precision.activation_checkpointing:
            blocks.recompute(model)
        fused = self.device.type == "cuda"
        if self._fsdp:
            sharded = self._shard(model.to(self.device))
            return sharded, adamw(sharded, settings, fused)
        prepared = self.accelerator.prepare(model, adamw(model.to(self.device), settings, fused))
        return prepared[0], prepared[1]

    def place(self, batch: Any) -> Any:
        """Bring a dict of tensors to the device."""
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    @contextmanager
    def _sharded_micro_step(self, model: Any, last: bool) -> Any:
        model.set_requires_gradient_sync(last)
        yield

    def micro_step(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Gradients are exchanged in the last micro-batch only."""
        if self._fsdp:
            return self._sharded_micro_step(model, last)
        if last or self.world == 1:
            return nullcontext()
        return self.accelerator.no_sync(model)  # type: ignore[no-any-return]

    def backward(self, loss: Tensor) -> None:
        """Compute gradients; fp16's are scaled."""
        if self._fsdp:
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            self.accelerator.backward(loss)

    def clip(self, parameters: Iterable[Tensor], max_norm: float) -> Tensor:
        """Clip by the norm over all shards, of unscaled gradients."""
        if not self._fsdp:
            return self.accelerator.clip_grad_norm_(parameters, max_norm)  # type: ignore[no-any-return]
        from torch.distributed.tensor import DTensor

        norm = nn.utils.clip_grad_norm_(parameters, max_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Move the weights."""
        optimizer.step()

    def skips(self, grad_norm: float) -> bool:
        """fp16 skips a step whose scaled gradient overflowed, and halves the scale.

        Raises:
            Diverged: it has only been skipping for long.
        """
        if self.accelerator.scaler is None or math.isfinite(grad_norm):
            self._skipped = 0
            return False
        self._skipped += 1
        if self._skipped > _MOST_SKIPPED:
            raise Diverged(
                f"{self._skipped} steps in a row overflowed in fp16",
                "no loss scale makes the gradient finite",
                "use precision.amp=bf16, or a lower optimize.learning_rate",
            )
        return True

    def give_up_step(self) -> None:
        """An exploded step is not taken: fp16's scaler waits for the end of what it has unscaled."""
        self._skipped = 0
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()

    def gather(self, values: Tensor) -> Tensor:
        """One row of ``values`` for each process."""
        if self.world == 1:
            return values[None]
        rows = values.new_empty(self.world * values.numel())
        _gather_into(rows, values)
        return rows.view(self.world, *values.shape)

    @property
    def loss_scale(self) -> float:
        """fp16's; 1 otherwise."""
        scaler = self.accelerator.scaler
        return 1.0 if scaler is None else float(scaler.get_scale())

    def saved_loss_scale(self) -> dict[str, float]:
        """What fp16 has found out about its loss scale; empty otherwise."""
        scaler = self.accelerator.scaler
        return {} if scaler is None else dict(scaler.state_dict())

    def load_loss_scale(self, saved: dict[str, float]) -> None:
        """Go on with it."""
        if saved and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(saved)

    def close(self) -> None:
        """Leave the others."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def _shard(self, model: nn.Module) -> nn.Module:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        if self._config.precision.amp == "bf16":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        else:
            policy = MixedPrecisionPolicy()
        mesh = init_device_mesh(self.device.type, (dist.get_world_size(),))
        for block in blocks.blocks(model):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        return model


def _spares_weights(config: Config) -> bool:
    """Where answers do not count, a student's head gets no gradient, and DDP would wait for it."""
    return config.distill is not None and not config.distill.outputs


def _gather_into(rows: Tensor, values: Tensor) -> None:
    """The one collective that was given another name in torch 2.13."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(rows, values)
