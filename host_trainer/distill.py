"""Distillation: a student learns to answer, to represent and to look as its teacher does.

    teacher = ModuleTeacher(model, call) or OnnxTeacher("teacher.onnx")
    student = Student(model, call, teacher, weights, first_batch)
    fit(student, ..., loss_function=lambda student, batch: student(batch), ...)

The student is a module around the model, since features of another width need projections that are trained
along; they are thrown away with it, and the model stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from host_trainer import losses
from host_trainer.errors import TrainingError
from host_trainer.structure import blocks

#: Of the mean square: what keeps the projections of channels that are always alike from growing.
_RIDGE_FRACTION = 1e-4

Batch = Any
#: Runs a model on a batch; gives a tensor, or a sequence or mapping with tensors.
Call = Callable[[nn.Module, Batch], Any]
#: Of a batch of texts, (batch, tokens): 0 where there is only padding; None: every place counts.
Mask = Callable[[Batch], Tensor | None]


@dataclass(frozen=True)
class Weights:
    """What counts how much; 0 leaves a term out.

    Attributes:
        outputs: the answers: logits or whatever the model gives.
        features: the activations after each block.
        attention: the attention in each block, or where its activations are large.
        labels: the loss that the model itself computes from labels.
        temperature: softens logits.
    """

    outputs: float = 1.0
    features: float = 0.0
    attention: float = 0.0
    labels: float = 0.0
    temperature: float = 2.0

    @property
    def inside(self) -> bool:
        """Whether the teacher has to show more than its answers."""
        return self.features > 0 or self.attention > 0


@dataclass(frozen=True)
class Seen:
    """What a model showed of one batch.

    Attributes:
        outputs: its answers.
        features: the activation after each block.
        attention: the probabilities of each attention, where the model gives them.
        loss: computed by the model from labels, where it does that.
    """

    outputs: list[Tensor]
    features: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)
    loss: Tensor | None = None


class Teacher(Protocol):
    """What answers for the student to learn from."""

    def __call__(self, batch: Batch) -> Seen:
        """Answer, without gradients."""


class ModuleTeacher:
    """A model in this process. It is put in eval mode and never changes."""

    def __init__(self, model: nn.Module, call: Call, inside: bool = False) -> None:
        """``inside``: show features and attention, too."""
        self._model = model.eval().requires_grad_(False)
        self._call = call
        self._inside = inside

    def __call__(self, batch: Batch) -> Seen:
        """Answer, without gradients."""
        with torch.no_grad():
            return look(self._model, self._call, batch, self._inside)


class OnnxTeacher:
    """An ONNX file, run by ONNX Runtime, on CUDA where that has it (not executed).

    It shows its answers only: a graph has no blocks.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        """Open the file.

        Raises:
            TrainingError: it is missing or ONNX Runtime cannot load it.
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
        providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            reason = str(error).strip().splitlines()[0]
            raise TrainingError(
                f"the teacher {path} cannot be loaded", reason, "give an ONNX file"
            ) from error
        self._path = path
        self._names = [node.name for node in self._session.get_inputs()]

    def __call__(self, batch: Batch) -> Seen:
        """Answer; the batch is a mapping by input name, or a sequence in the graph's order.

        Raises:
            TrainingError: an input is missing or does not fit.
        """
        given = batch if isinstance(batch, Mapping) else dict(zip(self._names, batch, strict=False))
        missing = [name for name in self._names if name not in given]
        if missing:
            raise self._unfit(f"its input '{missing[0]}' is not in the data, which has {', '.join(given)}")
        device = next(iter(given.values())).device
        feeds = {name: given[name].detach().cpu().numpy() for name in self._names}
        try:
            answers = self._session.run(None, feeds)
        except Exception as error:  # as above
            raise self._unfit(str(error).strip().splitlines()[0]) from error
        return Seen([torch.from_numpy(answer).to(device) for answer in answers])

    def _unfit(self, why: str) -> TrainingError:
        return TrainingError(
            f"the teacher {self._path} cannot answer", why, "give the teacher's inputs in the data"
        )


def mask_of_tokens(batch: Batch) -> Tensor | None:
    """A batch's ``attention_mask``; None where it has none, or where another sequence is answered for."""
    if not isinstance(batch, Mapping) or "decoder_input_ids" in batch:
        return None
    return batch.get("attention_mask")


class Student(nn.Module):
    """The model and its projections; called with a batch it gives the loss, or the model's own answer."""

    def __init__(
        self,
        model: nn.Module,
        call: Call,
        teacher: Teacher,
        weights: Weights,
        example: Batch,
        mask: Mask = mask_of_tokens,
    ) -> None:
        """Pair the blocks of both and make the projections that widths need.

        Args:
            model: trained in place.
            call: runs it.
            teacher: answers for the same batches.
            weights: what counts how much.
            example: a batch, to learn the widths from.
            mask: which tokens of a batch are no padding.

        Raises:
            TrainingError: the two do not go together; the message says where.
        """
        super().__init__()
        self.model = model
        self._call = call
        self._teacher = teacher
        self._weights = weights
        self._mask = mask
        training = model.training
        model.eval()  # the example leaves no trace in statistics
        with torch.no_grad():
            own, other = look(model, call, example, weights.inside), teacher(example)
        model.train(training)
        _check_together(own, other, weights)
        self.projections = nn.ModuleList()
        if weights.features > 0:
            pairs = zip(own.features, _spread(other.features, len(own.features)), strict=True)
            self.projections.extend(_projection(mine, theirs) for mine, theirs in pairs)

    def forward(self, batch: Batch, answer: bool = False) -> Any:
        """The weighted sum of the terms; with ``answer``, what the model alone gives."""
        if answer:
            return self._call(self.model, batch)
        weights = self._weights
        own = look(self.model, self._call, batch, weights.inside)
        other = self._teacher(batch)
        mask = self._mask(batch)
        terms = []
        if weights.outputs > 0:
            terms.append(
                weights.outputs * losses.distillation(own.outputs, other.outputs, weights.temperature, mask)
            )
        if weights.features > 0:
            projected = [p(x) for p, x in zip(self.projections, own.features, strict=True)]
            terms.append(
                weights.features * losses.features(projected, _spread(other.features, len(projected)), mask)
            )
        if weights.attention > 0:
            terms.append(weights.attention * _attention(own, other, mask))
        if weights.labels > 0 and own.loss is not None:
            terms.append(weights.labels * own.loss)
        return torch.stack(terms).sum()


def look(model: nn.Module, call: Call, batch: Batch, inside: bool) -> Seen:
    """Run a model and keep what it shows."""
    with _hooked(model, inside) as (seen_features, seen_attention):
        result = call(model, batch)
    return Seen(_outputs(result), seen_features, seen_attention, _loss(result))


@contextmanager
def _hooked(model: nn.Module, inside: bool) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    activations: list[Tensor] = []
    maps: list[Tensor] = []

    def after_block(_module: nn.Module, _inputs: Any, output: Any) -> None:
        activations.append(output if isinstance(output, Tensor) else output[0])

    def after_attention(_module: nn.Module, _inputs: Any, output: Any) -> None:
        found = [item for item in output if isinstance(item, Tensor) and item.ndim == 4]
        maps.extend(found[-1:])

    handles = []
    if inside:
        modules = dict(model.named_modules())
        handles = [modules[name].register_forward_hook(after_block) for name in blocks(model)]
        handles += [module.register_forward_hook(after_attention) for module in _attentions(model)]
    try:
        yield activations, maps
    finally:
        for handle in handles:
            handle.remove()


def _attentions(model: nn.Module) -> list[nn.Module]:
    """The innermost modules that call themselves attention; eager ones give their probabilities, too."""
    named = [module for module in model.modules() if "attention" in type(module).__name__.lower()]
    return [
        module for module in named if not any(other in named for other in islice(module.modules(), 1, None))
    ]


def _outputs(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, Mapping):
        if "logits" in result:
            return [result["logits"]]
        return [value for key, value in result.items() if isinstance(value, Tensor) and key != "loss"]
    return [value for value in result if isinstance(value, Tensor)]


def _loss(result: Any) -> Tensor | None:
    loss = result.get("loss") if isinstance(result, Mapping) else None
    return loss if isinstance(loss, Tensor) else None


def _spread(teacher: Sequence[Tensor], count: int) -> list[Tensor]:
    """``count`` of the teacher's layers, evenly spaced, the last one among them."""
    return [teacher[(position + 1) * len(teacher) // count - 1] for position in range(count)]


def _attention(own: Seen, other: Seen, mask: Tensor | None) -> Tensor:
    if own.attention and other.attention:
        return losses.attention(own.attention, _spread(other.attention, len(own.attention)), mask)
    return losses.energy(own.features, _spread(other.features, len(own.features)), mask)


def _projection(student: Tensor, teacher: Tensor) -> nn.Module:
    """From the student's width to the teacher's, beginning with the best linear one for this batch.

    A random one would bend the student to itself before it has learnt what the student shows already.
    """
    axis = 1 if student.ndim == 4 else -1
    narrow, wide = student.shape[axis], teacher.shape[axis]
    if narrow == wide:
        return nn.Identity()
    weight = _best_linear(*(seen.movedim(axis, -1).flatten(0, -2) for seen in (student, teacher)))
    if student.ndim == 4:
        projection: nn.Module = nn.Conv2d(
            narrow, wide, 1, bias=False, device=student.device, dtype=student.dtype
        )
        weight = weight[..., None, None]
    else:
        projection = nn.Linear(narrow, wide, bias=False, device=student.device, dtype=student.dtype)
    projection.load_state_dict({"weight": weight})
    return projection


def _best_linear(given: Tensor, wanted: Tensor) -> Tensor:
    """W, (wide, narrow), for which ``given @ W.T`` is nearest to ``wanted``; both (rows, width)."""
    given, wanted = given.double(), wanted.double()
    squares = given.T @ given
    squares.diagonal().add_(_RIDGE_FRACTION * squares.diagonal().mean().clamp_min(_RIDGE_FRACTION))
    best: Tensor = torch.linalg.solve(squares, given.T @ wanted)
    return best.T


def _check_together(own: Seen, other: Seen, weights: Weights) -> None:
    shapes = [[tuple(output.shape) for output in seen.outputs] for seen in (own, other)]
    if weights.outputs > 0 and shapes[0] != shapes[1]:
        raise _apart(f"the student answers {shapes[0]}, the teacher {shapes[1]}")
    if weights.labels > 0 and own.loss is None:
        raise _apart("distill.labels is set, and the student computes no loss from labels")
    if not weights.inside:
        return
    if not own.features or not other.features:
        who = "teacher" if own.features else "student"
        raise _apart(f"the {who} shows no blocks, which features and attention need")
    if len(own.features) > len(other.features):
        raise _apart(f"the student has {len(own.features)} blocks, the teacher {len(other.features)}")
    pairs = list(zip(own.features, _spread(other.features, len(own.features)), strict=True))
    pairs += zip(own.attention, _spread(other.attention, len(own.attention)), strict=True)
    for mine, theirs in pairs:
        if _places(mine) != _places(theirs):
            both = f"{tuple(mine.shape)}, the teacher's {tuple(theirs.shape)}"
            raise _apart(f"a block of the student gives {both}")


def _places(activation: Tensor) -> tuple[int, ...]:
    shape = tuple(activation.shape)
    return (shape[0], *shape[2:]) if activation.ndim == 4 else shape[:-1]


def _apart(why: str) -> TrainingError:
    return TrainingError(
        "student and teacher do not go together", why, "give another teacher, or set that weight to 0"
    )
