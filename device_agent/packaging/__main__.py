"""``python -m device_agent.packaging wheel | zipapp | deb``: build, print the path of what was built."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Optional, Sequence

from device_agent.errors import AgentError
from device_agent.packaging.target import Target


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Build one kind of package and return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        print(_build(options))
    except AgentError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    here = Target.here()
    parser = argparse.ArgumentParser(prog="python -m device_agent.packaging", description=__doc__)
    parser.add_argument("kind", choices=("wheel", "zipapp", "deb"))
    parser.add_argument("--out", type=Path, default=Path("dist"), help="directory; default dist")
    parser.add_argument("--arch", default=here.architecture, help="amd64 or arm64; default: this machine's")
    parser.add_argument("--python", default=here.python, help="the device's Python; default: this one")
    parser.add_argument("--version", default=None, help="of the Debian package; default: the agent's")
    return parser


def _build(options: argparse.Namespace) -> Path:
    if options.kind == "wheel":
        from device_agent.packaging import site

        return site.agent_wheel(options.out)
    target = Target(options.arch, options.python)
    if options.kind == "zipapp":
        from device_agent.packaging import onefile

        return onefile.build(target, options.out)
    from device_agent.packaging import deb

    return deb.build(target, options.out, options.version)


if __name__ == "__main__":
    sys.exit(main())
