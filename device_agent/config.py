"""The agent's settings: a frozen ``Config``, read strictly from TOML.

A key that is not known is an error that names the file, the key and the nearest valid one; a typing
mistake never silently leaves a default in place.

    state_dir = "/var/lib/edgekit-agent"
    keys_dir = "/etc/edgekit/keys"
    allow_unsigned = false
    control_socket = "/run/edgekit-agent/control.sock"
    control_socket_mode = 0o600
    threads = 0                       # 0: as many as the machine has cores

    [http]
    host = "127.0.0.1"
    port = 8000                       # 0: any free port, printed in the ready line
    unix = ""                         # a Unix-domain socket beside the port; empty: none
    unix_mode = 0o660

    [grpc]
    enabled = true                    # needs grpcio; left out: only where a model repository is served
    host = "127.0.0.1"
    port = 8001

    [metrics]
    host = "127.0.0.1"
    port = 8002

    [tls]                             # without it, everything listens on loopback alone
    certificate = "/etc/edgekit/tls/server.pem"
    key = "/etc/edgekit/tls/server.key"
    token_file = "/etc/edgekit/tls/tokens"

    [limits]
    max_body_bytes = 67108864

    [probation]                       # of a new version, before it is committed
    duration_s = 10                   # 0: it is committed at once

    [timeouts]                        # of the steps of an update
    prepare_s = 900

    [models.NAME]                     # settings of one model, by its name
    slo_ms = 50
    threads = 1
    cpus = "0-1"
    isolate = true

    [follow.NAME]                     # where a model comes from (see follow.settings)
    reference = "oci://registry.example.com/models/NAME:stable"
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Mapping, Optional

from device_agent.batching.settings import Batching
from device_agent.bounded import Timeouts
from device_agent.config_checks import check
from device_agent.errors import BadInput
from device_agent.follow.settings import Follow
from device_agent.probation.settings import ProbationSettings
from device_agent.strict import fill as _fill

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEFAULT_PATH = Path("/etc/edgekit/agent.toml")


@dataclass(frozen=True)
class Address:
    """A TCP address to listen on.

    Attributes:
        host: a loopback address or ``localhost``; any other only with ``[tls]``.
        port: 0 takes any free port.
    """

    host: str = "127.0.0.1"
    port: int = 0


@dataclass(frozen=True)
class HttpAddress(Address):
    """Where inference is served over HTTP.

    Attributes:
        unix: a Unix-domain socket beside the TCP port; empty: none.
        unix_mode: its permissions, such as 0o660; a process needs the right to write to connect.
    """

    unix: str = ""
    unix_mode: int = 0o660


@dataclass(frozen=True)
class GrpcAddress(Address):
    """Where inference is served over gRPC.

    Attributes:
        enabled: whether it is at all. It needs the package ``grpcio``, and 10 to 15 MB of memory. None: where
            a model repository is served, whose clients expect it, and if the package and the port allow it.
    """

    enabled: Optional[bool] = None


@dataclass(frozen=True)
class Tls:
    """TLS 1.2 or newer for every TCP listener, in the table ``[tls]``; Unix sockets have file permissions.

    Attributes:
        certificate: PEM file with the certificate and those between it and its root; empty: no TLS.
        key: PEM file with its private key, not encrypted, and not readable by everybody.
        client_ca: PEM file; clients must have a certificate that one of these authorities signed. Read at the
            start only, the other files whenever they change.
        token_file: clients must send one of these lines as ``Authorization: Bearer``.
    """

    certificate: str = ""
    key: str = ""
    client_ca: str = ""
    token_file: str = ""

    @property
    def enabled(self) -> bool:
        """Whether TCP listeners speak TLS."""
        return bool(self.certificate)


@dataclass(frozen=True)
class Limits:
    """What a client may cost.

    Attributes:
        max_body_bytes: largest request body, also after it is decompressed; more is a 413.
        max_queue_size: requests of one model that may wait; more are refused with 503.
        max_connections: open connections; more are refused with 503.
        header_timeout_s: from a request's first byte to its last; each 64 KiB of an announced body add a
            second.
        idle_timeout_s: how long a connection may stay open without a request.
        drain_timeout_s: how long a stopping agent waits for the requests that it accepted.
        load_timeout_s: how long the service manager is asked to wait, at the start for one model more to
            serve, and at the stop for an update to end.
        memory_reserve_bytes: what an update must leave free to load a version beside the one that serves;
            where it cannot, the old one is stopped first.
        max_upload_bytes: of all models together that came inside load requests.
    """

    max_body_bytes: int = 64 * 1024 * 1024
    max_queue_size: int = 256
    max_connections: int = 1024
    header_timeout_s: float = 10.0
    idle_timeout_s: float = 75.0
    drain_timeout_s: float = 30.0
    load_timeout_s: float = 900.0
    memory_reserve_bytes: int = 64 * 1024 * 1024
    max_upload_bytes: int = 256 * 1024 * 1024


@dataclass(frozen=True)
class ModelConfig:
    """Settings of one model, in the table ``[models.NAME]``.

    Attributes:
        threads: threads of one inference; 0: as many as its cores; -1: the agent's own ``threads``.
        cpus: the cores that the model's threads may use, as the kernel writes them (``0-1,4``); empty: any.
        numa_node: the node that the model's memory comes from, and its cores where ``cpus`` names none; -1:
            any.
        isolate: run the engine in a process of its own, whose crash the agent survives.
        run_timeout_s: an isolated engine that takes longer for one run is ended and started again; without
            ``isolate`` that is the whole agent, by the watchdog of its service manager.
        slo_ms: within which a request should be answered; one that cannot be is refused with 503. 0: no
            objective.
        weight: the model's share of the engine where several want it, relative to the others'.
        max_queue_size: requests of each priority level that may wait; 0: ``limits.max_queue_size``.
        batching: in the place of the agent's own; None: that one, or what a repository's configuration says.
    """

    threads: int = -1
    cpus: str = ""
    numa_node: int = -1
    isolate: bool = False
    run_timeout_s: float = 30.0
    slo_ms: float = 0.0
    weight: float = 1.0
    max_queue_size: int = 0
    batching: Optional[Batching] = field(default=None, metadata={"table": Batching()})


@dataclass(frozen=True)
class Config:
    """Everything that ``edgekit-agent serve`` can be told.

    Attributes:
        state_dir: where installed bundles live.
        keys_dir: the public keys that this device trusts.
        allow_unsigned: serve bundles without a signature; for development only.
        control_socket: the Unix socket of ``install``, ``activate`` and their kin.
        control_socket_mode: its permissions; with 0o660 the members of the agent's group may administer it.
        http: where the Open Inference Protocol is served.
        grpc: where it is served over gRPC.
        metrics: where ``/metrics`` and the status page are served.
        tls: what the TCP listeners ask of a client.
        threads: threads that one inference may use; 0: as many as the machine has cores.
        batching: how requests are put together.
        probation: when a new version has proven itself.
        timeouts: of the steps of an update.
        concurrent_runs: engines that may run at the same time; 0: as many as find cores of their own.
        models: settings of single models, by name.
        follow: tags in registries that models follow, by the model's name.
    """

    state_dir: Path = Path("/var/lib/edgekit-agent")
    keys_dir: Path = Path("/etc/edgekit/keys")
    allow_unsigned: bool = False
    control_socket: Path = Path("/run/edgekit-agent/control.sock")
    control_socket_mode: int = 0o600
    http: HttpAddress = HttpAddress(port=8000)
    grpc: GrpcAddress = GrpcAddress(port=8001)
    metrics: Address = Address(port=8002)
    tls: Tls = Tls()
    limits: Limits = field(default_factory=Limits)
    batching: Batching = field(default_factory=Batching)
    probation: ProbationSettings = field(default_factory=ProbationSettings)
    timeouts: Timeouts = field(default_factory=Timeouts)
    threads: int = 0
    concurrent_runs: int = 0
    models: Mapping[str, ModelConfig] = field(default_factory=dict, metadata={"entries": ModelConfig()})
    follow: Mapping[str, Follow] = field(default_factory=dict, metadata={"entries": Follow()})

    def of_model(self, name: str) -> ModelConfig:
        """The settings of a model; the defaults where the file has no table for it."""
        return self.models.get(name, ModelConfig())


def load(path: Optional[Path] = None) -> Config:
    """Read a configuration file.

    Args:
        path: the file; None reads ``/etc/edgekit/agent.toml`` where it exists, and else takes the defaults.

    Raises:
        BadInput: the file is missing or malformed, has an unknown key or a wrong type, or asks for a bind
            address that is not loopback without TLS and a way to tell clients apart.
    """
    if path is None:
        if not DEFAULT_PATH.exists():
            return Config()
        path = DEFAULT_PATH
    return parse(_read(path), str(path))


def parse(text: str, source: str) -> Config:
    """Read a configuration from TOML ``text``; ``source`` names it in errors."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"{source} is not valid TOML", str(error), "correct the line that is named") from error
    config = _fill(Config(), raw, source, "")
    check(config, source)
    return config


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(
            f"{path} cannot be read", error.strerror or str(error), "give --config an existing file"
        ) from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} cannot be read", f"it is not UTF-8: {error}", "save it as UTF-8") from error
