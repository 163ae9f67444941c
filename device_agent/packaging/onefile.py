"""The agent as one executable file, for devices without dpkg: an archive that Python runs (PEP 441).

It carries what the Debian package carries, without the units; ``bootstrap`` unpacks it at the first start.
The same sources and pins give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import zipfile
from pathlib import Path
from typing import Dict, List

from device_agent.packaging import bootstrap
from device_agent.packaging import site as sites
from device_agent.packaging.target import Target

NAME = "edgekit-agent"
_EARLIEST = (1980, 1, 1, 0, 0, 0)  # the format's; a time would make two builds differ
_LEVEL = 6


def build(target: Target, out: Path) -> Path:
    """Collect the wheels and make the file ``edgekit-agent-pyVERSION-MACHINE``.

    Args:
        target: the device.
        out: the directory for it.

    Raises:
        Missing: pip failed, or is not there.
    """
    with tempfile.TemporaryDirectory() as work:
        wheels, site = Path(work) / "wheels", Path(work) / "site"
        sites.collect(target, wheels)
        sites.unpack(target, wheels, site)
        return assemble(target, site, out)


def assemble(target: Target, site: Path, out: Path) -> Path:
    """Make the file around a directory with everything that the agent imports.

    Args:
        target: the device.
        site: that directory.
        out: as in :func:`build`.
    """
    files = {path.relative_to(site).as_posix(): path for path in _files(site)}
    about = {"python": target.python, "machine": target.machine, "digest": _digest(files)}
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{NAME}-py{target.python}-{target.machine}"
    with path.open("wb") as stream:
        stream.write(f"#!/usr/bin/env python{target.python}\n".encode("ascii"))
        with zipfile.ZipFile(stream, "w") as archive:
            _add(archive, "__main__.py", Path(bootstrap.__file__).read_bytes())
            _add(archive, bootstrap.TARGET_NAME, json.dumps(about, sort_keys=True).encode("ascii"))
            for name, source in files.items():
                _add(archive, bootstrap.SITE_PREFIX + name, source.read_bytes())
    path.chmod(0o755)
    return path


def _files(site: Path) -> List[Path]:
    return sorted(p for p in site.rglob("*") if p.is_file() and "__pycache__" not in p.parts)


def _digest(files: Dict[str, Path]) -> str:
    whole = hashlib.sha256()
    for name, path in files.items():
        whole.update(f"{name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    entry = zipfile.ZipInfo(name, _EARLIEST)
    entry.external_attr = 0o644 << 16
    archive.writestr(entry, data, zipfile.ZIP_DEFLATED, _LEVEL)
