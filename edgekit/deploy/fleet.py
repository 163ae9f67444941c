"""What every device of a fleet serves, asked of each over SSH."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from edgekit.deploy import ssh
from edgekit.deploy.inventory import Device
from edgekit.errors import EdgekitError


@dataclass(frozen=True)
class DeviceStatus:
    """One device.

    Attributes:
        device: its name.
        address: how it is reached.
        reachable: whether its agent answered.
        healthy: whether it serves every model that is active on it.
        agent: the agent's version; None where it did not answer.
        architecture: the device's processor; None likewise.
        models: for each model ``name``, ``digest`` and ``version`` of the active version, ``serving``
            (whether it serves), ``state`` of the last operation and its ``failure``.
        error: why it was not reached; empty: it was.
    """

    device: str
    address: str
    reachable: bool
    healthy: bool
    agent: str | None
    architecture: str | None
    models: list[dict[str, Any]]
    error: str = ""


def status(devices: tuple[Device, ...], options: ssh.SshOptions, parallel: int) -> list[DeviceStatus]:
    """Ask every device, ``parallel`` at the same time; one that cannot be reached is among the answers."""
    with ThreadPoolExecutor(parallel, thread_name_prefix="fleet") as pool:
        return list(pool.map(lambda device: _ask(device, options), devices))


def _ask(device: Device, options: ssh.SshOptions) -> DeviceStatus:
    try:
        with ssh.connect(device.address, options) as connection:
            agent = connection.ask({"op": "agent"})
    except EdgekitError as error:
        why = f"{error.what}: {error.why}"
        return DeviceStatus(device.name, str(device.address), False, False, None, None, [], why)
    models = [_model(model) for model in agent["models"]]
    return DeviceStatus(
        device.name,
        str(device.address),
        True,
        all(model["serving"] for model in models if model["digest"] is not None),
        agent["version"],
        agent["architecture"],
        models,
    )


def _model(model: Mapping[str, Any]) -> dict[str, Any]:
    active = model["active"]
    versions = {version["digest"]: version["version"] for version in model["versions"]}
    last = model["last_operation"] or {}
    return {
        "name": model["name"],
        "digest": active,
        "version": versions.get(active),
        "serving": active is not None and model["serving"] == active,
        "state": last.get("state"),
        "failure": last.get("failure"),
    }
