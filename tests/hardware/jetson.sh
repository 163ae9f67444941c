#!/usr/bin/env bash
# Take a bundle the whole way on a Jetson (or any device with TensorRT), and write one JSON file about it:
# build, golden check, latency, the engine's layers, DLA, update and rollback. Attach the file to a bug report.
#
#   tests/hardware/jetson.sh BUNDLE OUT.json        BUNDLE is an unpacked bundle with `builds` for this device
#
# Needs a checkout of edgekit, Python 3.8 or newer with edgekit-agent's dependencies, and JetPack's own
# TensorRT for that Python. PYTHON names the interpreter; python3 is the default. Nothing is installed and no
# service is touched: the agent runs below a temporary directory and is ended.
set -euo pipefail
bundle=${1:?usage: jetson.sh BUNDLE OUT.json}
out=${2:?usage: jetson.sh BUNDLE OUT.json}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
export PYTHONPATH="$root:$root/benchmarks/gpu${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" "$here/device_path.py" "$bundle" "$out"
