"""Fuzz for long.

python tests/fuzz/fuzz_run.py [--seconds 1200] [--targets infer,connection,grpc] [--json]

Each target runs in a process of its own with atheris (libFuzzer with the coverage of Python code), in an
environment under .bench/ that is made when it is first needed; where atheris has no wheel, inputs are changed
at random without looking at coverage. What was found to be interesting is kept in .bench/fuzz-corpus/ for the
next run. Exits 1 if an input broke something; the input is printed, to become a test.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serving.venvs import Environment

ROOT = Path(__file__).parents[2]
TARGETS = ("infer", "connection", "grpc")
_CORPUS = ROOT / ".bench" / "fuzz-corpus"
_MAX_BYTES = 600
_BATCH = 1000
_WORDS = 3000


def main() -> None:
    """Run the targets side by side, or be the process of one."""
    options = _options()
    if options.child:
        _child(options.child, options.seconds)
        return
    sys.path.append(str(ROOT / "benchmarks"))
    from serving.venvs import EnvironmentFailed, prepare

    environment = _environment()
    try:
        prepare(environment)
        python = environment.python
    except EnvironmentFailed as error:
        print(f"without coverage, for atheris cannot be installed: {error}", file=sys.stderr)
        python = Path(sys.executable)
    running = {target: _start(python, target, options.seconds) for target in options.targets}
    started_s = time.monotonic()
    results = {target: _result(process, started_s) for target, process in running.items()}
    _print(results, options.json)
    sys.exit(any(result["broken"] for result in results.values()))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=1200, help="how long each target runs")
    parser.add_argument("--targets", type=lambda text: text.split(","), default=list(TARGETS))
    parser.add_argument("--json", action="store_true", help="print the document only")
    parser.add_argument("--child", choices=TARGETS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = set(options.targets) - set(TARGETS)
    if unknown:
        parser.error(f"there is no target {sorted(unknown)[0]}; there are {', '.join(TARGETS)}")
    return options


def _environment() -> Environment:
    from serving.venvs import Environment, agent_requirements

    return Environment("fuzz", (*agent_requirements(), "atheris==3.0.0"))


# The parent


def _start(python: Path, target: str, seconds: int) -> subprocess.Popen[str]:
    (_CORPUS / target).mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(
        [python, __file__, "--child", target, "--seconds", str(seconds)],
        cwd=_CORPUS, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def _result(process: subprocess.Popen[str], started_s: float) -> dict[str, object]:
    output = process.communicate()[0]
    executions = re.findall(r"number_of_executed_units: (\d+)|^#(\d+)", output, re.MULTILINE)
    features = re.findall(r"ft: (\d+)", output)
    return {
        "executions": max((int(a or b) for a, b in executions), default=0),
        "seconds": round(time.monotonic() - started_s, 1),
        "features": int(features[-1]) if features else None,
        "broken": process.returncode != 0,
        "words": output[-_WORDS:] if process.returncode != 0 else "",
    }


def _print(results: dict[str, dict[str, object]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(results, indent=2))
        return
    for target, result in results.items():
        state = "BROKEN" if result["broken"] else "holds"
        print(f"{target:<12} {result['executions']:>10} executions {result['seconds']:>8} s   {state}")
        if result["broken"]:
            print(result["words"])


# A child


def _child(target: str, seconds: int) -> None:
    try:
        import atheris
    except ImportError:
        _without_coverage(target, seconds)
        return
    with atheris.instrument_imports(include=["device_agent"]):
        module = importlib.import_module(f"fuzz_{target}")
    corpus = _CORPUS / target
    for number, seed in enumerate(module.seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)

    def execute(data: bytes) -> None:
        try:
            module.run(data)
        except Exception:
            print(f"bytes.fromhex({data.hex()!r})", flush=True)
            raise

    atheris.Setup(
        [sys.argv[0], f"-max_total_time={seconds}", f"-max_len={_MAX_BYTES}", "-print_final_stats=1",
         "-timeout=10", "-rss_limit_mb=4096", "-use_value_profile=1", str(corpus)],
        execute,
    )  # fmt: skip
    atheris.Fuzz()


def _without_coverage(target: str, seconds: int) -> None:
    from fuzz_explore import explore

    module = importlib.import_module(f"fuzz_{target}")
    seeds, end_s, rounds = list(module.seeds()), time.monotonic() + seconds, 0
    while time.monotonic() < end_s:
        explore(module.run, seeds, _BATCH, seed=rounds)
        rounds += 1
    print(f"number_of_executed_units: {rounds * _BATCH}")


if __name__ == "__main__":
    main()
