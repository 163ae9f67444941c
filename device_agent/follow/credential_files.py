"""Passwords and tokens from files that nobody else can read."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from device_agent.errors import BadInput
from device_agent.follow.settings import Follow
from device_agent.manifest import open_regular
from device_agent.oci.authorization import Credentials

_MAX_SECRET_BYTES = 64 * 1024
_FORBIDDEN = stat.S_IWGRP | stat.S_IROTH | stat.S_IWOTH


def credentials(follow: Follow) -> Credentials:
    """Read the credentials of a follower; they are read at each look, so a file that is replaced counts.

    Raises:
        BadInput: a file is missing, empty, or open to others.
    """
    if follow.token_file:
        return Credentials(bearer_token=_read(Path(follow.token_file)))
    if follow.password_file:
        return Credentials(follow.username, _read(Path(follow.password_file)))
    return Credentials()


def _read(path: Path) -> str:
    try:
        with open_regular(path, follow_links=True) as stream:
            mode = os.fstat(stream.fileno()).st_mode
            text = stream.read(_MAX_SECRET_BYTES).decode("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"the secret in {path} cannot be read", str(error), "make it a text file that the agent may read"
        ) from error
    if mode & _FORBIDDEN:
        raise BadInput(
            f"the secret in {path} is none",
            f"its mode {stat.S_IMODE(mode):04o} lets others read or change it",
            f"chmod 0600 {path}, or 0640 with the agent's group",
        )
    if not text or not text.isprintable():
        raise BadInput(f"{path} holds no secret", "it is empty or not one line", "write the secret into it")
    return text
