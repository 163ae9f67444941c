"""The demo: real scans, a real agent, and the whole road in one command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from conftest import Compressed
from host_testing import HERE, ONE_THREAD

from edgekit import ort, sign
from edgekit.bench.client import Client
from edgekit.bench.local_agent import running
from edgekit.demo import digits
from edgekit.deploy import local
from edgekit.errors import Missing


def _rows(split: digits.Split) -> set[bytes]:
    return {image.tobytes() for image in split.images}


def test_held_out_scans_are_never_trained_on() -> None:
    """The two parts share no scan, hold all scans together, and another seed draws other parts."""
    train, held_out = digits.load(0)
    assert len(train.labels) + len(held_out.labels) == 1797
    assert len(_rows(train) & _rows(held_out)) == 0
    assert train.images.dtype == np.float32
    assert train.images.shape[1:] == (1, digits.PIXELS, digits.PIXELS)
    assert set(held_out.labels) == set(range(10))
    assert _rows(digits.load(0)[0]) == _rows(train) != _rows(digits.load(1)[0])


def test_the_network_is_what_edgekit_is_given() -> None:
    """The factory builds the same architecture that is trained, for the inputs that it names."""
    model = digits.build().eval()
    with torch.no_grad():
        assert model(digits.example_inputs()).shape == (1, digits.CLASSES)
    assert sum(parameter.numel() for parameter in model.parameters()) > 10_000_000


def test_a_local_agent_serves_what_was_deployed(compressed: Compressed, tmp_path: Path) -> None:
    """It starts, takes a signed bundle, answers bit for bit as ONNX Runtime does, and stops."""
    signed = tmp_path / "build.edgekit"
    signed.write_bytes(compressed.archive.read_bytes())
    keys = tmp_path / "keys"
    keys.mkdir()
    private, public = sign.keygen(tmp_path / "demo")
    public.rename(keys / public.name)
    sign.sign(signed, private)
    states: list[str] = []
    graph = ort.Session(Path(compressed.document["bundle"]["path"]) / "model.onnx")
    with running(tmp_path, keys) as agent:
        deployed = local.deploy(signed, agent.control, states.append)
        assert deployed.digest == compressed.document["bundle"]["digest"]
        assert deployed.state == "committed"
        with Client(agent.host, agent.port, deployed.name) as client:
            for seed in range(3):
                image = np.random.default_rng(seed).normal(size=(1, 1, 8, 8)).astype(np.float32)
                answer, took_ms = client.infer({"image": image})
                expected = graph.run({"image": image})
                assert answer.keys() == expected.keys()
                assert all(np.array_equal(answer[name], value) for name, value in expected.items())
                assert took_ms > 0
            with pytest.raises(RuntimeError, match="400"):
                client.infer({"image": image[..., :7]})
    with pytest.raises(ConnectionRefusedError), Client(agent.host, agent.port, "build") as client:
        client.infer({"image": image})
    assert states


def test_an_agent_that_does_not_start_says_its_last_words(tmp_path: Path) -> None:
    """A broken setting is in the error, with the command to try by hand."""
    (tmp_path / "state").write_text("a file where the agent wants a directory")
    with pytest.raises(Missing, match="did not start") as caught, running(tmp_path, tmp_path):
        pass
    assert "edgekit-agent serve" in caught.value.fix


@pytest.mark.slow
def test_the_whole_road(tmp_path: Path) -> None:
    """``edgekit demo --json`` trains, compresses, signs, deploys and serves: every answer is identical to
    ONNX Runtime's; a second run with the same seed reuses everything and makes the same bundle.
    """
    documents = []
    for _ in range(2):
        done = subprocess.run(
            [
                sys.executable,
                HERE / "short_demo.py",
                "demo",
                "--seed",
                "1",
                "--out",
                tmp_path / "demo",
                "--json",
            ],
            env={**os.environ, **ONE_THREAD},
            capture_output=True,
            text=True,
            timeout=250,
        )
        assert done.returncode in (0, 3), done.stderr  # so short a training may drop more than is allowed
        documents.append(json.loads(done.stdout))
    schema = json.loads((HERE / "report.schema.json").read_text())
    for document in documents:
        jsonschema.validate(document, schema)
        served = document["served"]
        assert served["identical"] == served["requests"] == 60
        assert 0 < served["p50_ms"] <= served["p99_ms"]
        assert document["chosen"]["params_ratio"] <= 0.35
        assert document["chosen"]["metric"]["name"] == "top1"
        assert document["seed"] == 1
    assert documents[0]["bundle"]["digest"] == documents[1]["bundle"]["digest"]
    assert [stage["name"] for stage in documents[1]["stages"] if not stage["cached"]] == []
