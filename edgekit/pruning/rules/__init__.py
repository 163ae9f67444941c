"""What each kind of operator does to the axes of its arguments."""

from edgekit.pruning.rules import elements, layers, lookups, shapes
from edgekit.pruning.rules.registry import rule_for

#: Importing a module registers its rules.
RULES = (elements, layers, lookups, shapes)

__all__ = ["RULES", "rule_for"]
