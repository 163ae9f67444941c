"""``edgekit deploy``: one device or a fleet, by whichever way it is reached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgekit.deploy import inventory, local, payload, record, remote, rollout, ssh
from edgekit.deploy.inventory import Device
from edgekit.errors import BadInput

DEFAULT_INVENTORY = Path("inventory.toml")
_ROLLOUTS = Path(".edgekit", "rollouts")


@dataclass(frozen=True)
class Request:
    """What the command line asks for.

    Attributes:
        bundle: either form.
        addresses: of ``--to``; empty: the inventory's devices, or the agent of this machine.
        inventory: a file; None: none.
        group: only this group or device of the inventory.
        waves, max_failures, parallel, retry_failed: see ``rollout.Plan``.
        record: where the rollout is written down; None: in the working directory.
        ssh_config: in the place of the user's ssh configuration.
    """

    bundle: Path
    addresses: tuple[str, ...] = ()
    inventory: Path | None = None
    group: str | None = None
    waves: str = "100%"
    max_failures: int = 0
    parallel: int = 8
    retry_failed: bool = False
    record: Path | None = None
    ssh_config: Path | None = None


def deploy(request: Request, progress: Callable[[str], None]) -> local.Deployment | rollout.Result:
    """Deploy to one device, or roll out to several.

    Raises:
        BadInput: addresses, inventory or bundle are malformed.
        Missing: the one device cannot be reached.
        DeviceRefused: the one device refused the bundle or rolled back.
    """
    addresses = request.addresses or (() if request.inventory else ("local",))
    if len(addresses) == 1 and not addresses[0].startswith("ssh:"):
        return local.deploy(request.bundle, addresses[0], progress)
    chosen = devices(addresses, request.inventory, request.group)
    options = ssh.SshOptions(request.ssh_config, batch=ssh.batch_needed(len(chosen)))
    with payload.prepared(request.bundle) as prepared:
        if request.inventory is None and len(chosen) == 1:
            return remote.deploy(prepared, chosen[0].address, options, progress)
        plan = rollout.Plan(
            chosen, request.waves, request.max_failures, request.parallel, request.retry_failed
        )
        path = request.record or _ROLLOUTS / f"{prepared.manifest.name}-{prepared.digest[:12]}.json"
        with record.opened(path, prepared.digest) as opened:
            batch = ssh.SshOptions(request.ssh_config, batch=True)
            return rollout.run(prepared, plan, opened, batch, progress)


def devices(addresses: tuple[str, ...], file: Path | None, group: str | None) -> tuple[Device, ...]:
    """The devices of ``--to`` or of an inventory.

    Raises:
        BadInput: both are given, or one is malformed.
    """
    if addresses and file is not None:
        raise BadInput(
            "both --to and --inventory are given", "they name different devices", "give one of them"
        )
    if addresses:
        return inventory.of_addresses(addresses)
    return inventory.load(file or DEFAULT_INVENTORY, group)
