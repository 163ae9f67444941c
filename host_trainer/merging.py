"""From a run that trained an adapter to a plain model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from host_trainer import adapter, models
from host_trainer import config as configuration
from host_trainer.data import open_samples
from host_trainer.data.collate import collate
from host_trainer.errors import ConfigError
from host_trainer.folder import read_json
from host_trainer.objective import Inputs, Objective, logits_of

#: Samples that the merged model has to answer as before.
_SAMPLES = 8


def merge(run: Path, out: Path, dtype: torch.dtype) -> adapter.Merged:
    """Write the model of a run with its adapter merged, as ``edgekit compress`` takes it.

    Args:
        run: directory of a run with a section ``lora``, finished.
        out: a directory that does not exist yet.
        dtype: of the merged weights.

    Raises:
        ConfigError: the run trained no adapter, is not finished, or ``out`` exists.
        TrainingError: the merged model answers otherwise.
    """
    config = configuration.parse(read_json(run / "config.json"), str(run / "config.json"))
    if config.lora is None:
        raise ConfigError(f"{run} trained no adapter", "its config has no section 'lora'", "give another run")
    if not (run / "model" / adapter.CONFIG_FILE).is_file():
        raise ConfigError(f"{run} is not finished", "it has no adapter yet", "let it train to its end")
    if out.exists():
        raise ConfigError(f"{out} exists", "a model is never mixed with what is there", "name a new one")
    model = models.load(config.model, config.seed)
    ask = Objective(model, config)
    samples = open_samples(config.data.eval or config.data.train, config, training=False)
    batch = collate([samples[0, index] for index in range(min(_SAMPLES, len(samples)))])
    wrapped = adapter.load(model, run / "model")
    merged = adapter.merge(wrapped, lambda module: _answer(ask, module, batch), dtype)
    models.save(merged.model, merged.model.state_dict(), config.model, out)
    return merged


def _answer(ask: Objective, module: nn.Module, batch: Inputs) -> Tensor:
    dtype = next(module.parameters()).dtype
    placed = {name: t.to(dtype) if t.is_floating_point() else t for name, t in batch.items()}
    outputs = ask.forward(module, placed)
    return logits_of(outputs)
