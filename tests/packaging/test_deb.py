"""The agent's Debian package and its units, looked at with the tools that devices use."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from device_agent.errors import BadInput
from device_agent.packaging import deb
from device_agent.packaging.site import SOURCES, UNUSED, requirements
from device_agent.packaging.target import Target

UNITS = SOURCES / "systemd" / "units"

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="there is no dpkg-deb here")
needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze here"
)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package around a stand-in for the directory of imports."""
    return assemble(tmp_path_factory.mktemp("package"))


def assemble(directory: Path) -> Path:
    """Build a package in a directory."""
    site = directory / "site"
    (site / "device_agent").mkdir(parents=True)
    (site / "device_agent" / "__init__.py").write_text("")
    (site / "numpy-1.24.4.dist-info").mkdir()
    return deb.assemble(Target("arm64", "3.8"), site, directory / "out")


def field(package: Path, name: str) -> str:
    """A field of the package's control file."""
    return subprocess.run(
        ["dpkg-deb", "--field", package, name], check=True, capture_output=True, text=True
    ).stdout.strip()


def unpack(package: Path, target: Path) -> Path:
    """The package's files and, under DEBIAN, its own."""
    subprocess.run(["dpkg-deb", "--raw-extract", package, target], check=True)
    return target


@needs_dpkg
def test_the_package_says_what_it_is_for(package: Path) -> None:
    """The device refuses it on another processor, and without the Python that its libraries are built for."""
    assert package.name == f"edgekit-agent_{field(package, 'Version')}_arm64.deb"
    assert field(package, "Architecture") == "arm64"
    assert "python3.8," in field(package, "Depends")


@needs_dpkg
def test_the_package_holds_what_a_device_needs(package: Path, tmp_path: Path) -> None:
    """The command, the units, the user, the configuration as a conffile, and digests that are right."""
    root = unpack(package, tmp_path / "root")
    command = root / "usr/bin/edgekit-agent"
    assert command.read_text().startswith("#!/usr/bin/python3.8 -I\n")
    assert command.stat().st_mode & 0o777 == 0o755
    for unit in deb.UNITS:
        assert (root / "lib/systemd/system" / unit).is_file()
    assert (root / "etc/edgekit/keys").is_dir()
    assert (root / "DEBIAN/conffiles").read_text() == "/etc/edgekit/agent.toml\n"
    for line in (root / "DEBIAN/md5sums").read_text().splitlines():
        digest, path = line.split("  ")
        assert hashlib.md5((root / path).read_bytes()).hexdigest() == digest
    assert "numpy-1.24.4" in (root / "usr/share/doc/edgekit-agent/copyright").read_text()


@needs_dpkg
def test_the_maintainer_scripts_are_shell_without_gaps(package: Path, tmp_path: Path) -> None:
    """Every placeholder is filled in, and sh can parse what runs as root on the device."""
    root = unpack(package, tmp_path / "root")
    for script in ("postinst", "prerm", "postrm"):
        path = root / "DEBIAN" / script
        assert not re.search(r"@[A-Z]+@", path.read_text())
        assert path.stat().st_mode & 0o777 == 0o755
        subprocess.run(["sh", "-n", path], check=True)


@needs_dpkg
def test_the_same_sources_give_the_same_package(package: Path, tmp_path: Path) -> None:
    """Two builds are equal byte for byte."""
    assert assemble(tmp_path).read_bytes() == package.read_bytes()


def test_every_python_gets_the_versions_that_run_on_it() -> None:
    """Pins are chosen for the device's Python, not for the one that builds; tools' dependencies stay out."""
    old, new = requirements(Target("arm64", "3.8")), requirements(Target("amd64", "3.11"))
    assert {"numpy==1.24.4", "onnxruntime==1.19.2", "tomli==2.5.0"} <= set(old)
    assert not any(line.startswith(("tomli", "numpy==1")) for line in new)
    assert not any(line.split("==")[0] in UNUSED for line in old + new)


@pytest.mark.parametrize(("architecture", "python"), [("riscv64", "3.11"), ("arm64", "3.7"), ("arm64", "3")])
def test_a_device_that_the_agent_does_not_run_on_is_refused(architecture: str, python: str) -> None:
    """An unknown processor or a Python before 3.8 is an error before anything is fetched."""
    with pytest.raises(BadInput, match="cannot be packed for"):
        Target(architecture, python)


# Units


def units(directory: Path, *, gpu: bool = False) -> Path:
    """A copy of the units whose command exists on this machine; the path of the service."""
    for path in UNITS.glob("edgekit-agent*"):
        (directory / path.name).write_text(path.read_text().replace("/usr/bin/edgekit-agent", "/bin/true"))
    if gpu:
        (directory / "edgekit-agent.service.d").mkdir()
        shutil.copy(UNITS / "gpu.conf", directory / "edgekit-agent.service.d")
    return directory / "edgekit-agent.service"


@needs_systemd
def test_systemd_takes_every_unit_as_it_is(tmp_path: Path) -> None:
    """systemd-analyze verify has nothing to say, so no line is mistyped or ignored."""
    service = units(tmp_path)
    done = subprocess.run(
        ["systemd-analyze", "verify", service, *tmp_path.glob("*.socket")], capture_output=True, text=True
    )
    about_ours = [line for line in done.stderr.splitlines() if "edgekit" in line]
    assert (done.returncode, about_ours) == (0, [])


@needs_systemd
@pytest.mark.parametrize(("gpu", "most"), [(False, 2.0), (True, 2.5)])
def test_the_sandbox_is_as_tight_as_is_said(tmp_path: Path, gpu: bool, most: float) -> None:
    """The exposure that systemd-analyze security works out stays within docs/systemd.md's figure."""
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", units(tmp_path, gpu=gpu)],
        capture_output=True,
        text=True,
    )
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert found is not None, done.stderr
    assert float(found[1]) <= most
