"""Which cores, memory node and threads a model gets: by configuration, bundle, or the agent's default.

A bundle knows the device that it was made for, and the configuration knows this one. So the model's table in
the configuration comes first, key by key, then the bundle, then what holds for all models.
"""

from __future__ import annotations

import logging

from device_agent.affinity import Placement, resolve
from device_agent.config import Config
from device_agent.core_list import parse_cpus
from device_agent.engines.base import EngineSettings
from device_agent.errors import Refused
from device_agent.manifest import Resources

_log = logging.getLogger(__name__)

NO_WISHES = Resources()


def engine_settings(config: Config, name: str, wishes: Resources) -> EngineSettings:
    """How the engine of a model runs here.

    Args:
        config: the agent's configuration.
        name: the model's.
        wishes: what its bundle or its repository says. Cores and nodes that are not here are passed over,
            with a line in the log: a bundle must serve on a smaller device too.

    Raises:
        Refused: the configuration names cores or a node that do not exist or are not allowed.
    """
    model = config.of_model(name)
    threads = model.threads
    if threads < 0:
        threads = config.threads if wishes.threads is None else wishes.threads
    if model.cpus or model.numa_node >= 0:
        node = None if model.numa_node < 0 else model.numa_node
        placement = resolve(Placement(parse_cpus(model.cpus), node))
    else:
        placement = _as_wished(name, wishes)
    return EngineSettings(threads, placement, model.isolate, model.run_timeout_s)


def _as_wished(name: str, wishes: Resources) -> Placement:
    try:
        return resolve(Placement(parse_cpus(wishes.cpus), wishes.numa_node))
    except Refused as error:
        _log.warning("%s runs anywhere: its bundle asks for other cores: %s, %s", name, error.what, error.why)
        return resolve(Placement())
