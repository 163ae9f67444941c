"""Put the agent, its keys, its configuration and a bundle into a root file system before it is flashed.

The agent's Debian package is installed by dpkg, from outside: nothing of the tree is executed, so that an
aarch64 tree is provisioned on an x86-64 machine, and the device's own package manager knows the agent
afterwards and can upgrade it. The package's maintainer scripts are written for that (``DPKG_ROOT``, see
``dpkg(1)``). The bundle is installed by the agent itself at its first start: only there can it prove that it
reproduces its golden outputs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from device_agent import archive, signature
from device_agent.keys import load_public_key
from device_agent.manifest import Manifest
from edgekit.bundle import OpenBundle, bundle_errors, open_bundle, write_atomically
from edgekit.deploy import rootfs as trees
from edgekit.deploy.rootfs import DEBIAN_ARCHITECTURES, RootFs
from edgekit.errors import BadInput, Missing

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KEYS = "/etc/edgekit/keys"
CONFIG = "/etc/edgekit/agent.toml"
STATE = "/var/lib/edgekit-agent"
USER = "edgekit"

#: Where the package writes. A link that leads elsewhere from here than on the device would mislead dpkg.
_WRITTEN = ("/etc/edgekit", "/etc/systemd/system", "/lib/systemd/system", "/usr/bin", "/usr/lib", STATE)
_DPKG_TIMEOUT_S = 600


@dataclass(frozen=True)
class Provisioned:
    """What a root file system holds now.

    Attributes:
        rootfs: where it lies on this machine.
        distribution: what it calls itself.
        architecture: Debian's name of its processor.
        agent: version of the agent's package.
        model: the model's name.
        digest: the bundle.
        keys: names of the keys that the device trusts.
    """

    rootfs: str
    distribution: str
    architecture: str
    agent: str
    model: str
    digest: str
    keys: list[str]


@dataclass(frozen=True)
class Package:
    """The agent's Debian package.

    Attributes:
        path: the file.
        version: its version.
        architecture: the processor that it is for.
    """

    path: Path
    version: str
    architecture: str


def provision(
    rootfs: Path,
    bundle: Path,
    keys: Sequence[Path],
    agent: Path,
    config: Path | None,
    progress: Callable[[str], None],
) -> Provisioned:
    """Make a root file system that comes up serving a bundle.

    Everything is checked before anything is written, and running it again ends what an interruption left.

    Args:
        rootfs: the root of a Debian or Ubuntu tree that is not running, of any architecture.
        bundle: directory or single file, signed by one of ``keys``.
        keys: public keys that the device shall trust.
        agent: the agent's Debian package, for the tree's architecture and Python.
        config: the agent's configuration; None: the package's own.
        progress: called with what is done.

    Raises:
        BadInput: a tree, bundle, key, package or configuration that does not fit; not run as root.
        Missing: this machine has no dpkg.
    """
    if not keys:
        raise BadInput("no key was given", "the device would trust nobody", "give --key RELEASE.pub")
    tree = trees.read(rootfs)
    _require_same_paths(tree)
    package = _fitting(read_package(agent), tree)
    settings = None if config is None else _read_config(config)
    with open_bundle(bundle) as opened, bundle_errors():
        signature.authenticate(archive.read_head(opened.directory), [load_public_key(key) for key in keys])
        _require_processor(tree, opened.manifest)
        if os.geteuid() != 0:
            raise BadInput(
                "provisioning needs root",
                "the files of a root file system belong to root",
                "run it with sudo",
            )
        progress(f"installing {package.path.name} into {tree.distribution}")
        _install_package(package, tree)
        for key in keys:
            progress(f"trusting {key.name}")
            _write(tree.resolve(f"{KEYS}/{key.stem}.pub"), key.read_bytes())
        if settings is not None:
            _write(tree.resolve(CONFIG), settings)
        progress(f"adding {opened.manifest.name} {opened.digest[:12]}")
        _add_bundle(tree, opened)
        return Provisioned(
            str(tree.path),
            tree.distribution,
            tree.architecture,
            package.version,
            opened.manifest.name,
            opened.digest,
            [key.stem for key in keys],
        )


def find_package(directory: Path, rootfs: Path) -> Path:
    """The newest package of the agent in ``directory`` that is made for a tree's architecture and Python.

    Raises:
        BadInput: the tree cannot be provisioned.
        Missing: there is none.
    """
    tree = trees.read(rootfs)
    fitting = sorted(
        directory.glob(f"edgekit-agent_*_{tree.architecture}.deb"), key=lambda path: path.stat().st_mtime
    )
    if not fitting:
        raise Missing(
            f"there is no agent for {tree.distribution}",
            f"{directory} holds no edgekit-agent_*_{tree.architecture}.deb",
            f"`make deb DEB_ARCH={tree.architecture} DEB_PYTHON={tree.python}`, or give --agent",
        )
    return fitting[-1]


def read_package(path: Path) -> Package:
    """Read what a Debian package says of itself.

    Raises:
        BadInput: it is no package of the agent.
        Missing: this machine has no dpkg.
    """
    fields = ["Package", "Version", "Architecture"]
    done = _run(
        ["dpkg-deb", "--show", "--showformat", "\\n".join(f"${{{field}}}" for field in fields), str(path)]
    )
    name, version, architecture = [*done.stdout.splitlines(), "", "", ""][:3]
    if done.returncode != 0 or name != "edgekit-agent":
        why = (done.stderr.strip().splitlines() or [f"it holds {name!r}"])[-1]
        raise BadInput(f"{path} is not the agent's package", why, "make one with `make deb`")
    return Package(path, version, architecture)


def _fitting(package: Package, tree: RootFs) -> Package:
    if package.architecture not in (tree.architecture, "all"):
        raise BadInput(
            f"{package.path} does not fit {tree.path}",
            f"it is for {package.architecture}, and the tree is {tree.architecture}",
            f"make one with `make deb DEB_ARCH={tree.architecture} DEB_PYTHON={tree.python}`",
        )
    return package


def _install_package(package: Package, tree: RootFs) -> None:
    """Let dpkg install the package; one that cannot be configured is taken away again."""
    dpkg = ["dpkg", f"--root={tree.path}", "--force-script-chrootless"]
    known = _run([*dpkg, "--status", "edgekit-agent"]).returncode == 0
    done = _run([*dpkg, "--force-architecture", "--force-confold", "--install", str(package.path.resolve())])
    if done.returncode == 0:
        return
    if not known:
        _run([*dpkg, "--purge", f"edgekit-agent:{package.architecture}"])
    said = [line.strip() for line in done.stderr.splitlines() if "warning" not in line]
    raise BadInput(
        f"{package.path.name} could not be installed into {tree.path}",
        " ".join(said[:4]) or f"dpkg ended with {done.returncode}",
        f"the tree has Python {tree.python}: make the package for it with DEB_PYTHON={tree.python}",
    )


def _add_bundle(tree: RootFs, opened: OpenBundle) -> None:
    """Leave the bundle for the agent's first start."""
    directory = tree.resolve(f"{STATE}/provisioned")
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / f"{opened.manifest.name}{archive.SUFFIX}"
    archive.pack(opened.directory, target)
    user = _user(tree)
    if user is not None:
        for path in (directory.parent, directory, target):
            os.chown(path, *user)


def _user(tree: RootFs) -> tuple[int, int] | None:
    """The numbers of the agent's user and its group in the tree."""
    for line in tree.resolve("/etc/passwd").read_text(encoding="utf-8").splitlines():
        fields = line.split(":")
        if fields[0] == USER and len(fields) > 3 and fields[2].isdecimal() and fields[3].isdecimal():
            return int(fields[2]), int(fields[3])
    return None


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data)
    path.chmod(0o644)


def _require_same_paths(tree: RootFs) -> None:
    for inside in _WRITTEN:
        here, there = Path(os.path.realpath(str(tree.path) + inside)), tree.resolve(inside)
        if here != there:
            raise BadInput(
                f"{tree.path} cannot be provisioned",
                f"{inside} is reached by an absolute link, which leads out of the tree from here",
                "make that link relative",
            )


def _require_processor(tree: RootFs, manifest: Manifest) -> None:
    wanted = DEBIAN_ARCHITECTURES.get(manifest.architecture, manifest.architecture)
    if wanted != tree.architecture:
        raise BadInput(
            f"{manifest.name} does not fit {tree.path}",
            f"it was made for {manifest.profile} ({wanted}), and the tree is {tree.architecture}",
            "give the bundle that was compressed with the device's profile",
        )


def _read_config(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        tomllib.loads(data.decode("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadInput(f"{path} cannot be used", str(error), "give --config a TOML file") from error
    return data


def _run(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_DPKG_TIMEOUT_S,
            env={**os.environ, "LC_ALL": "C"},
        )
    except FileNotFoundError as error:
        raise Missing(
            f"{argv[0]} is not on this machine", "the agent's package is made for dpkg", "apt install dpkg"
        ) from error
