"""Programs and files outside of Python that some commands need."""

from __future__ import annotations

import shutil
import ssl
from pathlib import Path

from edgekit.docker_config import helper_programs
from edgekit.doctor.finding import Finding
from edgekit.errors import BadInput

#: Program -> what needs it, and how a Debian gets it.
_PROGRAMS = {
    "ssh": ("devices over SSH: deploy, fleet, --measure-on", "apt install openssh-client"),
    "dpkg": ("edgekit provision", "apt install dpkg"),
    "git": ("the revision in the record of a training run", "apt install git"),
}


def look() -> list[Finding]:
    """A line each."""
    return [*(program(name, use, fix) for name, (use, fix) in _PROGRAMS.items()), registries()]


def program(name: str, use: str, fix: str) -> Finding:
    """Whether a program is on the PATH."""
    found = shutil.which(name)
    return Finding(name, "ok", f"{found}: {use}") if found else Finding(name, "absent", f"for {use}", fix)


def registries() -> Finding:
    """Whether push and pull find authorities to trust, and the programs that keep their passwords."""
    try:
        lost = [name for name in helper_programs() if shutil.which(name) is None]
    except BadInput as error:
        return Finding("registries", "warning", f"{error.what}: {error.why}", error.fix)
    if lost:
        why = f"{', '.join(lost)} is not installed, and keeps the passwords"
        return Finding("registries", "warning", why, "install it, or correct Docker's config.json")
    if not _has_authorities():
        detail = "no certificates of authorities: push and pull trust no registry"
        return Finding("registries", "warning", detail, "apt install ca-certificates, or give --ca-file FILE")
    return Finding("registries", "ok", "push and pull")


def _has_authorities() -> bool:
    paths = ssl.get_default_verify_paths()  # those that exist
    return bool(paths.cafile) or bool(paths.capath and any(Path(paths.capath).iterdir()))
