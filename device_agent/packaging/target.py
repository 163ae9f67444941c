"""What a package is made for: a processor and a Python."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from typing import List, Mapping

from device_agent.errors import BadInput

#: The processors, by Debian's name, as wheels and the kernel call them.
MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}

#: The oldest glibc that a device may have: Ubuntu 20.04's, of JetPack 5, and Debian 11's.
GLIBC_MINOR = 31
_LATE_PATCH = 2
_OLDEST_GLIBC_MINOR = 5
_OLDER_TAGS = ("manylinux1", "manylinux2010", "manylinux2014")  # manylinux1 and 2010 exist for x86-64 only


@dataclass(frozen=True)
class Target:
    """A kind of device.

    Attributes:
        architecture: Debian's name of the processor, ``amd64`` or ``arm64``.
        python: the minor release of its Python, such as ``3.11``.
    """

    architecture: str
    python: str

    def __post_init__(self) -> None:
        """Check the names.

        Raises:
            BadInput: an architecture without wheels, or a Python that the agent does not run on.
        """
        if self.architecture not in MACHINES:
            raise _unknown(f"the architecture {self.architecture!r}", f"one of: {', '.join(MACHINES)}")
        found = re.fullmatch(r"3\.(\d+)", self.python)
        if found is None or int(found[1]) < 8:
            raise _unknown(f"the Python {self.python!r}", "a minor release from 3.8 on, such as 3.11")

    @classmethod
    def here(cls) -> Target:
        """This machine and its Python."""
        machines = {machine: name for name, machine in MACHINES.items()}
        major, minor = platform.python_version_tuple()[:2]
        return cls(machines.get(platform.machine(), platform.machine()), f"{major}.{minor}")

    @property
    def machine(self) -> str:
        """The kernel's name of the processor."""
        return MACHINES[self.architecture]

    def pip_options(self) -> List[str]:
        """Make pip choose wheels for the target instead of for this machine.

        pip does not know that a newer glibc runs what was built for an older one, so every one is named.
        """
        tags = [f"manylinux_2_{minor}" for minor in range(_OLDEST_GLIBC_MINOR, GLIBC_MINOR + 1)]
        # A late patch release, as distributions have: cryptography excludes the first two of 3.9.
        python = f"{self.python}.{_LATE_PATCH}"
        options = ["--only-binary", ":all:", "--implementation", "cp", "--python-version", python]
        for tag in (*tags, *_OLDER_TAGS):
            options += ["--platform", f"{tag}_{self.machine}"]
        return options

    def marker_environment(self) -> Mapping[str, str]:
        """What ``packaging.markers`` needs to judge a requirement for the target, not for this machine."""
        return {
            "python_version": self.python,
            "python_full_version": f"{self.python}.{_LATE_PATCH}",
            "platform_python_implementation": "CPython",
            "implementation_name": "cpython",
            "platform_machine": self.machine,
            "platform_system": "Linux",
            "sys_platform": "linux",
            "os_name": "posix",
        }


def _unknown(what: str, fix: str) -> BadInput:
    return BadInput(f"{what} cannot be packed for", "there are no wheels or no agent for it", f"give {fix}")
