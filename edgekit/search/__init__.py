"""Meeting a contract: plans are tried until one meets it, and the best candidate is picked.

loop.py     which plans, in which order, and when it is enough
pick.py     reads what was measured, and picks
study.py    several machines at one search
"""

from edgekit.search.loop import Found, Request, search
from edgekit.search.pick import (
    CLEARLY_FASTER,
    Candidate,
    Outcome,
    Tried,
    binding,
    drop_is_certain,
    pick,
)

__all__ = [
    "CLEARLY_FASTER", "Candidate", "Found", "Outcome", "Request", "Tried", "binding", "drop_is_certain",
    "pick", "search",
]  # fmt: skip
