"""What of a tensor leaves the model: its smallest and largest value, and a share of its values.

They are computed inside the graph, next to the operator that makes the tensor. A large tensor that left it
whole would cost more time on its way through memory than a convolution does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from calibration.graph import Array, Index, array
from calibration.histogram import MOST_COUNTED, step_of_share
from calibration.instrument import Instrument
from calibration.shapes import Shape


@dataclass(frozen=True)
class Seen:
    """What one row showed of a tensor.

    Attributes:
        lo, hi: smallest and largest value.
        total: a number that is NaN or infinite where one of the values is; it may be infinite without, by
            overflow. None: ``lo`` and ``hi`` tell as much.
        elements: how many values there are.
    """

    lo: float
    hi: float
    total: float | None
    elements: int


@dataclass(frozen=True)
class Tap:
    """Names of the outputs that show a tensor.

    Attributes:
        numbers: all of the following but ``values``.
        lo: the smallest value; None: it is zero.
        hi: the largest, or the largest of each channel.
        total: the sum, in which NaN and infinity show; None where it is not wanted.
        size: how many values it has; None where ``elements`` says so.
        elements: how many values it has, where that is known beforehand.
        values: the tensor, or a share of its values; None where no histogram is wanted.
        each: how many values one of ``values`` stands for; None: the tensor leaves whole.
    """

    hi: str | None = None
    lo: str | None = None
    total: str | None = None
    size: str | None = None
    elements: int = 0
    values: str | None = None
    each: int | None = None

    @property
    def numbers(self) -> list[str]:
        """The outputs of few numbers."""
        return [name for name in (self.hi, self.lo, self.total, self.size) if name is not None]

    def count(self, fetched: Mapping[str, Array]) -> int:
        """How many values the tensor had."""
        return self.elements if self.size is None else int(fetched[self.size])

    def leaving_bytes(self, fetched: Mapping[str, Array]) -> int:
        """How much memory ``values`` takes."""
        return 4 * (self.count(fetched) // (self.each or 1))

    def seen(self, fetched: Mapping[str, Array]) -> Seen:
        """Read the outputs; for a tensor that does not leave whole, and is not empty."""
        lo, hi, total = (self._number(name, fetched) for name in (self.lo, self.hi, self.total))
        shown = None if self.total is None else total
        return Seen(lo, hi, shown, self.count(fetched))

    @staticmethod
    def _number(name: str | None, fetched: Mapping[str, Array]) -> float:
        return 0.0 if name is None else float(fetched[name].max())


class Taps:
    """Makes taps for the tensors of one model.

    Args:
        instrument: where their outputs are added.
        index: of the prepared model.
        shapes: by tensor name, where they are known beforehand.
    """

    def __init__(self, instrument: Instrument, index: Index, shapes: Mapping[str, Shape]) -> None:
        self._instrument = instrument
        self._index = index
        self._shapes = shapes

    def extremes(self, name: str, *, with_total: bool) -> Tap:
        """Smallest and largest value, without a histogram."""
        size, elements = self._size(name)
        add = self._instrument
        return Tap(
            lo=add.reduce("ReduceMin", name),
            hi=add.reduce("ReduceMax", name),
            total=add.reduce("ReduceSum", name) if with_total else None,
            size=size,
            elements=elements,
        )

    def histogram(self, name: str) -> Tap:
        """Values too: all of a small tensor and of one whose size is not known, a share of a large one."""
        size, elements = self._size(name)
        if elements <= MOST_COUNTED:
            return Tap(size=size, elements=elements, values=self._instrument.values(name))
        shape = self._shapes[name]
        if len(shape) == 4 and self._is_rectified(name):
            return self._image(name, shape)
        step = step_of_share(elements)
        whole = self.extremes(name, with_total=True)
        return Tap(
            whole.hi, whole.lo, whole.total, None, elements, self._instrument.every(name, step), each=step
        )

    def _image(self, name: str, shape: Shape) -> Tap:
        """A rectified image, in whose blocked layout ONNX Runtime can pool but not reduce.

        The stride is odd, so that each phase of what was upsampled by two is met.
        """
        stride, count = 1, math.prod(shape)
        while count > MOST_COUNTED and stride < max(shape[2:]):
            stride += 2
            count = math.prod(shape[:2]) * math.prod(-(-size // stride) for size in shape[2:])
        elements = math.prod(shape)
        return Tap(
            hi=self._instrument.largest_of_channels(name),
            elements=elements,
            values=self._instrument.lattice(name, stride),
            each=max(round(elements / count), 1),
        )

    def _is_rectified(self, name: str) -> bool:
        """Whether the smallest value that the tensor can hold is zero."""
        node = self._index.producer.get(name)
        if node is not None and node.op_type == "Clip" and len(node.input) > 1:
            low = self._index.constants.get(node.input[1])
            return low is not None and not array(low).any()
        return node is not None and node.op_type == "Relu"

    def _size(self, name: str) -> tuple[str | None, int]:
        """The output that shows a tensor's size, or its size where that is known."""
        shape = self._shapes.get(name)
        return (self._instrument.size(name), 0) if shape is None else (None, math.prod(shape))
