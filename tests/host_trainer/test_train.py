"""Whole runs: the same on any number of processes, over kills, interruptions and explosions."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from training import metrics, settings, start, train, weights

from host_trainer import train as training_run
from host_trainer.__main__ import INTERRUPTED
from host_trainer.config import Config, parse
from host_trainer.errors import ConfigError, Diverged
from host_trainer.parallel import Parallel

#: Sums in another order: what two processes add to each other's gradient.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in one process, from beginning to end."""
    run = tmp_path_factory.mktemp("alone") / "run"
    train(settings(run, data__eval="training:held_out"))
    return run


def _same(first: Path, second: Path, tolerance: float = TOLERANCE) -> None:
    want, got = weights(first), weights(second)
    assert want.keys() == got.keys()
    for name in want:
        assert torch.allclose(want[name], got[name], atol=tolerance, rtol=tolerance), name


def test_a_run_leaves_its_whole_story(alone: Path) -> None:
    """The directory has the settings, the environment, the state, every loss, and the model."""
    assert json.loads((alone / "config.json").read_text())["optimize"]["batch_size"] == 24
    environment = json.loads((alone / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__
    summary = json.loads((alone / "run.json").read_text())
    assert (summary["state"], summary["step"], summary["total_steps"]) == ("finished", 20, 20)
    assert summary["results"]["eval/accuracy"] > 0.8
    losses = metrics(alone)
    assert len(losses) == 20
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("strategy", "processes", "micro_batch_size"), [("ddp", 2, 0), ("ddp", 1, 6), ("fsdp", 2, 6)]
)
def test_the_loss_curve_depends_on_the_global_batch_alone(
    alone: Path, tmp_path: Path, strategy: str, processes: int, micro_batch_size: int
) -> None:
    """Two processes with DDP or FSDP2, or accumulated gradients: each loss within 1e-4 of one process's."""
    run = tmp_path / "run"
    document = settings(
        run,
        parallel__strategy=strategy,
        optimize__micro_batch_size=micro_batch_size,
        data__eval="training:held_out",
    )
    train(document, processes)
    assert metrics(run) == pytest.approx(metrics(alone), rel=TOLERANCE, abs=TOLERANCE)
    assert metrics(run, "eval/loss") == pytest.approx(metrics(alone, "eval/loss"), rel=TOLERANCE)
    assert metrics(run, "eval/accuracy") == metrics(alone, "eval/accuracy")
    _same(alone, run)


def test_a_student_learns_in_two_processes_as_in_one(alone: Path, tmp_path: Path) -> None:
    """Features through projections too. Errors are relative to the variance of each process's part of the
    batch, so the losses are close and not equal.
    """
    teacher = {"teacher": "training:net", "features": 1.0}
    teacher["teacher_weights"] = str(alone / "model" / "model.safetensors")
    runs = {processes: tmp_path / f"run{processes}" for processes in (1, 2)}
    for processes, run in runs.items():
        train(settings(run, model__source="training:narrow_net", distill=teacher), processes)
    assert metrics(runs[2]) == pytest.approx(metrics(runs[1]), rel=0.05)
    assert metrics(runs[2])[-1] < 0.8 * metrics(runs[2])[0]


def test_a_student_may_learn_from_features_alone_in_micro_batches_of_any_size(tmp_path: Path) -> None:
    """In two processes too, where its head has no part in the loss, and where one process alone could not
    share a step into such micro-batches.
    """
    document = settings(
        tmp_path / "run",
        model__source="training:narrow_net",
        distill={"teacher": "training:net", "outputs": 0.0, "features": 1.0},
        optimize__micro_batch_size=16,
    )
    train(document, 2)
    losses = metrics(tmp_path / "run")
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("before", "after", "strategy"), [(2, 1, "ddp"), (1, 2, "fsdp")])
def test_a_killed_run_goes_on_in_the_middle_of_an_epoch_with_other_processes(
    alone: Path, tmp_path: Path, before: int, after: int, strategy: str
) -> None:
    """After kill -9 at most the interval is lost, and the result is that of a run that nothing disturbed."""
    run = tmp_path / "run"
    document = settings(
        run, data__train="training:slow_points", checkpoint__every_steps=3, checkpoint__keep=1
    )
    started = start(document, before)
    checkpoint = run / "checkpoints" / "step-000000003"
    while not checkpoint.exists() and all(process.is_alive() for process, _ in started):
        time.sleep(0.01)
    for process, _ in started:
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
    done = len(metrics(run))
    assert done < 20
    train({**document, "parallel": {"device": "cpu", "strategy": strategy}}, after)
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    resumed_at = losses[done]["step"] - 1
    assert resumed_at % 10 != 0, "in the middle of an epoch"
    assert done - resumed_at <= 3
    _same(alone, run)


def test_dropout_draws_what_it_would_have_drawn(tmp_path: Path) -> None:
    """A run that was interrupted and went on is bit-identical to one that was not."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(settings(whole, model__source="training:dropping_net"))
    document = settings(
        broken,
        model__source="training:dropping_net",
        data__train="training:slow_points",
        checkpoint__every_steps=100,
    )
    ((process, _),) = start(document)
    while not (broken / "metrics.jsonl").exists() or len(metrics(broken)) < 3:
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid or 0, signal.SIGTERM)
    process.join()
    summary = json.loads((broken / "run.json").read_text())
    assert summary["state"] == "interrupted"
    assert 3 <= summary["step"] < 20
    train(document)
    _same(whole, broken, tolerance=0.0)


def test_ctrl_c_ends_all_processes_after_the_same_step(alone: Path, tmp_path: Path) -> None:
    """One of two hears it, both end with one checkpoint of the last step, and one process goes on from there:
    nothing is lost, and the result is that of a run that nothing disturbed.
    """
    run = tmp_path / "run"
    document = settings(run, data__train="training:slow_points", checkpoint__every_steps=100)
    started = start(document, 2)
    while not (run / "metrics.jsonl").exists() or len(metrics(run)) < 3:
        assert all(process.is_alive() for process, _ in started)
        time.sleep(0.01)
    os.kill(started[1][0].pid or 0, signal.SIGINT)
    for process, _ in started:
        process.join(60)
    summary = json.loads((run / "run.json").read_text())
    assert summary["state"] == "interrupted"
    done = summary["step"]
    assert 3 <= done == len(metrics(run)) < 20
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{done:09d}"]
    train({**document, "parallel": {"device": "cpu"}})
    assert len(metrics(run)) == 20
    _same(alone, run)


def test_a_batch_with_nan_is_named(tmp_path: Path) -> None:
    """The error names the step, the input and the batch's file; the last checkpoint is from before."""
    run = tmp_path / "run"
    document = settings(run, data__train="training:poisoned", checkpoint__every_steps=1, monitor__rollbacks=3)
    with pytest.raises(Diverged, match=r"the loss became nan at step (\d+)") as caught:
        train(document, 2)
    assert "the input 'point' holds nan" in caught.value.why
    assert caught.value.data_at_fault
    step = int(caught.value.what.split()[-1])
    (evidence,) = (run / "diverged").iterdir()
    assert evidence.name == f"step-{step:09d}.safetensors"
    assert json.loads((run / "run.json").read_text())["state"] == "diverged"
    assert max(path.name for path in (run / "checkpoints").iterdir()) == f"step-{step - 1:09d}"


def _exploding(run: Path, **changes: Any) -> dict[str, Any]:
    return settings(
        run, model__source="training:deep_net", optimize__learning_rate=4.0, optimize__epochs=4,
        checkpoint__every_steps=4, **changes,
    )  # fmt: skip


def test_an_exploding_run_stops_with_its_cause(tmp_path: Path) -> None:
    """A far too high learning rate: the step and the layer are named, and the weights on disk are finite."""
    from host_trainer.checkpoint import Store

    with pytest.raises(Diverged, match=r"at step \d+") as caught:
        train(_exploding(tmp_path / "run"))
    assert "the gradient of '" in caught.value.why
    store = Store(tmp_path / "run" / "checkpoints", 2)
    for step in store.steps():
        assert all(torch.isfinite(tensor).all() for tensor in store.read(step).model.values())


def test_an_exploding_run_recovers_by_itself(tmp_path: Path) -> None:
    """Going back and halving the learning rate as often as it takes, it ends, and it has learned."""
    run = tmp_path / "run"
    train(_exploding(run, monitor__rollbacks=12, monitor__stop_norm=20.0, data__eval="training:held_out"))
    rates = metrics(run, "train/learning_rate")
    assert max(rates[-40:]) < 4.0 / 2
    assert json.loads((run / "run.json").read_text())["state"] == "finished"
    assert metrics(run, "eval/loss")[-1] < metrics(run)[0]


def test_a_way_back_that_is_not_taken_changes_nothing(alone: Path, tmp_path: Path) -> None:
    """With ``monitor.rollbacks`` a run that never explodes is bit-identical to one without."""
    train(settings(tmp_path / "run", monitor__rollbacks=1))
    _same(alone, tmp_path / "run", tolerance=0.0)


def test_one_checkpoint_is_gone_back_to_as_often_as_is_allowed(tmp_path: Path) -> None:
    """Where there is none before it, each explosion halves the learning rate and begins there again."""
    run = tmp_path / "run"
    document = _exploding(run, monitor__rollbacks=12)
    document["optimize"]["learning_rate"] = 64.0
    train({**document, "checkpoint": {"every_steps": 1000}})
    assert max(metrics(run, "train/learning_rate")[-40:]) < 64.0 / 2
    assert json.loads((run / "run.json").read_text())["state"] == "finished"


def test_a_run_that_goes_on_takes_the_settings_that_it_is_given(tmp_path: Path) -> None:
    """The weight decay of the configuration counts, not that of the checkpoint."""
    from host_trainer.checkpoint import Store

    run = tmp_path / "run"
    train(settings(run, checkpoint__every_steps=10, checkpoint__keep=9, optimize__weight_decay=0.5))
    shutil.rmtree(run / "checkpoints" / "step-000000020")
    train(settings(run, optimize__weight_decay=0.0))
    saved = Store(run / "checkpoints", 9).read(20).state["groups"]
    assert [group["weight_decay"] for group in saved] == [0.0, 0.0]


def test_an_epoch_is_judged_although_the_run_ended_right_after_its_last_step(tmp_path: Path) -> None:
    """Run again, also when it was finished, it has the results that it had."""
    run = tmp_path / "run"
    document = settings(run, data__eval="training:held_out", checkpoint__every_steps=10)
    train(document)
    results = json.loads((run / "run.json").read_text())["results"]
    train(document)
    summary = json.loads((run / "run.json").read_text())
    assert summary["state"] == "finished"
    assert summary["results"] == results


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"data__eval": "training:nothing"}, r"data\.eval"),
        ({"data__train": "training:four_classes"}, "classes"),
        ({"data__train": "training:half_labelled"}, "'labels'"),
    ],
)
def test_data_that_does_not_fit_is_said(tmp_path: Path, changes: dict[str, str], what: str) -> None:
    """Held-out data without a sample, a class more than the model has, a sample without the others' label."""
    with pytest.raises(ConfigError) as caught:
        train(settings(tmp_path / "run", **changes))
    assert re.search(what, str(caught.value))


def test_sigterm_reaches_the_training_process_behind_the_command(tmp_path: Path) -> None:
    """What started it ends with the code of an interruption, and after the checkpoint is there."""
    run, path = tmp_path / "run", tmp_path / "run.toml"
    path.write_text(
        f'run = "{run}"\nmodel.source = "training:net"\n'
        'data = {train = "training:slow_points", workers = 0}\n'
        "optimize = {epochs = 40, batch_size = 24}\n"
        'parallel = {device = "cpu"}\nmonitor = {every_steps = 1, tensorboard = false}\n'
    )
    command = "import sys, pathlib; from host_trainer.launch import launch; "
    command += "sys.exit(launch(pathlib.Path(sys.argv[1]), ()))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    with subprocess.Popen([sys.executable, "-c", command, str(path)], env=environment) as process:
        while not (run / "metrics.jsonl").exists() or len(metrics(run)) < 3:
            assert process.poll() is None
            time.sleep(0.01)
        process.terminate()
    assert process.returncode == INTERRUPTED
    assert json.loads((run / "run.json").read_text())["state"] == "interrupted"


class _Scaled(Parallel):
    """A double: accelerate scales fp16's loss on GPUs alone; here a scaler on the CPU does it."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.accelerator.scaler = torch.amp.GradScaler("cpu")
        self.accelerator.native_amp = True


@pytest.fixture
def fp16(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs in this process, in fp16."""
    monkeypatch.setattr(training_run, "Parallel", _Scaled)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fp16")
def test_an_exploding_run_in_fp16_goes_back_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As often as is allowed, although the gradient was unscaled for a step that was not taken."""
    document = _exploding(tmp_path / "run", precision__amp="fp16", monitor__rollbacks=2)
    document["optimize"]["learning_rate"] = 64.0
    document["monitor"]["stop_norm"] = 20.0
    with pytest.raises(Diverged):
        training_run.train(parse(document, "the test"))
    assert capsys.readouterr().err.count("back to step") == 2


@pytest.mark.usefixtures("fp16")
def test_the_gradient_that_an_fp16_run_blames_is_not_scaled(tmp_path: Path) -> None:
    """The largest layer's norm is within that of all."""
    document = _exploding(tmp_path / "run", precision__amp="fp16")
    document["monitor"]["stop_norm"] = 20.0
    with pytest.raises(Diverged, match=r"norm (\S+) passed") as caught:
        training_run.train(parse(document, "the test"))
    whole, largest = (
        float(found[1])
        for found in (
            re.search(r"norm (\S+) passed", caught.value.what),
            re.search(r"the largest, ([^,]+),", caught.value.why),
        )
        if found
    )
    assert largest <= 1.01 * whole


def test_another_run_s_directory_is_refused(alone: Path) -> None:
    """What would change the steps cannot change in the middle of a run; the key is named."""
    with pytest.raises(ConfigError, match=r"optimize\.batch_size"):
        train(settings(alone, optimize__batch_size=12, data__eval="training:held_out"))


def test_a_process_of_several_ends_by_its_own_code() -> None:
    """What a native library does at the end of the process cannot make a finished run a failed one."""
    aborts = (
        "import atexit, os, runpy; atexit.register(os.abort);"
        "runpy.run_module('host_trainer', run_name='__main__')"
    )
    ended = {
        world: subprocess.run(
            [sys.executable, "-c", aborts],
            env={**os.environ, "WORLD_SIZE": world},
            capture_output=True,
            text=True,
        )
        for world in ("1", "2")
    }
    assert ended["1"].returncode == -signal.SIGABRT  # so it would be
    assert ended["2"].returncode == 2
    assert "python -m host_trainer" in ended["2"].stderr
