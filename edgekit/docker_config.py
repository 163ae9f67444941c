"""Credentials of registries, from where ``docker login`` and its kin keep them.

``$DOCKER_CONFIG/config.json`` or ``~/.docker/config.json``: ``credHelpers`` and ``credsStore`` name programs
``docker-credential-NAME`` that are asked with ``get`` and the host on standard input; ``auths`` holds user
and password in base64, an identity token or a registry token. Nothing of this is ever logged or shown.
Source: the documentation of ``docker login``, "Credential helper protocol".
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

from device_agent.oci.authorization import Credentials
from edgekit.errors import BadInput, Missing

_HELPER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_HELPER_TIMEOUT_S = 60
_DOCKER_HUB = "https://index.docker.io/v1/"
_IDENTITY_TOKEN_USER = "<token>"  # noqa: S105  # says that the secret is no password
_LOG_IN = "run `docker login`, or a login of another tool that writes the same file"


def helper_programs() -> list[str]:
    """The programs that the file names to keep passwords, whether they are installed or not.

    Raises:
        BadInput: the file is malformed.
    """
    path = _path()
    config = _read(path)
    names = [config.get("credsStore"), *_table(config, "credHelpers", path).values()]
    return sorted({_program(str(name), path) for name in names if name})


def credentials_for(host: str) -> Credentials:
    """The credentials for a registry; empty ones where there are none.

    Args:
        host: with its port, as in the reference.

    Raises:
        BadInput: the file is malformed.
        Missing: a credential helper is not installed, or fails.
    """
    path = _path()
    config = _read(path)
    server = _DOCKER_HUB if host == "docker.io" else host
    helper = _table(config, "credHelpers", path).get(host) or config.get("credsStore")
    if helper:
        found = _ask_helper(str(helper), server, path)
        if found is not None:
            return found
    for address, entry in _table(config, "auths", path).items():
        if address == server or _host_of(address) == host:
            return _from_entry(entry, address, path)
    return Credentials()


def _path() -> Path:
    return Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker") / "config.json"


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path} cannot be read", _reason(error), _LOG_IN) from error
    if not isinstance(config, dict):
        raise _malformed(path, "it is not a JSON object")
    return config


def _table(config: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    table = config.get(key) or {}
    if not isinstance(table, dict):
        raise _malformed(path, f"{key!r} is not an object")
    return table


def _host_of(address: str) -> str:
    """An entry's key may be an address such as ``https://registry.example.com/v2/``."""
    return address.partition("://")[2].partition("/")[0] if "://" in address else address.partition("/")[0]


def _from_entry(entry: Any, address: str, path: Path) -> Credentials:
    entry = entry if isinstance(entry, dict) else {}
    if entry.get("registrytoken"):
        return Credentials(bearer_token=str(entry["registrytoken"]))
    if entry.get("identitytoken"):
        return Credentials(refresh_token=str(entry["identitytoken"]))
    try:
        pair = base64.b64decode(str(entry.get("auth", "")), validate=True).decode("utf-8")
    except ValueError as error:
        raise _malformed(path, f"the entry of {address} is not base64") from error
    username, _, password = pair.rstrip("\0").partition(":")
    return Credentials(username, password)


def _ask_helper(name: str, server: str, path: Path) -> Credentials | None:
    """What a helper knows of a server; None if it knows nothing."""
    program = _program(name, path)
    try:
        done = subprocess.run(
            [program, "get"], input=server.encode(), capture_output=True, timeout=_HELPER_TIMEOUT_S
        )
    except FileNotFoundError as error:
        raise Missing(
            f"{program} is not installed", f"{path} asks for it", "install it, or correct the file"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise Missing(
            f"{program} does not answer", "it took too long", "run it by hand to see why"
        ) from error
    if done.returncode != 0:
        return None  # the protocol's way to say that there is no entry
    try:
        answer = json.loads(done.stdout)
        username, secret = str(answer["Username"]), str(answer["Secret"])
    except (ValueError, KeyError, TypeError) as error:
        raise Missing(
            f"{program} answers something else than the protocol says", "no user and secret", _LOG_IN
        ) from error
    if username == _IDENTITY_TOKEN_USER:
        return Credentials(refresh_token=secret)
    return Credentials(username, secret)


def _program(name: str, path: Path) -> str:
    if not _HELPER.fullmatch(name):
        raise _malformed(path, f"{name!r} cannot be the name of a credential helper")
    return f"docker-credential-{name}"


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else "") or str(error)


def _malformed(path: Path, why: str) -> BadInput:
    return BadInput(f"{path} cannot be used", why, _LOG_IN)
