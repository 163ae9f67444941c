"""Become the agent, as a process that ends with the one that started it, however that ends.

``python -m edgekit.bench.tied PARENT ARGUMENT...`` is ``edgekit-agent ARGUMENT...``.
"""

from __future__ import annotations

import os
import sys

from device_agent.ending import die_with

if __name__ == "__main__":
    die_with(int(sys.argv[1]))
    os.execv(sys.executable, [sys.executable, "-m", "device_agent.cli", *sys.argv[2:]])  # noqa: S606  # its own arguments
