"""Unix-domain sockets: who may connect is decided by the file's mode, and a stale one is replaced."""

from __future__ import annotations

import asyncio
import os
import pwd
import socket
import stat
import struct
import sys
from pathlib import Path
from typing import Any, Callable, Dict

from device_agent.errors import BadInput, Refused

_BACKLOG = 1024


def bind(path: Path, mode: int, key: str) -> socket.socket:
    """Make a socket that can be listened on; no process with less than ``mode`` can ever connect.

    A missing parent directory is created, for its owner alone if the socket is; a socket that no process
    listens on is replaced.

    Args:
        path: where the socket is made.
        mode: the file's permissions; connecting needs the right to write.
        key: the configuration's name for it, for errors.

    Raises:
        Refused: another agent answers there.
        BadInput: something else than a socket is in the way, or the path cannot be used.
    """
    try:
        if not path.parent.is_dir():
            path.parent.mkdir(mode=0o755 if mode & 0o077 else 0o700, parents=True)
        _remove_stale(path, key)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # On Linux the socket's own mode, less the umask, becomes the file's: it is never too open.
            os.fchmod(listener.fileno(), mode)
            listener.bind(str(path))
            path.chmod(mode)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise BadInput(
            f"the socket {path} cannot be made",
            error.strerror or str(error),
            f"set {key} in the agent's configuration to a path that it may write",
        ) from error
    return listener


async def serve(
    protocol: Callable[[], asyncio.BaseProtocol], listener: socket.socket, *, keep: bool = False
) -> asyncio.Server:
    """Listen on a Unix socket.

    Args:
        protocol: makes one for each connection.
        listener: the socket.
        keep: leave its file where it is when the server closes.
    """
    loop = asyncio.get_running_loop()
    return await loop.create_unix_server(protocol, sock=listener, backlog=_BACKLOG, **unlinked(keep))


def unlinked(keep: bool) -> Dict[str, Any]:
    """How asyncio is told to ``keep`` a Unix socket's file: Python 3.13 and later remove it by themselves."""
    return {"cleanup_socket": False} if keep and sys.version_info >= (3, 13) else {}


def _remove_stale(path: Path, key: str) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise BadInput(
            f"the socket {path} cannot be made",
            "something else is there",
            f"move it away, or set another {key}",
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise Refused(
        f"another agent answers on {path}",
        "two agents cannot share a socket, nor a store",
        "stop it before starting this one",
    )


def peer_of(connection: socket.socket) -> str:
    """Who is at the other end of a Unix socket, for the log: the user's name and the process."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    process, user, _ = struct.unpack("3i", credentials)
    try:
        name = pwd.getpwuid(user).pw_name
    except KeyError:
        name = str(user)
    return f"{name} (process {process})"
