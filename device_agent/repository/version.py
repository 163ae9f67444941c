"""One version of a repository's model: from its graph to something that serves. Blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Tuple

from device_agent.batching.settings import Batching, QueuePolicy, problems
from device_agent.errors import Refused
from device_agent.loaded import LoadedModel, is_batchable
from device_agent.manifest import Contract, Golden, Manifest, Resources
from device_agent.models import Models
from device_agent.repository import files
from device_agent.repository.completion import complete, specs
from device_agent.repository.document import ConfigError, decimal
from device_agent.repository.model_config import ModelConfig
from device_agent.repository.reshaping import reshaped
from device_agent.repository.warmup import warm_up
from device_agent.selftest import SelfTest


def open_version(
    models: Models, directory: Path, version: int, config: ModelConfig, digest: str
) -> LoadedModel:
    """Load a graph, complete its configuration and warm it up.

    Args:
        models: where it will serve.
        directory: of the model.
        version: a directory in it.
        config: what its configuration says.
        digest: the version's identity.

    Raises:
        BadInput: the configuration does not fit the graph, or a file cannot be used.
        Missing: ONNX Runtime is not installed.
        Refused: ONNX Runtime does not take the graph, or it fails its own warm-up, or memory is short.
    """
    graph = directory / str(version) / config.filename
    engine = models.loader.open_graph(graph, config.name, config.threads)
    try:
        completed = complete(config, engine.inputs, engine.outputs)
        labels = _labels(directory, completed)
        engine = reshaped(engine, completed)
        manifest = _manifest(completed, version, graph)
        batcher = models.loader.graph_batcher(engine, manifest, digest, _batching(completed))
        warm_up(engine, batcher.latency, directory, completed)
    except MemoryError as error:
        engine.close()
        raise Refused(
            f"model '{config.name}' does not come up",
            f"this device has not enough memory for its warm-up: {error}",
            "make its inputs or its model_warmup smaller",
        ) from error
    except BaseException:
        engine.close()
        raise
    return LoadedModel(
        manifest=manifest,
        digest=digest,
        directory=directory,
        engine=engine,
        batcher=batcher,
        selftest=SelfTest({}, 0.0),
        batchable=is_batchable(manifest),
        config=completed.document,
        labels=labels,
    )


def _labels(directory: Path, config: ModelConfig) -> Dict[str, Tuple[str, ...]]:
    return {
        tensor.name: files.read_labels(directory / tensor.label_filename)
        for tensor in config.outputs
        if tensor.label_filename
    }


def _manifest(config: ModelConfig, version: int, graph: Path) -> Manifest:
    """What the agent knows of a bundle, for a model that came without one: it promises and proves nothing."""
    return Manifest(
        schema=1,
        name=config.name,
        version=version,
        profile="",
        architecture="",
        graph=str(graph.relative_to(graph.parent.parent)),
        precision="",
        inputs=specs(config.inputs, config.max_batch_size),
        outputs=specs(config.outputs, config.max_batch_size),
        max_batch_size=config.max_batch_size,
        files=(),
        engines=(),
        golden=Golden("", "", {}),
        contract=Contract(),
        resources=Resources(config.threads),
    )


# Batching


def _batching(config: ModelConfig) -> Optional[Batching]:
    """The configuration's ``dynamic_batching``; None: requests run one by one.

    Raises:
        ConfigError: a field has no meaning.
    """
    given = config.dynamic_batching
    if given is None:
        return None
    levels = given.get("priority_levels", 0)
    batching = Batching(
        preferred_batch_size=tuple(given.get("preferred_batch_size", ())),
        max_queue_delay_microseconds=given.get("max_queue_delay_microseconds"),
        priority_levels=levels,
        default_priority_level=given.get("default_priority_level", 0),
        default_queue_policy=_queue_policy(given.get("default_queue_policy")),
        priority_queue_policy={
            _level(config, key): _queue_policy(policy)
            for key, policy in given.get("priority_queue_policy", {}).items()
        },
    )
    wrong = next(problems(batching, config.max_batch_size), None)
    if wrong is not None:
        raise _wrong(config, *wrong)
    return batching


def _queue_policy(given: Optional[Mapping[str, Any]]) -> QueuePolicy:
    if given is None:
        return QueuePolicy()
    return QueuePolicy(
        timeout_action=given.get("timeout_action", "REJECT"),
        default_timeout_microseconds=given.get("default_timeout_microseconds", 0),
        # Where there is a policy, Triton lets requests override it only if it says so.
        allow_timeout_override=given.get("allow_timeout_override", False),
        max_queue_size=given.get("max_queue_size", 0),
    )


def _level(config: ModelConfig, key: str) -> int:
    level = decimal(key)
    if level is None:
        raise _wrong(config, f"priority_queue_policy.{key[:100]}", "for a level above zero")
    return level


def _wrong(config: ModelConfig, field: str, expected: str) -> ConfigError:
    return ConfigError(
        f"the configuration of model '{config.name}' cannot be served",
        f"the field 'dynamic_batching.{field}' is not {expected}",
        "correct it",
    )
