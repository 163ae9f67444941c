"""What is trained, and what is written at the end: a model, an adapter on it, or a student of a teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from host_trainer import adapter, batchnorm, models, objective
from host_trainer.config import Config, Distill, Lora, Model
from host_trainer.distill import ModuleTeacher, OnnxTeacher, Student, Teacher, Weights
from host_trainer.loop import LossFunction
from host_trainer.objective import Inputs, Objective

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Subject:
    """What is trained.

    Attributes:
        module: on the CPU, before it is wrapped for several processes.
        loss: takes the module, maybe wrapped, and a micro-batch.
        save: writes the result into a directory; takes the module's whole weights.
        notes: what is worth telling the user.
    """

    module: nn.Module
    loss: LossFunction
    save: Callable[[State, Path], Any]
    notes: tuple[str, ...] = ()


def build(config: Config, device: torch.device, example: Callable[[], Inputs]) -> Subject:
    """Load the model, put an adapter on it and a teacher beside it, as the configuration says.

    Args:
        config: of the run.
        device: where the teacher answers.
        example: gives a batch, to see whether student and teacher go together.

    Raises:
        ConfigError: something cannot be loaded.
        TrainingError: the model has no layer for the adapter, or the teacher does not fit.
    """
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)  # updates and projections begin at random
        return _build(config, device, example)


def _build(config: Config, device: torch.device, example: Callable[[], Inputs]) -> Subject:
    model = models.load(config.model, config.seed)
    if config.distill is not None and config.distill.attention:
        _show_attention(model)
    loss = objective.build(model, config)
    subject = Subject(model, loss, partial(_save_model, model, config.model))
    if config.lora is not None:
        subject = _adapted(model, loss, config.lora)
    if config.distill is not None:
        taught = _Taught(model, config)
        student = _student(subject.module, taught.of_model, config, config.distill, device, example())
        return Subject(student, taught, partial(_save_student, subject.save), subject.notes)
    return subject


def _adapted(model: nn.Module, loss: LossFunction, lora: Lora) -> Subject:
    attached = adapter.attach(
        model, lora.targets, lora.rank, lora.alpha, lora.dropout, train_head=lora.head == "save"
    )
    notes = [
        f"an adapter on {len(attached.adapted)} layers: {attached.trainable_fraction:.2%} of the parameters"
    ]
    batchnorm.freeze(attached.model)  # the adapter is merged into the base, whose statistics these are
    if attached.skipped:
        notes.append(f"{len(attached.skipped)} grouped convolutions stay without: {attached.skipped[0]}, ...")
    return Subject(attached.model, loss, partial(_save_adapter, attached.model), tuple(notes))


def _student(
    module: nn.Module,
    call: Callable[[nn.Module, Inputs], Any],
    config: Config,
    distill: Distill,
    device: torch.device,
    example: Inputs,
) -> Student:
    weights = Weights(
        distill.outputs, distill.features, distill.attention, distill.labels, distill.temperature
    )
    teacher = _teacher(config, distill, weights, device)
    placed = {name: tensor.to(device) for name, tensor in example.items()}
    return Student(module.to(device), call, teacher, weights, placed)


def _teacher(config: Config, distill: Distill, weights: Weights, device: torch.device) -> Teacher:
    if distill.teacher.endswith(".onnx"):
        return OnnxTeacher(Path(distill.teacher), torch.get_num_threads())
    source = Model(source=distill.teacher, weights=distill.teacher_weights, task=config.model.task)
    model = models.load(source, config.seed)
    if distill.attention:
        _show_attention(model)
    return ModuleTeacher(model.to(device), Objective(model, config).forward, weights.inside)


def _show_attention(model: nn.Module) -> None:
    """Fused attention never has the probabilities; transformers' eager one gives them."""
    choose = getattr(model, "set_attn_implementation", None)
    if choose is not None:
        choose("eager")


class _Taught(Objective):
    """The student computes its own loss; judged, it is its model, by labels where there are any."""

    def __init__(self, model: nn.Module, config: Config) -> None:
        super().__init__(model, config)
        self._plain = Objective(model, config)

    def of_model(self, model: nn.Module, batch: Inputs) -> Any:
        """The outputs of the model inside the student."""
        return self._plain.forward(model, batch)

    def __call__(self, model: nn.Module, batch: Inputs) -> Tensor:
        """The distillation's loss."""
        loss: Tensor = model(batch)
        return loss

    def forward(self, model: nn.Module, batch: Inputs) -> Any:
        """The model's outputs, through the student and whatever is around it."""
        return model(batch, answer=True)

    def judge(self, model: nn.Module, batch: Inputs) -> tuple[Tensor, Tensor | None]:
        """As its parent where there are labels; elsewhere the distillation's loss."""
        return super().judge(model, batch) if "labels" in batch else (model(batch), None)


def _save_model(model: nn.Module, source: Model, state: State, out: Path) -> None:
    models.save(model, state, source, out)


def _save_adapter(model: nn.Module, state: State, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    adapter.save(model, out, state)


def _save_student(save: Callable[[State, Path], Any], state: State, out: Path) -> None:
    prefix = "model."
    save({name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}, out)
