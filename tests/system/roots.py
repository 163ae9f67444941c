"""The root file systems that devices are made of, made once by debootstrap and kept in ``.system/``.

A foreign architecture runs under qemu's user-mode emulation, which the kernel starts by itself once it is
registered (``binfmt_misc``). Whatever is missing here makes the tests skip, with the reason.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from device import run_in

CACHE = Path(__file__).parents[2] / ".system"
MIRROR = os.environ.get("DEBIAN_MIRROR")  # else debootstrap's own

# Under emulation ONNX Runtime 1.32 for aarch64 ends with SIGSEGV while it is loaded, and 1.19.2 does not:
# the one that Debian 11's Python gets, and JetPack 5's.
SUITES = {"amd64": ("bookworm", "3.11"), "arm64": ("bullseye", "3.9")}
_PACKAGES = "systemd,systemd-sysv,dbus,openssh-server,python3,python3-distutils,procps,ca-certificates"
_BINFMT = Path("/proc/sys/fs/binfmt_misc")
_EMULATOR = Path("/usr/lib/binfmt.d/qemu-aarch64.conf")
_TIMEOUT_S = 3600


def base(architecture: str) -> Path:
    """A Debian root file system with systemd, sshd and Python, to copy devices from; may skip.

    Args:
        architecture: Debian's name of it: ``amd64``, ``arm64``.
    """
    _require_tools()
    if architecture != _native():
        _require_emulation()
    suite, _ = SUITES[architecture]
    root = CACHE / f"{suite}-{architecture}"
    if not root.exists():
        CACHE.mkdir(exist_ok=True)
        unfinished = CACHE / f"unfinished-{architecture}"
        shutil.rmtree(unfinished, ignore_errors=True)
        argv = ["debootstrap", f"--arch={architecture}", "--variant=minbase", f"--include={_PACKAGES}"]
        subprocess.run(
            [*argv, suite, str(unfinished), *([MIRROR] if MIRROR else [])],
            check=True,
            timeout=_TIMEOUT_S,
            capture_output=True,
        )
        run_in(unfinished, ["ssh-keygen", "-A"])
        unfinished.rename(root)
    return root


def _native() -> str:
    done = subprocess.run(["dpkg", "--print-architecture"], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _require_tools() -> None:
    if os.geteuid() != 0:
        pytest.skip("a device needs root: run `sudo make test-system`")
    for tool, package in {
        "debootstrap": "debootstrap",
        "systemd-nspawn": "systemd-container",
        "ssh": "openssh-client",
    }.items():
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not on this machine: apt install {package}")


def _require_emulation() -> None:
    if not _EMULATOR.exists():
        pytest.skip("there is no emulation of aarch64 on this machine: apt install qemu-user-static")
    if not (_BINFMT / "register").exists():
        mounted = subprocess.run(
            ["mount", "-t", "binfmt_misc", "binfmt_misc", str(_BINFMT)], capture_output=True
        )
        if mounted.returncode != 0:
            pytest.skip("this kernel has no binfmt_misc, which emulation of aarch64 needs")
    if not (_BINFMT / "qemu-aarch64").exists():
        (_BINFMT / "register").write_text(_EMULATOR.read_text().strip())
