"""The detector of examples/detection: real scenes, and the road to boxes that an agent serves."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from host_testing import HERE, Result, edgekit
from safetensors.torch import save_file

from edgekit import bundle, ort, sign
from edgekit.bench.client import Client
from edgekit.bench.local_agent import running
from edgekit.deploy import local
from examples.detection import postprocess, scenes, train
from examples.detection.detector import Detector

ROOT = HERE.parents[1]
SCENES = {"train": 48, "calib": 24, "held_out": 12}
RECIPE = (ROOT / "examples" / "detection" / "recipe.toml").read_text()
QUICK = '\n[measure]\nruns = 10\nwarmup = 1\n[quantize]\nmethods = []\nobserver = "minmax"\n'


@dataclass(frozen=True)
class Made:
    """A detector that was compressed quickly, so badly trained: what it finds is not the point here."""

    result: Result
    scenes: Path
    out: Path

    @property
    def report(self) -> dict[str, Any]:
        """The report document."""
        document: dict[str, Any] = json.loads((self.out / "report.json").read_text())
        return document


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """Few scenes, a few steps of training, one epoch of recovery."""
    home = tmp_path_factory.mktemp("detection")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "SCENES", SCENES)
        patch.setattr(train, "EPOCHS", 4)
        patch.setattr(train, "BATCH_SIZE", 8)
        scenes.write(home / "scenes", seed=0)
        model = train.train(train.load(home / "scenes" / "train.jsonl", 0), 0, lambda *_: None)
    save_file(model.state_dict(), str(home / "detector.safetensors"))
    recipe = home / "recipe.toml"
    recipe.write_text(RECIPE.replace("epochs = ", "epochs = 1  # ") + QUICK)
    result = edgekit(
        "compress", "examples.detection.detector:build", "--weights", home / "detector.safetensors",
        "--profile", "x86-cpu", "--recipe", recipe, "--precision", "int8", "--max-drop", "1",
        "--train", home / "scenes" / "train.jsonl", "--calib", home / "scenes" / "calib.jsonl",
        "--eval", home / "scenes" / "held_out.jsonl", "--out", home / "out", "--workdir", home / "work",
        cwd=ROOT, PYTHONPATH=str(ROOT),
    )  # fmt: skip
    yield Made(result, home / "scenes", home / "out")
    shutil.rmtree(home)


def test_boxes_lie_around_the_pasted_pixels() -> None:
    """A box holds every pixel that differs from the photograph, and not a row or column more."""
    source = scenes.material(0)["held_out"]
    random = np.random.default_rng(3)
    for _ in range(20):
        photograph = scenes._background(source, random)
        canvas, boxes = photograph.copy(), []
        scenes._paste(canvas, source, boxes, random)
        rows, columns = np.nonzero((canvas != photograph).any(axis=2))
        [(x1, y1, x2, y2, _)] = boxes
        assert (x1, y1, x2, y2) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_held_out_scenes_share_nothing_with_the_others() -> None:
    """No scan and no photograph is in both; the same seed makes the same scenes."""
    parts = scenes.material(0)
    seen = {scan.tobytes() for scan in parts["train"].scans}
    assert not seen & {scan.tobytes() for scan in parts["held_out"].scans}
    assert not set(scenes._PHOTOGRAPHS) & set(scenes._HELD_OUT_PHOTOGRAPHS)
    first, again = (next(scenes.scenes(parts["train"], 1, (7,))) for _ in range(2))
    assert np.array_equal(first[0], again[0])
    assert first[1] == again[1]


def test_the_loss_of_a_perfect_answer_is_nearly_nothing() -> None:
    """Cells whose distances reach the sides of their box, with its class, leave no box loss."""
    boxes = torch.tensor([[[16.0, 20, 40, 44, 3], [0, 0, 0, 0, -1]]])
    cell_box, cell_class = train._assigned(boxes)
    centres = train._centres()
    distances = torch.cat([centres - cell_box[0, :, :2], cell_box[0, :, 2:] - centres], dim=1)
    logits = torch.full((1, scenes.CLASSES, len(centres)), -12.0)
    logits[0, 3, cell_class[0] == 3] = 12.0
    edge = int(len(centres) ** 0.5)
    heads = {
        "logits": logits.view(1, -1, edge, edge),
        "distances": (distances.T / train.STRIDE).reshape(1, 4, edge, edge),
    }
    good = float(train.detection_loss(lambda _: heads, (torch.zeros(1), boxes)))  # type: ignore[arg-type]
    heads["distances"] = heads["distances"] + 1
    assert good < 1e-3 < float(train.detection_loss(lambda _: heads, (torch.zeros(1), boxes)))  # type: ignore[arg-type]
    assert (cell_class >= 0).sum() >= 4


def test_the_post_processing_keeps_the_best_of_overlapping_boxes() -> None:
    """Of two boxes of a class that overlap the surer one stays, and those of other classes and images."""
    logits = np.full((2, 10, 12, 12), -12, np.float32)
    distances = np.full((2, 4, 12, 12), 3, np.float32)
    logits[0, 3, 5, 5], logits[0, 3, 5, 6], logits[0, 4, 5, 6] = 3, 2.5, 1
    got = ort.Session(postprocess.build().SerializeToString()).run(
        {"logits": logits, "distances": distances}
    )["detections"]
    assert got.shape == (2, postprocess.MOST_DETECTIONS, 6)
    assert got[0, :2, 5].tolist() == [3, 4]
    assert got[0, 0, :4].tolist() == [20, 20, 68, 68]
    assert not got[0, 2:].any()
    assert not got[1].any()


def test_the_contract_of_size_is_met_at_the_raw_heads(made: Made) -> None:
    """Backbone, neck and heads are pruned and quantized; the graph that ships has no suppression in it."""
    report = made.report
    assert set(report["contract"]["unmet"]) <= {"faster_than_original"}, made.result.err
    assert report["chosen"]["params_ratio"] <= 0.35
    assert report["chosen"]["metric"]["name"] == "map"
    assert report["chosen"]["metric"]["samples"] == SCENES["held_out"]
    assert report["chosen"]["calibration"]["int8_operators"] > 10
    with bundle.open_bundle(made.out / "detector.edgekit") as opened:
        assert [step.name for step in opened.manifest.composition] == ["model", "postprocess"]
        assert [tensor.name for tensor in opened.manifest.outputs] == ["detections", "logits", "distances"]
        assert set(ort.Session(opened.directory / "model.onnx").outputs) == {"logits", "distances"}


def test_an_agent_serves_boxes(made: Made) -> None:
    """Signed and deployed, it answers as the two graphs do here, one image or several at a time."""
    single = made.out / "detector.edgekit"
    with bundle.open_bundle(single) as opened:
        behind = (opened.directory / "postprocess.onnx").read_bytes()
        chain = ort.open_chain(opened.directory / "model.onnx", behind, threads=1)
        with np.load(opened.directory / opened.manifest.golden.inputs) as stored:
            images = stored["image"]
    home = made.out / "agent"
    (home / "keys").mkdir(parents=True)
    private, public = sign.keygen(home / "release")
    os.replace(public, home / "keys" / public.name)
    sign.sign(single, private)
    with running(home, home / "keys") as agent:
        deployed = local.deploy(single, agent.control, lambda _: None)
        with Client(agent.host, agent.port, deployed.name, ["detections"]) as client:
            for rows in (1, 3):
                asked = {"image": images[:rows]}
                answer, _ = client.infer(asked)
                assert answer["detections"].shape == (rows, postprocess.MOST_DETECTIONS, 6)
                assert np.allclose(answer["detections"], chain.run(asked)["detections"], atol=1e-4)


def test_the_detector_is_small_and_has_what_real_ones_have() -> None:
    """About a million parameters, residuals, and a neck that joins two strides."""
    model = Detector()
    assert 1e6 < sum(parameter.numel() for parameter in model.parameters()) < 3e6
    heads = model.eval()(torch.zeros(3, 3, scenes.PIXELS, scenes.PIXELS))
    assert {name: tuple(head.shape) for name, head in heads.items()} == {
        "logits": (3, 10, 12, 12), "distances": (3, 4, 12, 12),
    }  # fmt: skip
