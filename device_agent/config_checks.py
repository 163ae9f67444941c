"""What a configuration must be beyond its types: ranges, and settings that belong together."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from device_agent.batching.settings import Batching, problems
from device_agent.core_list import parse_cpus
from device_agent.errors import BadInput
from device_agent.follow.settings import problems as follow_problems
from device_agent.oci.reference import is_loopback
from device_agent.probation.settings import problems as probation_problems
from device_agent.strict import wrong_type as _wrong_type

if TYPE_CHECKING:
    from device_agent.config import Address, Config, ModelConfig, Tls


def check(config: Config, source: str) -> None:
    """Refuse settings that contradict each other, or mean nothing.

    Args:
        config: read without an error.
        source: names the file in errors.

    Raises:
        BadInput: what is wrong, by its key.
    """
    _check_tls(config.tls, source)
    _check_address(config.http, "http", config.tls, source)
    if not 0 <= config.http.unix_mode <= 0o777:
        raise _wrong_type("http.unix_mode", "permissions such as 0o660", config.http.unix_mode, source)
    if not 0 <= config.control_socket_mode <= 0o777 or config.control_socket_mode & 0o007:
        raise _wrong_type(
            "control_socket_mode",
            "permissions such as 0o660, which give others none",
            config.control_socket_mode,
            source,
        )
    _check_address(config.grpc, "grpc", config.tls, source)
    _check_address(config.metrics, "metrics", config.tls, source)
    positive = {
        f"{table}.{f.name}": getattr(settings, f.name)
        for table, settings in (("limits", config.limits), ("timeouts", config.timeouts))
        for f in fields(settings)
    }
    for name, value in positive.items():
        if not 0 < value < float("inf"):
            raise _wrong_type(name, "a number above zero", value, source)
    for name, value in {
        "threads": config.threads,
        "concurrent_runs": config.concurrent_runs,
    }.items():
        if value < 0:
            raise _wrong_type(name, "zero or more", value, source)
    for key, expected in probation_problems(config.probation):
        raise _wrong_type(f"probation.{key}", expected, getattr(config.probation, key), source)
    _check_batching(config.batching, "batching", source)
    for name, model in config.models.items():
        _check_model(model, f"models.{name}", source)
    for name, follow in config.follow.items():
        for key, expected in follow_problems(name, follow):
            path = f"follow.{name}.{key}".rstrip(".")
            raise _no_meaning(path, expected, source)


def _check_model(model: ModelConfig, prefix: str, source: str) -> None:
    for key in ("threads", "numa_node"):
        if getattr(model, key) < -1:
            raise _wrong_type(f"{prefix}.{key}", "-1 or more", getattr(model, key), source)
    for key in ("run_timeout_s", "weight"):
        if not 0 < getattr(model, key) < float("inf"):
            raise _wrong_type(f"{prefix}.{key}", "a number above zero", getattr(model, key), source)
    for key in ("slo_ms", "max_queue_size"):
        if not 0 <= getattr(model, key) < float("inf"):
            raise _wrong_type(f"{prefix}.{key}", "zero or more", getattr(model, key), source)
    if model.batching is not None:
        _check_batching(model.batching, f"{prefix}.batching", source)
    try:
        parse_cpus(model.cpus)
    except ValueError as error:
        raise BadInput(
            f"{source} cannot be used", f"'{prefix}.cpus': {error}", 'write cores as in "0-1,4"'
        ) from error


def _check_batching(batching: Batching, prefix: str, source: str) -> None:
    for key, expected in problems(batching):
        raise _no_meaning(f"{prefix}.{key}", expected, source)


def _no_meaning(name: str, expected: str, source: str) -> BadInput:
    return BadInput(f"{source} cannot be used", f"'{name}' has no meaning", f"make '{name}' {expected}")


def _check_tls(tls: Tls, source: str) -> None:
    if bool(tls.certificate) != bool(tls.key):
        raise BadInput(
            f"{source} cannot be used",
            "'tls.certificate' and 'tls.key' belong together, and one is missing",
            "give both, or neither",
        )
    if tls.enabled != bool(tls.client_ca or tls.token_file):
        raise BadInput(
            f"{source} cannot be used",
            "'tls' needs a certificate and a way to tell clients apart",
            "give 'tls.certificate' and 'tls.key', and 'tls.token_file' or 'tls.client_ca' or both",
        )


def _check_address(address: Address, name: str, tls: Tls, source: str) -> None:
    if not 0 <= address.port <= 65535:
        raise _wrong_type(f"{name}.port", "a port from 0 to 65535", address.port, source)
    if not tls.enabled and not is_loopback(address.host):
        raise BadInput(
            f"{source} cannot be used",
            f"'{name}.host' is {address.host!r}: without TLS and a token anyone on the network could use it",
            "bind to 127.0.0.1 or ::1, or give '[tls]' a certificate and a token file or a client authority",
        )
