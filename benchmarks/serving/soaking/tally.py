"""What became of everything that was sent."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

_MAX_VIOLATIONS = 20


@dataclass
class Tally:
    """Counts of one soak.

    Attributes:
        actions: by kind of client.
        answers: by model and status, of inference requests whose answer was read.
        uncertain: by model, whole requests whose client did not wait for the answer.
        statuses: of every answer that was read.
        violations: what must not happen, the first of them in words.
        broken: how many there were.
    """

    actions: Counter[str] = field(default_factory=Counter)
    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    uncertain: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    broken: int = 0

    def violate(self, text: str) -> None:
        """Note something that must not happen."""
        self.broken += 1
        if len(self.violations) < _MAX_VIOLATIONS:
            self.violations.append(text)

    def answered(self, model: str, status: int) -> None:
        """Count the answer of an inference request."""
        self.answers[model, status] += 1
        self.statuses[status] += 1

    def of_status(self, status: int) -> int:
        """Inference requests of all models that were answered so."""
        return sum(count for (_, got), count in self.answers.items() if got == status)
