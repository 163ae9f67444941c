"""Structured pruning: which channels depend on each other, which matter, and a model without some of them.

structure = examine(model, example)                    the groups of channels that go together
scores = scores_of(model, structure, "taylor", samples, seed)
widths, _ = globally(structure, scores, 0.35, max_layer_ratio=0.8, alignment=8)    or any other widths
structure.parameters(widths)                           its size, without making it
pruned = cut(model, structure, widths, scores)
"""

from edgekit.pruning.allocation import globally, keep, uniformly
from edgekit.pruning.cutting import cut
from edgekit.pruning.examination import examine
from edgekit.pruning.importance import Importance
from edgekit.pruning.importance import scores as scores_of
from edgekit.pruning.structure import Group, Scores, Structure

__all__ = [
    "Group",
    "Importance",
    "Scores",
    "Structure",
    "cut",
    "examine",
    "globally",
    "keep",
    "scores_of",
    "uniformly",
]
