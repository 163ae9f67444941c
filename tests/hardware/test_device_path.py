"""The script for whoever owns a Jetson, run here against the recording double of TensorRT."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
AGENT_TESTS = HERE.parents[0] / "device_agent"


@pytest.mark.slow
def test_the_script_takes_a_bundle_the_whole_way(tmp_path: Path) -> None:
    """Every step has its part of the document: the engine is built and serves, the update comes and goes."""
    make = (
        "import sys; from pathlib import Path; from agent_testing import linear_bundle\n"
        "from device_agent.manifest import EngineBuild, ShapeRange\n"
        "shapes = {'x': ShapeRange((1, 8), (8, 8), (8, 8))}\n"
        "build = EngineBuild('tensorrt', 'model.onnx', 'fp16', {}, shapes)\n"
        "linear_bundle(Path(sys.argv[1]), schema=4, builds=(build,))\n"
    )
    paths = os.pathsep.join([str(AGENT_TESTS), str(AGENT_TESTS / "recording"), str(HERE.parents[1])])
    env = {**os.environ, "PYTHONPATH": paths, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    bundle, out = tmp_path / "bundle", tmp_path / "device.json"
    subprocess.run([sys.executable, "-c", make, str(bundle)], env=env, check=True)
    done = subprocess.run(["bash", str(HERE / "jetson.sh"), str(bundle), str(out)], env=env)
    document = json.loads(out.read_text())
    assert done.returncode == 0, document
    assert document["failed"] == []
    assert document["device"]["fingerprint"]["tensorrt"] == "8.5.2.2"
    assert (document["build"]["state"], document["build"]["serves"]) == ("built", "tensorrt")
    assert document["latency"]["requests"] == 300
    (layer,) = document["layers"]["Layers"]
    assert "FP32" in layer["Inputs"][0]["Format/Datatype"]
    assert document["dla"]["not_on_dla"] == ["layer"]
    assert (document["rollback"]["updated"], document["rollback"]["returned"]) == (True, True)
    assert document["stop"]["exit_code"] == 0
