"""Temporary directories that a process which is killed does not leave behind for ever.

Each is locked for as long as its process lives, however that ends, and the next agent that starts deletes
those that nobody holds. systemd-tmpfiles, which deletes old temporary files, leaves locked directories alone.

Python 3.8.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

_NAME = re.compile(r"edgekit-(grpc|measure|upload)-[a-z0-9_]{8}")  # the end is tempfile's

_log = logging.getLogger(__name__)


class OwnDirectory:
    """A temporary directory of this process, which nobody else may enter.

    Attributes:
        path: where it is.
    """

    def __init__(self, use: str) -> None:
        """Make it.

        Args:
            use: what for; one of those in ``_NAME``.

        Raises:
            OSError: there is no place for temporary files, or no space.
        """
        made = tempfile.mkdtemp(prefix="edgekit-new-")  # mode 0700
        self._descriptor = os.open(made, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with suppress(OSError):  # a file system without locks, where nothing is cleared either
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        # It gets the name that is looked for when it is locked: another agent may start meanwhile.
        self.path = Path(made.replace("edgekit-new-", f"edgekit-{use}-"))
        os.rename(made, str(self.path))

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Delete it, and what is in it."""
        shutil.rmtree(str(self.path), ignore_errors=True)
        os.close(self._descriptor)


def clear_abandoned() -> None:
    """Delete the directories of this user's processes that were killed."""
    try:
        names = os.listdir(tempfile.gettempdir())
    except OSError:
        return  # where nothing can be kept, nothing was left
    for name in filter(_NAME.fullmatch, names):
        _clear(Path(tempfile.gettempdir(), name))


def _clear(path: Path) -> None:
    try:
        descriptor = os.open(str(path), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return  # another user's, or none of ours
    try:
        found = os.fstat(descriptor)
        if found.st_uid == os.geteuid() and stat.S_IMODE(found.st_mode) == 0o700:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(str(path), ignore_errors=True)
            _log.info("%s was deleted: the process that made it was killed", path)
    except OSError:
        pass  # it is in use
    finally:
        os.close(descriptor)
