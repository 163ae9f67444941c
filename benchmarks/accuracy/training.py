"""Training on the house's loop, and export to ONNX."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from accuracy.case import Array

if TYPE_CHECKING:
    import torch

OPSET = 18


def train(
    build: Callable[[], torch.nn.Module],
    arrays: tuple[Array, ...],
    loss: Callable[[torch.nn.Module, Any], torch.Tensor],
    *,
    epochs: int,
    batch: int,
    learning_rate: float,
    seed: int = 0,
) -> torch.nn.Module:
    """Train a new network on ``arrays`` (samples on axis 0), shuffled anew each epoch.

    Two threads, whatever the machine has: the sums inside a kernel depend on it.
    """
    import torch

    from host_trainer.loop import TrainSettings, fit

    tensors = [torch.from_numpy(array) for array in arrays]
    count = len(arrays[0])

    def batches(epoch: int) -> Iterator[tuple[torch.Tensor, ...]]:
        order = torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(count))
        for start in range(0, count - batch + 1, batch):
            chosen = order[start : start + batch]
            yield tuple(tensor[chosen] for tensor in tensors)

    with threads(2), torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build()
        settings = TrainSettings(epochs=epochs, learning_rate=learning_rate, seed=seed)
        fit(model, batches, count // batch, loss, settings)
    return model


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use ``count`` threads; what it used before comes back after."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def export(
    model: torch.nn.Module,
    inputs: Mapping[str, torch.Tensor],
    outputs: Sequence[str],
    path: Path,
    free: Sequence[int] = (0,),
) -> None:
    """Write the network as ONNX, with the axes ``free`` of every input left open."""
    import torch

    names = {axis: torch.export.Dim(f"axis_{axis}", max=512) for axis in free}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        torch.onnx.export(
            model.eval(), tuple(inputs.values()), str(path), dynamo=True, verbose=False,
            input_names=list(inputs), output_names=list(outputs), opset_version=OPSET,
            dynamic_shapes=tuple(names for _ in inputs), external_data=False,
        )  # fmt: skip
