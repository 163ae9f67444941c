"""``torch.compile``, with the way back where it fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def compile_forward(module: nn.Module, alert: Callable[[str], None]) -> None:
    """Compile ``module`` in place; at the first error of the compiler it goes on without, and says why.

    Names of parameters stay as they are. (``Module.compile`` would leave a ``Sequential`` as it is, without a
    word: frames of torch's own classes are not traced.)

    Args:
        module: the model, before it is wrapped for several processes.
        alert: told why, where it falls back.
    """
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    plain = module.forward
    fast: Callable[..., Any] | None = torch.compile(lambda *args, **kwargs: plain(*args, **kwargs))

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal fast
        if fast is not None:
            try:
                return fast(*args, **kwargs)
            except (TorchDynamoException, InductorError) as error:
                fast = None
                reason = " ".join(str(error).split())[:300]
                alert(f"torch.compile failed, the run goes on without it: {type(error).__name__}: {reason}")
        return plain(*args, **kwargs)

    module.forward = forward
