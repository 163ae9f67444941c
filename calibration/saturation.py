"""Where an activation function is flat: values beyond it need no integers of their own.

HardSwish is zero below -3, HardSigmoid zero below -3 and one above 3. A tensor that only they read may be cut
off there without changing the result, and the steps of its integers become finer by as much.
"""

from __future__ import annotations

import math

from onnx import NodeProto

from calibration.graph import Index, attribute

Range = tuple[float, float]

_EVERYTHING: Range = (-math.inf, math.inf)
#: Where HardSwish, x * HardSigmoid(x) with alpha 1/6 and beta 1/2, becomes zero.
_HARD_SWISH_ZERO = -3.0


def useful_range(tensor: str, index: Index) -> Range:
    """The interval outside of which no reader of ``tensor`` tells its values apart."""
    readers = index.readers.get(tensor, [])
    if not readers or tensor in index.outputs:
        return _EVERYTHING
    ranges = [_told_apart(tensor, reader, index) for reader in readers]
    return min(lo for lo, _ in ranges), max(hi for _, hi in ranges)


def within(seen: Range, useful: Range) -> Range:
    """What is left of a range; values that all lie on a flat side are seen at its edge."""
    lo, hi = (min(max(bound, useful[0]), useful[1]) for bound in seen)
    return lo, hi


def _told_apart(tensor: str, reader: NodeProto, index: Index) -> Range:
    """The values that one reader tells apart."""
    if reader.op_type == "HardSwish":
        return _HARD_SWISH_ZERO, math.inf
    if reader.op_type == "HardSigmoid":
        return _slope(reader)
    if reader.op_type == "Mul":
        return _own_gate(tensor, reader, index)
    return _EVERYTHING


def _own_gate(tensor: str, product: NodeProto, index: Index) -> Range:
    """A product with the tensor's own HardSigmoid is zero where that is: HardSwish in two operators."""
    others = [name for name in product.input if name != tensor]
    gate = index.producer.get(others[0]) if len(others) == 1 else None
    if gate is not None and gate.op_type == "HardSigmoid" and gate.input[0] == tensor:
        return _slope(gate)[0], math.inf
    return _EVERYTHING


def _slope(node: NodeProto) -> Range:
    """Where max(0, min(1, alpha x + beta)) is neither 0 nor 1; a falling or level one is left alone."""
    alpha, beta = attribute(node, "alpha", 0.2), attribute(node, "beta", 0.5)
    if not isinstance(alpha, float) or not isinstance(beta, float) or alpha <= 0.0:
        return _EVERYTHING
    return -beta / alpha, (1.0 - beta) / alpha
