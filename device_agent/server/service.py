"""What clients may ask of the agent, over HTTP or gRPC: inference, documents, repository, shared memory.

Everything runs on the event loop. What is wrong with a request is a ProtocolError; its status is that of HTTP
(gRPC translates it).
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from functools import partial
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Coroutine,
    Dict,
    Generic,
    List,
    Mapping,
    Optional,
    Sequence,
    Set,
    Tuple,
    TypeVar,
)

from device_agent import __version__
from device_agent.batching.job import DeadlineExceeded, Job, QueueFull
from device_agent.batching.settings import document
from device_agent.config import Config
from device_agent.engines.base import EngineUnavailable, InputError
from device_agent.loaded import LoadedModel
from device_agent.metrics import Metrics
from device_agent.models import Models
from device_agent.server.documents import model_config, model_metadata, model_statistics
from device_agent.server.fields import ProtocolError, shown
from device_agent.server.interface import Arrays, InferRequest, ModelInterface
from device_agent.server.model_control import ModelControl, paused
from device_agent.server.shared_memory import Regions

if TYPE_CHECKING:
    from device_agent.repository.repository import Repository

EXTENSIONS = [
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "statistics",
    "system_shared_memory",
]
INTERNAL_ERROR = "the agent failed; its log has the cause"

_log = logging.getLogger(__name__)

_P = TypeVar("_P")


class Protocols(Generic[_P]):
    """What a transport keeps for each served model, as long as that serves.

    Args:
        make: makes it for what clients see of a version.
    """

    def __init__(self, make: Callable[[ModelInterface], _P]) -> None:
        self._make = make

    def of(self, model: ServedModel) -> _P:
        """The one that was made for ``model``."""
        known: Optional[_P] = model.protocols.get(self)
        if known is None:
            known = model.protocols[self] = self._make(model.interface)
        return known


@dataclass(frozen=True)
class ServedModel:
    """A loaded model and what its clients see of it; a new one after every swap.

    Attributes:
        loaded: the model.
        interface: what clients see.
        protocols: see :class:`Protocols`.
    """

    loaded: LoadedModel
    interface: ModelInterface
    protocols: Dict[object, Any] = field(default_factory=dict, compare=False, repr=False)


class InferenceService:
    """The Open Inference Protocol's operations on the loaded models.

    Attributes:
        loaded: whether every model that should serve has been loaded, and the agent is not stopping.
        max_body_bytes: largest request, also after it is decompressed.
        regions: the registered shared memory.
    """

    def __init__(
        self, models: Models, metrics: Metrics, config: Config, repository: Optional[Repository] = None
    ) -> None:
        self.loaded = False
        self.max_body_bytes = config.limits.max_body_bytes
        self.regions = Regions()
        self._models = models
        self._control = ModelControl(models, repository)
        self._metrics = metrics
        self._served: Dict[Tuple[str, str], ServedModel] = {}
        self._tasks: Set[asyncio.Task[None]] = set()

    # Inference

    def find(self, name: str, version: Optional[str] = None) -> ServedModel:
        """The model that answers to a name and, where one is given, a version.

        Raises:
            ProtocolError: 404; 503 in a planned pause.
        """
        loaded = self._models.get(name, version)
        if loaded is None:
            pause = self._models.pause_of(name)
            if pause is not None:
                raise paused(name, pause)
            raise _not_found(name, version, self._models.versions(name))
        known = self._served.get((name, loaded.version))
        if known is None or known.loaded is not loaded:
            known = self._served[name, loaded.version] = ServedModel(loaded, _interface_of(loaded))
        return known

    def submit(
        self, model: ServedModel, request: InferRequest, on_done: Callable[[Job], None]
    ) -> Callable[[], None]:
        """Queue a request.

        Args:
            model: which model.
            request: checked by ``model.interface``.
            on_done: called on the event loop when the job has an outcome, which may be before this returns.
                Must not raise: the other requests of its batch come after it.

        Returns:
            A function that forgets the request, for a client that is gone.

        Raises:
            ProtocolError: 503: the queue is full, or the request cannot be answered in time.
        """
        head = request.head
        job = Job(request.inputs, head.rows, head.batch_key, on_done, head.timeout_s, head.priority)
        name = model.interface.name
        try:
            model.loaded.batcher.submit(job)
        except QueueFull as error:
            message = f"model '{name}' has as many requests waiting as it may"
            raise ProtocolError(503, message, error.retry_after_s) from None
        except DeadlineExceeded as error:
            raise _job_error(name, error) from None
        return partial(model.loaded.batcher.cancel, job)

    def outputs_of(self, name: str, job: Job) -> Arrays:
        """The result of a job of model ``name`` that is done.

        Raises:
            ProtocolError: 400 for values that the runtime cannot carry, 503 for a missed deadline, 500 for
                whatever else went wrong in the engine.
        """
        if job.error is not None or job.outputs is None:
            raise _job_error(name, job.error)
        return job.outputs

    # Documents

    def server_metadata(self) -> Dict[str, Any]:
        """Name, version and extensions."""
        return {"name": "edgekit-agent", "version": __version__, "extensions": EXTENSIONS}

    @property
    def ready(self) -> bool:
        """Whether every model that should serve can answer now, as Triton's strict readiness means it."""
        return self.loaded and not any(model.why_down for model in self._models.serving())

    def model_ready(self, name: str, version: Optional[str] = None) -> bool:
        """Whether a model serves; one whose isolated engine is being started again does not meanwhile."""
        try:
            model = self.find(name, version)
        except ProtocolError:
            return False
        return not model.loaded.why_down

    def model_metadata(self, name: str, version: Optional[str] = None) -> Dict[str, Any]:
        """See :func:`device_agent.server.documents.model_metadata`; ProtocolError 404."""
        model = self.find(name, version)
        versions = [loaded.version for loaded in self._models.versions(name)]
        return model_metadata(model.interface, versions, model.loaded.engine.runtime)

    def model_config(self, name: str, version: Optional[str] = None) -> Dict[str, Any]:
        """See :func:`device_agent.server.documents.model_config`; ProtocolError 404."""
        model = self.find(name, version)
        if model.loaded.config is not None:
            return dict(model.loaded.config)
        batching = document(model.loaded.batcher.settings.batching) if model.loaded.batchable else None
        return model_config(model.interface, model.loaded.digest, model.loaded.engine.runtime, batching)

    def statistics(self, name: Optional[str] = None, version: Optional[str] = None) -> Dict[str, Any]:
        """Statistics of one model's versions, or of all where ``name`` is None; ProtocolError 404."""
        models: Sequence[LoadedModel] = self._models.serving()
        if name is not None:
            found = self.find(name, version).loaded
            models = self._models.versions(name) if version is None else [found]
        return {"model_stats": [self._statistics_of(loaded) for loaded in models]}

    def _statistics_of(self, loaded: LoadedModel) -> Dict[str, Any]:
        name = loaded.manifest.name
        return model_statistics(name, loaded.version, self._metrics.of_model(name, loaded.digest))

    # The repository extension

    def index(self, ready_only: bool) -> List[Dict[str, str]]:
        """See :meth:`device_agent.server.model_control.ModelControl.index`."""
        return self._control.index(ready_only)

    async def load(
        self, name: str, config: Optional[str] = None, files: Optional[Mapping[str, bytes]] = None
    ) -> None:
        """See :meth:`device_agent.server.model_control.ModelControl.load`; ProtocolError 400."""
        self._retire(await self._control.load(name, config, files))

    def unload(self, name: str) -> None:
        """Serve a model no more; requests that it accepted are answered. ProtocolError 400."""
        self._retire(self._control.unload(name))

    def _retire(self, replaced: Sequence[LoadedModel]) -> None:
        for loaded in replaced:
            key = (loaded.manifest.name, loaded.version)
            if key in self._served and self._served[key].loaded is loaded:
                del self._served[key]  # which would keep its memory
            self.spawn(self._models.retire(loaded))

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something in the background."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)  # the loop itself keeps only a weak reference
        task.add_done_callback(self._tasks.discard)


def _job_error(name: str, error: Optional[Exception]) -> ProtocolError:
    if isinstance(error, InputError):
        return ProtocolError(400, str(error))
    if isinstance(error, DeadlineExceeded):
        message = "the request cannot be answered in time: within its timeout, or the model's objective"
        return ProtocolError(503, message, error.retry_after_s)
    _log.error("model %s failed: %s", name, error)
    if isinstance(error, EngineUnavailable):
        return ProtocolError(503, f"model '{name}' cannot run now: {error}")
    return ProtocolError(500, f"model '{name}' failed: {error}")


def _not_found(name: str, version: Optional[str], serving: Sequence[LoadedModel]) -> ProtocolError:
    if not serving:
        return ProtocolError(404, f"model {shown(name)} is not found")
    has = ", ".join(loaded.version for loaded in serving)
    return ProtocolError(404, f"model '{name}' has no version {(version or '')[:100]}; it has {has}")


def _interface_of(loaded: LoadedModel) -> ModelInterface:
    manifest = loaded.manifest
    return ModelInterface(
        manifest.name,
        loaded.version,
        manifest.inputs,
        manifest.outputs,
        manifest.max_batch_size,
        loaded.labels,
    )
