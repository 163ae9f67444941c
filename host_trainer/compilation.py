"""``torch.compile``, with the way back where it fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from host_trainer.loop import LossFunction


def compiled(module: nn.Module, loss: LossFunction, alert: Callable[[str], None]) -> LossFunction:
    """Compile ``module`` in place; at the first error of the compiler the run goes on without, and says why.

    Names of parameters stay as they are.

    Args:
        module: the model, before it is wrapped for several processes.
        loss: calls it.
        alert: told why, where it falls back.
    """
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    module.compile()
    failed = False

    def attempt(model: nn.Module, batch: Any) -> Tensor:
        nonlocal failed
        if failed:
            return loss(model, batch)
        try:
            return loss(model, batch)
        except (TorchDynamoException, InductorError) as error:
            failed = True
            module._compiled_call_impl = None
            reason = " ".join(str(error).split())[:300]
            alert(f"torch.compile failed, the run goes on without it: {type(error).__name__}: {reason}")
            return loss(model, batch)

    return attempt
