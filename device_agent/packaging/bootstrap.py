"""The first module of the one-file executable: unpack what it carries once, then run the command.

Native libraries cannot be loaded out of an archive. What the file carries goes to a directory of its own in
the cache (``CACHE_DIRECTORY``, which systemd sets, ``XDG_CACHE_HOME`` or ``~/.cache``), named after its
digest: a new version of the file gets a new directory, and removes old ones that no process uses. Only the
calling user can write there. It is complete or absent, also after a power cut, and when two processes start
at once one of them unpacks while the other waits.

Standard library only, and nothing of the agent: it is not importable yet. Python 3.8.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import stat
import sys
import zipfile
from pathlib import Path
from typing import Dict, Mapping

TARGET_NAME = "target.json"
SITE_PREFIX = "site/"

_EXIT_MISSING = 4
_PRIVATE = 0o700


class CannotStart(Exception):
    """What, why and what to do, in three lines."""


def main() -> None:
    """Run the command ``edgekit-agent`` out of the file that this process was started with."""
    archive = Path(sys.argv[0]).absolute()
    if not sys.flags.isolated:  # the user's own packages, or a variable, must not change what is imported
        os.execv(sys.executable, [sys.executable, "-I", str(archive), *sys.argv[1:]])  # noqa: S606 - no shell
    try:
        target = _read_target(archive)
        _require(target)
        site = unpacked(archive, target["digest"], cache_of(os.environ))
    except (CannotStart, OSError) as error:
        sys.exit(_fail(error))
    sys.path[0] = str(site)
    from device_agent.cli import main as command

    sys.exit(command())


def cache_of(environment: Mapping[str, str]) -> Path:
    """The directory under which everything is unpacked; it need not exist.

    Raises:
        CannotStart: the user has no home, and no variable names a directory.
    """
    for variable in ("CACHE_DIRECTORY", "XDG_CACHE_HOME"):
        value = environment.get(variable, "").split(":")[0]
        if os.path.isabs(value):
            return Path(value) / "edgekit-agent"
    home = os.path.expanduser("~")
    if not os.path.isdir(home):
        raise CannotStart(
            "edgekit-agent cannot be unpacked\n"
            "this user has no home directory\n"
            "set XDG_CACHE_HOME to a directory"
        )
    return Path(home) / ".cache" / "edgekit-agent"


def unpacked(archive: Path, digest: str, cache: Path) -> Path:
    """Unpack the archive's site, or find it unpacked; it stays while this process lives.

    Args:
        archive: the one-file executable.
        digest: of what it carries.
        cache: where to; made with mode 0700.

    Returns:
        The directory to import from.

    Raises:
        CannotStart: somebody else can write in the cache.
        OSError: it cannot be written.
    """
    cache.mkdir(mode=_PRIVATE, parents=True, exist_ok=True)
    _require_private(cache)
    site = cache / digest
    lock = _open_lock(cache, digest)  # stays open, shared, until this process ends
    fcntl.flock(lock, fcntl.LOCK_SH)
    while not site.is_dir():
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not site.is_dir():
            _unpack(archive, cache / f"{digest}.partial", site)
        fcntl.flock(lock, fcntl.LOCK_SH)  # gives it up for a moment, so another may remove it again
    _remove_others(cache, digest)
    return site


def _open_lock(cache: Path, digest: str) -> int:
    return os.open(str(cache / f"{digest}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _unpack(archive: Path, partial: Path, site: Path) -> None:
    shutil.rmtree(str(partial), ignore_errors=True)  # of a process that was killed
    partial.mkdir(mode=_PRIVATE)
    try:
        with zipfile.ZipFile(str(archive)) as content:
            for entry in content.infolist():
                if entry.filename.startswith(SITE_PREFIX):
                    _extract(content, entry, partial / entry.filename[len(SITE_PREFIX) :])
        os.sync()  # thousands of small files: one call for all
        os.rename(str(partial), str(site))
    except BaseException:
        shutil.rmtree(str(partial), ignore_errors=True)
        raise


def _extract(content: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with content.open(entry) as source, path.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)


def _remove_others(cache: Path, digest: str) -> None:
    """Remove other versions that no process uses; their locks stay, being empty."""
    for path in cache.glob("*.lock"):
        other, partial = path.with_suffix(""), path.with_suffix(".partial")
        if other.name == digest or not (other.is_dir() or partial.is_dir()):
            continue
        lock = os.open(str(path), os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(str(partial), ignore_errors=True)
            if other.is_dir():
                os.rename(str(other), str(partial))  # at once, so that it is never there in part
                shutil.rmtree(str(partial), ignore_errors=True)
        except BlockingIOError:
            pass  # it runs
        finally:
            os.close(lock)


def _require_private(cache: Path) -> None:
    found = os.stat(str(cache))
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o022:
        raise CannotStart(
            "edgekit-agent cannot be unpacked\n"
            f"others can write in {cache}, and so change what would run\n"
            "remove that directory, or set XDG_CACHE_HOME to one of your own"
        )


def _read_target(archive: Path) -> Dict[str, str]:
    with zipfile.ZipFile(str(archive)) as content:
        target: Dict[str, str] = json.loads(content.read(TARGET_NAME).decode("ascii"))
    return target


def _require(target: Mapping[str, str]) -> None:
    here = {"python": f"{sys.version_info[0]}.{sys.version_info[1]}", "machine": platform.machine()}
    for kind, value in here.items():
        if value != target[kind]:
            raise CannotStart(
                f"this edgekit-agent is for another {kind}\n"
                f"it carries libraries for {target[kind]}, and this is {value}\n"
                "make one for this device: make zipapp DEB_ARCH=... DEB_PYTHON=..."
            )


def _fail(error: Exception) -> int:
    if isinstance(error, OSError):
        error = CannotStart(
            f"edgekit-agent cannot be unpacked\n{error}\nset XDG_CACHE_HOME to a directory with space left"
        )
    print(error, file=sys.stderr)
    return _EXIT_MISSING


if __name__ == "__main__":
    main()
