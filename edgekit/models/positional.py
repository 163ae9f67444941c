"""A module that takes its inputs by position where the wrapped one wants keywords."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


class Positional(nn.Module):
    """Calls ``program`` with the inputs' names, the last of which it takes as keywords."""

    def __init__(self, program: nn.Module, names: Sequence[str], positional: int) -> None:
        super().__init__()
        self.program = program
        self.names = tuple(names)
        self.positional = positional

    def forward(self, *inputs: Tensor) -> Any:
        """Answer a batch, the inputs in the order of ``names``."""
        first, rest = inputs[: self.positional], inputs[self.positional :]
        return self.program(*first, **dict(zip(self.names[self.positional :], rest, strict=True)))
