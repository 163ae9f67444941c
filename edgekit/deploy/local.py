"""Deploy a bundle to an agent on this machine, over its control socket.

The requests are described in ``docs/lifecycle.md``. The device does all the checking: success means that
the version reproduced its golden outputs there and is committed.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from edgekit.bundle import open_bundle
from edgekit.errors import BadInput, DeviceRefused, Missing

DEFAULT_SOCKET = Path("/run/edgekit-agent/control.sock")
_CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Deployment:
    """A version that a device committed.

    Attributes:
        address: where it was deployed to.
        name: the model.
        digest: the bundle.
        version: the manifest's version number.
        state: the state that the device reported last: ``committed``.
        previous: digest of the version that was active before; None if there was none.
        signer: name of the key that the device trusted; empty for an unsigned bundle; None where the device
            did not say, since it had the version already or the link broke.
        pause: why and for about how long the device did not serve the model meanwhile; empty: it did.
        unchanged: whether the device served this version already, so that nothing was done.
    """

    address: str
    name: str
    digest: str
    version: int
    state: str
    previous: str | None
    signer: str | None
    pause: str = ""
    unchanged: bool = False


def deploy(bundle: Path, address: str, progress: Callable[[str], None]) -> Deployment:
    """Install a bundle on an agent of this machine and switch to it.

    Args:
        bundle: its directory or single file, readable by the agent's user.
        address: ``local``, or ``unix:///path/control.sock``.
        progress: called with each state that the device reports.

    Raises:
        BadInput: an address of another kind, or a bundle that is missing, malformed or damaged.
        Missing: no agent answers.
        DeviceRefused: the device refused it, for lack of trust, space, a runtime or the right outputs, and
            serves on what it served before.
    """
    path = socket_path(address)
    with open_bundle(bundle):
        pass  # a bundle that is damaged here need not travel
    message = {"op": "install", "bundle": str(bundle.absolute()), "activate": True}
    result = _request(path, message, progress)
    return Deployment(address, **result)


def socket_path(address: str) -> Path:
    """The control socket that an address names.

    Raises:
        BadInput: an address of another kind.
    """
    if address == "local":
        return DEFAULT_SOCKET
    parts = urlsplit(address)
    if parts.scheme == "unix" and parts.netloc == "" and parts.path.startswith("/"):
        return Path(parts.path)
    raise BadInput(
        f"cannot deploy to {address!r}",
        "it is not an address",
        "use ssh://[user@]host[:port], local, or unix:///path/to/control.sock",
    )


def _request(path: Path, message: dict[str, Any], progress: Callable[[str], None]) -> dict[str, Any]:
    with _connect(path) as client, client.makefile("rb") as lines:
        client.sendall(json.dumps(message).encode() + b"\n")
        for line in lines:
            answer = json.loads(line)
            if "ok" in answer:
                return _result(answer)
            progress(str(answer.get("state")))
    raise DeviceRefused(
        "the agent went away during the deployment",
        "it closed the connection before it answered",
        "look at its log, and at `edgekit-agent status` for what it serves",
    )


def _connect(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        client.settimeout(_CONNECT_TIMEOUT_S)
        client.connect(str(path))
        client.settimeout(None)  # an engine may take minutes to build
    except OSError as error:
        client.close()
        raise Missing(
            f"no agent answers on {path}",
            error.strerror or str(error),
            "start one with `edgekit-agent serve`, or give its socket: unix:///path/to/control.sock",
        ) from error
    return client


def _result(answer: dict[str, Any]) -> dict[str, Any]:
    if answer["ok"]:
        return dict(answer["result"])
    raise DeviceRefused(str(answer["what"]), str(answer["why"]), str(answer["fix"]))
