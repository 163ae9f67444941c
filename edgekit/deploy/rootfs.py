"""An offline root file system, such as the one that is about to be flashed to a device.

What it says of itself is read from its files; nothing in it is executed, so its architecture does not matter.
Its links are followed as the device will follow them: an absolute one starts at its own root, and none leads
out of it.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from edgekit.errors import BadInput

_MAX_LINKS = 40
_MAX_TEXT_BYTES = 1024 * 1024

#: Debian's names of the processors, by the names that profiles and bundles use.
DEBIAN_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


@dataclass(frozen=True)
class RootFs:
    """A root file system of Debian's kind.

    Attributes:
        path: where it lies on this machine.
        distribution: what it calls itself, such as ``Ubuntu 20.04.6 LTS``.
        architecture: Debian's name of its processor: ``amd64``, ``arm64``.
        python: version of its ``/usr/bin/python3``, such as ``3.8``.
    """

    path: Path
    distribution: str
    architecture: str
    python: str

    def resolve(self, inside: str) -> Path:
        """Where a file of the device lies on this machine; see ``resolve``."""
        return resolve(self.path, inside)


def read(path: Path) -> RootFs:
    """Find out what a root file system is.

    Raises:
        BadInput: it is no directory, this machine's own root, or not a Debian or Ubuntu with systemd and
            Python 3.
    """
    if not path.is_dir():
        raise BadInput(f"{path} is not a directory", "there is nothing to provision", "give --rootfs a tree")
    root = path.resolve()
    if root == Path("/"):
        raise BadInput(
            "this machine's own root cannot be provisioned",
            "provisioning writes into a file system that is not running",
            "install the agent's package with apt, or give --rootfs the tree that will be flashed",
        )
    if not resolve(root, "/var/lib/dpkg/status").is_file():
        raise _unfit(path, "it has no /var/lib/dpkg/status")
    if not resolve(root, "/lib/systemd/systemd").exists():
        raise _unfit(path, "it has no systemd")
    return RootFs(root, _distribution(root), _architecture(path, root), _python(path, root))


def resolve(root: Path, inside: str) -> Path:
    """Where the path ``inside`` of a root file system lies on this machine, with all links followed.

    Parts that do not exist yet are taken as they are.

    Args:
        root: the root file system, itself without links.
        inside: an absolute path on the device.

    Raises:
        BadInput: the links go round in circles.
    """
    remaining = [part for part in inside.split("/") if part]
    current = root
    links = 0
    while remaining:
        part = remaining.pop(0)
        if part in (".", ".."):
            current = current if part == "." or current == root else current.parent
            continue
        candidate = current / part
        if not candidate.is_symlink():
            current = candidate
            continue
        links += 1
        if links > _MAX_LINKS:
            raise BadInput(
                f"{inside} cannot be found in {root}", "its links go round in circles", "mend them"
            )
        target = os.readlink(candidate)
        if target.startswith("/"):
            current = root
        remaining = [step for step in target.split("/") if step] + remaining
    return current


def _distribution(root: Path) -> str:
    found = re.search(r'^PRETTY_NAME="?([^"\n]*)"?$', _text(root, "/etc/os-release"), re.MULTILINE)
    return found[1] if found else "unknown"


def _architecture(path: Path, root: Path) -> str:
    """The architecture of the package manager itself, which is the tree's native one."""
    for paragraph in _text(root, "/var/lib/dpkg/status", limit_bytes=64 * _MAX_TEXT_BYTES).split("\n\n"):
        if re.search(r"^Package: dpkg$", paragraph, re.MULTILINE):
            found = re.search(r"^Architecture: (\S+)$", paragraph, re.MULTILINE)
            if found:
                return found[1]
    raise _unfit(path, "its package database does not list dpkg")


def _python(path: Path, root: Path) -> str:
    found = re.fullmatch(r"python(3\.\d+)", resolve(root, "/usr/bin/python3").name)
    if found is None or not resolve(root, "/usr/bin/python3").is_file():
        raise _unfit(path, "it has no /usr/bin/python3")
    return found[1]


def _text(root: Path, inside: str, limit_bytes: int = _MAX_TEXT_BYTES) -> str:
    path = resolve(root, inside)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return ""
        with path.open("rb") as stream:
            return stream.read(limit_bytes).decode("utf-8", errors="replace")
    except OSError:
        return ""


def _unfit(path: Path, why: str) -> BadInput:
    return BadInput(
        f"{path} cannot be provisioned",
        why,
        "give the root of a Debian or Ubuntu tree, such as the Linux_for_Tegra/rootfs of a release",
    )
