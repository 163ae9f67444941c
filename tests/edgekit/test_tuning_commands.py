"""The commands around training: what `shards` writes, `edgekit` reads; what is missing, they say."""

from __future__ import annotations

import json
from pathlib import Path

from host_testing import assert_three_lines, edgekit
from PIL import Image

from edgekit.data import load_data
from edgekit.preprocess import ImagePreprocess


def test_shards_are_data_for_every_command(tmp_path: Path) -> None:
    """The printed name of the shards is what --calib takes; images and labels are those of the folder."""
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(3):
            image = Image.new("RGB", (8, 8), (100 * label + 10, number, 0))
            image.save(tmp_path / "images" / name / f"{number}.png")
    result = edgekit("shards", "images", "shards", "--json", cwd=tmp_path)
    written = result.json()
    assert (written["samples"], written["classes"]) == (6, ["cat", "dog"])
    preprocess = ImagePreprocess(size=(8, 8), mean=(0.0,) * 3, std=(1.0,) * 3)
    samples = list(load_data(tmp_path / written["spec"], preprocess, None).samples())
    assert sorted(sample.label for sample in samples) == [0, 0, 0, 1, 1, 1]
    for sample in samples:
        red = float(sample.inputs["pixel_values"][0].mean())
        assert (red > 0.3) == bool(sample.label)


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    """Bad data and a directory that exists: three lines, exit code 2, nothing written."""
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "a"}) + "\nnonsense\n")
    assert_three_lines(edgekit("shards", "t.jsonl", "out", cwd=tmp_path), 2)
    assert_three_lines(edgekit("shards", "missing", "out", cwd=tmp_path), 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.jsonl"]


def test_adapters_and_students_need_their_section(tmp_path: Path) -> None:
    """`lora` and `distill` on a plain training configuration, `merge` on no run: three lines, exit code 2."""
    (tmp_path / "c.toml").write_text(
        'run = "run"\n[model]\nsource = "nets:net"\n[data]\ntrain = "t.jsonl"\n[parallel]\ndevice = "cpu"\n'
    )
    for command in ("lora", "distill"):
        assert f"[{command}]" in assert_three_lines(edgekit(command, "c.toml", cwd=tmp_path), 2)
    assert_three_lines(edgekit("merge", "run", "out", cwd=tmp_path), 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.toml"]
