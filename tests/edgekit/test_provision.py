"""Provisioning of an offline root file system, with a real dpkg; tests/system boots what comes of it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_deploy import make_bundle

from edgekit import bundle, sign
from edgekit.deploy import provision as job
from edgekit.deploy import rootfs
from edgekit.errors import BadInput, Missing

needs_dpkg = pytest.mark.skipif(
    shutil.which("dpkg") is None or os.geteuid() != 0, reason="needs dpkg, and root to own the files"
)
STATUS = """\
Package: dpkg
Status: install ok installed
Architecture: {architecture}
Maintainer: nobody <nobody@example.org>
Version: 1.21.22
Description: the package manager

Package: python3
Status: install ok installed
Architecture: {architecture}
Multi-Arch: allowed
Maintainer: nobody <nobody@example.org>
Version: {python}.2-1
Description: the interpreter
"""


def make_tree(root: Path, architecture: str = "amd64", python: str = "3.11") -> Path:
    """The files by which a Debian tree is known."""
    for directory in ("etc", "usr/bin", "usr/lib/systemd", "var/lib/dpkg/info", "var/lib/dpkg/updates"):
        (root / directory).mkdir(parents=True)
    (root / "lib").symlink_to("usr/lib")
    (root / "usr/lib/systemd/systemd").touch()
    (root / f"usr/bin/python{python}").touch()
    (root / "usr/bin/python3").symlink_to(f"python{python}")
    (root / "etc/os-release").write_text('NAME=x\nPRETTY_NAME="A tree 1"\n')
    (root / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\nedgekit:x:998:997::/:/bin/false\n")
    (root / "var/lib/dpkg/status").write_text(STATUS.format(architecture=architecture, python=python))
    (root / "var/lib/dpkg/available").touch()
    return root


def make_package(directory: Path, architecture: str = "amd64", python: str = "3.11") -> Path:
    """A package of the agent's name, without the agent."""
    content = directory / f"content-{architecture}"
    (content / "DEBIAN").mkdir(parents=True)
    (content / "DEBIAN/control").write_text(
        f"Package: edgekit-agent\nVersion: 1.2\nArchitecture: {architecture}\n"
        f"Maintainer: nobody <nobody@example.org>\nDepends: python3 (>= {python})\nDescription: the agent\n"
    )
    script = content / "DEBIAN/postinst"
    script.write_text('#!/bin/sh\nset -e\necho "$DPKG_ROOT" > "$DPKG_ROOT/etc/configured"\n')
    script.chmod(0o755)
    (content / "etc/edgekit").mkdir(parents=True)
    (content / "etc/edgekit/agent.toml").write_text("# the package's own\n")
    package = directory / f"edgekit-agent_1.2_{architecture}.deb"
    subprocess.run(["dpkg-deb", "--build", content, package], check=True, capture_output=True)
    return package


@pytest.fixture
def release(tmp_path: Path) -> tuple[bundle.Bundle, Path]:
    """A signed bundle and the public key of its signer."""
    made = make_bundle(tmp_path / "bundle", 2.0)
    private, public = sign.keygen(tmp_path / "release")
    sign.sign(made.archive, private)
    return made, public


@needs_dpkg
@pytest.mark.parametrize("architecture", ["amd64", "arm64"])
def test_a_tree_gets_agent_key_configuration_and_bundle(
    tmp_path: Path, release: tuple[bundle.Bundle, Path], architecture: str
) -> None:
    """All four are in the tree afterwards, known to its package manager, and a second run changes nothing."""
    made, public = release
    tree = make_tree(tmp_path / "tree", architecture)
    if architecture == "arm64":
        made = make_bundle(tmp_path / "arm", 3.0, architecture="aarch64")
        sign.sign(made.archive, public.with_suffix(".key"))
    package = make_package(tmp_path, architecture)
    config = tmp_path / "mine.toml"
    config.write_text("threads = 1\n")
    for _ in range(2):
        result = job.provision(tree, made.archive, [public], package, config, lambda step: None)
    assert (result.architecture, result.agent, result.digest) == (architecture, "1.2", made.digest)
    assert (tree / "etc/configured").read_text().strip() == str(tree)
    assert (tree / "etc/edgekit/keys/release.pub").read_bytes() == public.read_bytes()
    assert (tree / "etc/edgekit/agent.toml").read_text() == "threads = 1\n"
    waiting = tree / "var/lib/edgekit-agent/provisioned/scale.edgekit"
    assert waiting.read_bytes() == made.archive.read_bytes()
    assert waiting.stat().st_uid == 998
    assert waiting.parent.parent.stat().st_gid == 997
    listed = subprocess.run(
        ["dpkg-query", f"--admindir={tree}/var/lib/dpkg", "--show", "edgekit-agent"],
        capture_output=True,
        text=True,
    )
    assert "1.2" in listed.stdout


@needs_dpkg
def test_what_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path, release: tuple[bundle.Bundle, Path]
) -> None:
    """A wrong key, processor, package or Python, or a broken configuration leave the tree as it was."""
    made, public = release
    tree = make_tree(tmp_path / "tree")
    before = sorted(path.relative_to(tree) for path in tree.rglob("*"))
    good, foreign = make_package(tmp_path, "amd64"), make_package(tmp_path, "arm64")
    other = sign.keygen(tmp_path / "other")[1]
    broken = tmp_path / "broken.toml"
    broken.write_text("threads = \n")
    arm = make_bundle(tmp_path / "arm", 3.0, architecture="aarch64")
    sign.sign(arm.archive, public.with_suffix(".key"))
    for arguments, reason in [
        ((made.archive, [other], good, None), "key"),
        ((made.archive, [], good, None), "trust nobody"),
        ((made.archive, [public], foreign, None), "arm64"),
        ((arm.archive, [public], good, None), "arm64"),
        ((made.archive, [public], made.archive, None), "package"),
        ((made.archive, [public], good, broken), "TOML"),
    ]:
        with pytest.raises(BadInput) as caught:
            job.provision(tree, *arguments, lambda step: None)
        assert reason in str(caught.value)
    assert sorted(path.relative_to(tree) for path in tree.rglob("*")) == before


@needs_dpkg
def test_a_package_for_another_python_is_named(tmp_path: Path, release: tuple[bundle.Bundle, Path]) -> None:
    """Where the tree's Python is too old, the error says which one it has, and nothing of the agent stays."""
    tree = make_tree(tmp_path / "tree", python="3.8")
    with pytest.raises(BadInput, match=r"Python 3\.8"):
        job.provision(tree, release[0].archive, [release[1]], make_package(tmp_path), None, lambda step: None)
    assert not list(tree.rglob("*edgekit*"))


def test_a_package_that_is_not_there_is_named_with_the_command_that_makes_it(tmp_path: Path) -> None:
    """Without a fitting package the error is about a missing thing, and says how to make it."""
    tree = make_tree(tmp_path / "tree", "arm64", "3.8")
    with pytest.raises(Missing, match=r"make deb DEB_ARCH=arm64 DEB_PYTHON=3\.8"):
        job.find_package(tmp_path, tree)
    package = tmp_path / "edgekit-agent_1.2_arm64.deb"
    package.touch()
    assert job.find_package(tmp_path, tree) == package


@pytest.mark.parametrize("missing", ["var/lib/dpkg/status", "usr/bin/python3", "usr/lib/systemd/systemd"])
def test_a_directory_that_is_no_debian_tree_is_refused(tmp_path: Path, missing: str) -> None:
    """A tree without package database, Python or systemd is refused with that reason, and `/` always."""
    tree = make_tree(tmp_path / "tree")
    (tree / missing).unlink()
    with pytest.raises(BadInput, match=missing.rsplit("/", 1)[-1]):
        rootfs.read(tree)
    with pytest.raises(BadInput, match="own root"):
        rootfs.read(Path("/"))


def test_a_link_that_leads_out_of_the_tree_is_refused(
    tmp_path: Path, release: tuple[bundle.Bundle, Path]
) -> None:
    """An absolute link in the way of the package would write to this machine, so it is refused."""
    tree = make_tree(tmp_path / "tree")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tree / "etc/systemd").symlink_to(elsewhere)
    with pytest.raises(BadInput, match="out of the tree"):
        job.provision(tree, release[0].archive, [release[1]], tmp_path / "x.deb", None, lambda step: None)
    assert not list(elsewhere.iterdir())


@given(
    links=st.dictionaries(
        st.sampled_from("abc"),
        st.lists(st.sampled_from(["/", "..", "a", "b", "c", "/a", "/.."]), min_size=1, max_size=4),
        max_size=3,
    ),
    path=st.lists(st.sampled_from(["a", "b", "c", "..", "."]), max_size=6),
)
def test_no_chain_of_links_leads_out_of_a_tree(
    tmp_path_factory: pytest.TempPathFactory, links: dict[str, list[str]], path: list[str]
) -> None:
    """Whatever links a tree holds, a path in it resolves to a place inside it, or is refused as circular."""
    root = tmp_path_factory.mktemp("tree").resolve()
    for name, steps in links.items():
        (root / name).symlink_to("/".join(steps))
    try:
        found = rootfs.resolve(root, "/" + "/".join(path))
    except BadInput:
        return
    assert found == root or root in found.parents
