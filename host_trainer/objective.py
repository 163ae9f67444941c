"""What is minimized: the model's own loss where it computes one, or one of ours."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from host_trainer.config import Config
from host_trainer.data import resolve
from host_trainer.errors import ConfigError
from host_trainer.loop import LossFunction

Inputs = Mapping[str, Tensor]


class Objective:
    """Calls the model with a batch and gives the loss.

    A model whose ``forward`` names the inputs gets them by name; any other gets them in the batch's order.
    """

    def __init__(self, model: nn.Module, config: Config) -> None:
        # Wrappers for several processes hide the signature, so it is read before they are put on.
        self._named = frozenset(inspect.signature(model.forward).parameters)
        self._causal = config.model.task == "causal-lm" or type(model).__name__.endswith("ForCausalLM")
        self._kind = config.optimize.loss

    def __call__(self, model: nn.Module, batch: Inputs) -> Tensor:
        """The loss of a batch, a scalar."""
        return self.judge(model, batch)[0]

    def judge(self, model: nn.Module, batch: Inputs) -> tuple[Tensor, Tensor | None]:
        """The loss and, where the outputs are logits of classes, which samples are right."""
        try:
            outputs = self.forward(model, batch)
            logits = logits_of(outputs)
            labels = batch.get("labels")
            loss = self._loss(outputs, logits, labels)
        except IndexError as error:  # on a CPU; CUDA ends the process
            raise ConfigError(
                "the data does not fit the model", str(error),
                "number the classes from 0, with model.labels above the last; texts: check the tokenizer",
            ) from error  # fmt: skip
        right = None
        if labels is not None and logits.ndim == 2 and labels.ndim == 1 and not labels.is_floating_point():
            right = logits.detach().argmax(dim=1) == labels
        return loss, right

    def forward(self, model: nn.Module, batch: Inputs) -> Any:
        """The model's outputs for a batch."""
        inputs = dict(batch)
        if self._causal:
            inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        if "return_loss" in self._named:
            return model(**inputs, return_loss=True)
        if inputs.keys() <= self._named:
            return model(**inputs)
        inputs.pop("labels", None)
        return model(**inputs) if inputs.keys() <= self._named else model(*inputs.values())

    def _loss(self, outputs: Any, logits: Tensor, labels: Tensor | None) -> Tensor:
        own = getattr(outputs, "loss", None)
        if self._kind == "auto" and own is not None:
            return own  # type: ignore[no-any-return]
        if self._kind == "contrastive":
            return contrastive(outputs.logits_per_image)
        if labels is None:
            raise ConfigError(
                "there is nothing to learn from", "the data has no label, and the model computes no loss",
                "add labels, or set optimize.loss",
            )  # fmt: skip
        if labels.is_floating_point():
            return F.mse_loss(logits.squeeze(-1), labels)
        return F.cross_entropy(logits, labels)


def contrastive(similarities: Tensor) -> Tensor:
    """Each image finds its text among the batch's, and the other way round (Radford et al., "CLIP", 2021).

    Args:
        similarities: scaled, [images, texts].
    """
    target = torch.arange(len(similarities), device=similarities.device)
    return (F.cross_entropy(similarities, target) + F.cross_entropy(similarities.T, target)) / 2


def build(model: nn.Module, config: Config) -> LossFunction:
    """The loss that ``optimize.loss`` names.

    Raises:
        ConfigError: there is no such loss.
    """
    kind = config.optimize.loss
    if ":" in kind:
        return resolve(kind, "optimize.loss")
    if kind not in ("auto", "cross_entropy", "contrastive"):
        raise ConfigError(
            f"optimize.loss '{kind}' is not known", "it is no loss of ours and no module:function",
            "choose auto, cross_entropy or contrastive",
        )  # fmt: skip
    return Objective(model, config)


def logits_of(outputs: Any) -> Tensor:
    """The one tensor of a model's outputs that answers."""
    if isinstance(outputs, Tensor):
        return outputs
    for name in ("logits", "logits_per_image"):
        if getattr(outputs, name, None) is not None:
            return getattr(outputs, name)  # type: ignore[no-any-return]
    first: Tensor = outputs[0]
    return first
