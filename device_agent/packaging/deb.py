"""The Debian package: the agent with all that it imports, its units, its user and its configuration.

It needs nothing from the device but Python, systemd and the C library, so that ``dpkg -i`` works without a
network. The same sources and pins give the same bytes (``SOURCE_DATE_EPOCH``).
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import tempfile
from email.utils import formatdate
from pathlib import Path
from typing import Dict, Iterable, Optional

from device_agent import __version__
from device_agent.errors import Missing
from device_agent.packaging import site as sites
from device_agent.packaging.target import GLIBC_MINOR, Target

PACKAGE = "edgekit-agent"
SITE = "/usr/lib/edgekit-agent/site"
UNITS = (
    "edgekit-agent.service",
    "edgekit-agent.socket",
    "edgekit-agent-metrics.socket",
    "edgekit-agent-control.socket",
    "edgekit-agent-grpc.socket",
)
MAINTAINER = "edgekit developers <edgekit@localhost>"

_DATA = sites.SOURCES / "packaging" / "debian"
_UNITS = sites.SOURCES / "systemd" / "units"
_SCRIPTS = ("postinst", "prerm", "postrm")
_DEFAULT_EPOCH = 1_767_225_600  # 2026-01-01; any fixed day makes the bytes depend on the sources alone

_COMMAND = """#!{python} -I
import sys

sys.path.insert(0, "{site}")
from device_agent.cli import main

sys.exit(main())
"""

_CONTROL = """Package: {package}
Version: {version}
Architecture: {architecture}
Maintainer: {maintainer}
Installed-Size: {size_kib}
Depends: {python}, systemd (>= 245), libc6 (>= 2.{glibc}), libstdc++6, libgcc-s1
Section: net
Priority: optional
Description: serves signed machine-learning models on an edge device
 The agent speaks the Open Inference Protocol v2 (KServe, Triton) over HTTP and
 gRPC, installs signed bundles behind a self-test, and returns to the version
 before when a new one does not hold. It carries its own ONNX Runtime and NumPy.
"""


def build(target: Target, out: Path, version: Optional[str] = None) -> Path:
    """Collect the wheels and build the package.

    Args:
        target: the device.
        out: the directory for ``edgekit-agent_VERSION_ARCHITECTURE.deb``.
        version: the package's version; None: the agent's, and the Python that it is for.

    Raises:
        Missing: pip or dpkg-deb failed, or is not there.
    """
    with tempfile.TemporaryDirectory() as work:
        wheels, site = Path(work) / "wheels", Path(work) / "site"
        sites.collect(target, wheels)
        sites.unpack(target, wheels, site)
        return assemble(target, site, out, version)


def assemble(target: Target, site: Path, out: Path, version: Optional[str] = None) -> Path:
    """Build the package around a directory with everything that the agent imports.

    Args:
        target: the device.
        site: that directory; it is copied.
        out: as in :func:`build`.
        version: as in :func:`build`.

    Raises:
        Missing: dpkg-deb failed, or is not there.
    """
    version = version or f"{__version__}+py{target.python}"
    epoch = int(os.environ.get("SOURCE_DATE_EPOCH", _DEFAULT_EPOCH))
    with tempfile.TemporaryDirectory() as work:
        root = Path(work) / "root"
        shutil.copytree(str(site), str(root) + SITE, ignore=shutil.ignore_patterns("__pycache__"))
        _add_files(root, target)
        _add_documentation(root, version, epoch)
        _normalize(root)
        _add_control(root, target, version)
        out.mkdir(parents=True, exist_ok=True)
        package = out / f"{PACKAGE}_{version}_{target.architecture}.deb"
        _pack(root, package, epoch)
    return package


def _interpreter(target: Target) -> str:
    return f"/usr/bin/python{target.python}"


def _add_files(root: Path, target: Target) -> None:
    command = _COMMAND.format(python=_interpreter(target), site=SITE)
    _write(root / "usr/bin/edgekit-agent", command, 0o755)
    for unit in UNITS:
        _write(root / "lib/systemd/system" / unit, (_UNITS / unit).read_text(encoding="utf-8"))
    _write(root / "usr/share/edgekit-agent/gpu.conf", (_UNITS / "gpu.conf").read_text(encoding="utf-8"))
    sysusers = (_DATA / "sysusers.conf").read_text(encoding="utf-8")
    _write(root / "usr/lib/sysusers.d/edgekit-agent.conf", sysusers)
    _write(root / "etc/edgekit/agent.toml", (_DATA / "agent.toml").read_text(encoding="utf-8"))
    (root / "etc/edgekit/keys").mkdir()


def _add_documentation(root: Path, version: str, epoch: int) -> None:
    directory = root / "usr/share/doc" / PACKAGE
    names = sorted(path.name[: -len(".dist-info")] for path in Path(str(root) + SITE).glob("*.dist-info"))
    carried = "".join(f" {name}\n" for name in names)
    _write(
        directory / "copyright",
        "edgekit-agent is licensed under the Apache License 2.0 (/usr/share/common-licenses/Apache-2.0).\n"
        f"The package also carries the following, each with its license in {SITE}/NAME.dist-info:\n{carried}",
    )
    entry = (
        f"{PACKAGE} ({version}) unstable; urgency=medium\n\n  * Built from edgekit {__version__}.\n\n"
        f" -- {MAINTAINER}  {formatdate(epoch)}\n"
    )
    path = directory / "changelog.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(entry.encode(), 9, mtime=0))


def _add_control(root: Path, target: Target, version: str) -> None:
    """Write the package's own files: control, conffiles, digests and the maintainer scripts."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    control = _CONTROL.format(
        package=PACKAGE,
        version=version,
        architecture=target.architecture,
        maintainer=MAINTAINER,
        size_kib=_size_kib(files),
        python=f"python{target.python}",
        glibc=GLIBC_MINOR,
    )
    digests = "".join(f"{_md5(path)}  {path.relative_to(root)}\n" for path in files)
    _write(root / "DEBIAN/control", control)
    _write(root / "DEBIAN/conffiles", "/etc/edgekit/agent.toml\n")
    _write(root / "DEBIAN/md5sums", digests)
    values = {"@PYTHON@": _interpreter(target), "@SITE@": SITE}
    for script in _SCRIPTS:
        _write(root / "DEBIAN" / script, _filled((_DATA / script).read_text(encoding="utf-8"), values), 0o755)


def _filled(text: str, values: Dict[str, str]) -> str:
    for name, value in values.items():
        text = text.replace(name, value)
    return text


def _normalize(root: Path) -> None:
    """The same permissions whatever the umask of who builds, and whatever the wheels say."""
    executable = {root / "usr/bin/edgekit-agent"}
    for path in [root, *root.rglob("*")]:
        path.chmod(0o755 if path.is_dir() or path in executable else 0o644)


def _size_kib(files: Iterable[Path]) -> int:
    return sum(-(-path.stat().st_size // 1024) for path in files)


def _md5(path: Path) -> str:
    digest = hashlib.md5()  # noqa: S324 - the format's; dpkg looks for decay with it, not for attackers
    with path.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _write(path: Path, text: str, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.parent.chmod(0o755)
    path.chmod(mode)


def _pack(root: Path, package: Path, epoch: int) -> None:
    # xz, since dpkg on Debian 11 does not know zstd.
    command = ["dpkg-deb", "--root-owner-group", "-Zxz", "--build", str(root), str(package)]
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch)}
    for path in [root, *root.rglob("*")]:
        os.utime(str(path), (epoch, epoch))
    try:
        done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    except FileNotFoundError as error:
        raise Missing(
            "dpkg-deb is not on this machine", "it packs the files", "install the package dpkg"
        ) from error
    if done.returncode != 0:
        raise Missing(
            "dpkg-deb failed", done.stderr.decode(errors="replace").strip(), "see that there is space left"
        )
