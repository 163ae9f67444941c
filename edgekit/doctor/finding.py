"""The answer to one question about this machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "absent", "missing"]


@dataclass(frozen=True)
class Finding:
    """One answer.

    Attributes:
        subject: what was looked at.
        status: ``ok``; ``warning``: it works, with a drawback; ``absent``: only what ``detail`` names needs
            it; ``missing``: compressing and serving a model does not work without it.
        detail: what was found, and what follows.
        fix: what to do; empty: nothing.
    """

    subject: str
    status: Status
    detail: str
    fix: str = ""
