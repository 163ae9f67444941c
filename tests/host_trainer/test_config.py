"""The configuration: every key is checked before anything is loaded, and an error names the key."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from host_trainer import config
from host_trainer.errors import ConfigError

SMALLEST = 'run = "runs/a"\n[model]\nsource = "zoo:net"\n[data]\ntrain = "images"\n'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The shortest configuration that there is."""
    path = tmp_path / "config.toml"
    path.write_text(SMALLEST)
    return path


def test_defaults_make_a_whole_run(file: Path) -> None:
    """A run, a model and data are enough."""
    loaded = config.load(file)
    assert loaded.run == Path("runs/a")
    assert loaded.optimize.batch_size == 32
    assert loaded.precision.amp == "no"


def test_the_command_line_wins(file: Path) -> None:
    """``key=value`` is TOML where it can be, else a string; a section that the file lacks is made."""
    loaded = config.load(
        file, ["optimize.learning_rate=3e-4", "run=runs/b", "precision.compile=true", "monitor.stop_norm=inf"]
    )
    assert loaded.optimize.learning_rate == 3e-4
    assert loaded.run == Path("runs/b")
    assert loaded.precision.compile
    assert loaded.monitor.stop_norm == float("inf")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["optimize.learning_rte=1"], "did you mean 'learning_rate'"),
        (["optimise.epochs=1"], "did you mean 'optimize'"),
        (["optimize.learning_rate=-1"], r"optimize\.learning_rate"),
        (["optimize.micro_batch_size=64"], r"optimize\.micro_batch_size is larger than optimize\.batch_size"),
        (["parallel.processes=3"], r"optimize\.batch_size 32 cannot be shared by 3 processes"),
        (["parallel.nodes=2"], r"parallel\.rendezvous"),
        (["parallel.strategy=fsdp", "precision.amp=fp16"], r"precision\.amp fp16"),
        (["data.image_mean=[0.5]"], r"data\.image_mean and data\.image_std"),
        (["model.source=models/bert", "model.weights=w.safetensors"], r"model\.weights"),
        (["monitor.healthy_norm=[10, 0.1]"], r"monitor\.healthy_norm"),
        (["monitor.stop_norm=5"], r"monitor\.stop_norm"),
        (["epochs"], "sets nothing"),
        (["run.name=a"], "'run' in 'run.name=a' is no section"),
    ],
)
def test_what_is_wrong_is_named(file: Path, overrides: list[str], said: str) -> None:
    """Unknown keys, values out of range and contradictions: three lines, with the key in them."""
    with pytest.raises(ConfigError) as caught:
        config.load(file, overrides)
    assert caught.value.exit_code == 2
    assert len(str(caught.value).splitlines()) == 3
    assert caught.match(said)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"run =", b"[data]\ntrain = 'x'\n"])
def test_a_file_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    """Not text, not TOML, or without what has no default."""
    path = tmp_path / "config.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError):
        config.load(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(tmp_path / "missing.toml")


@given(batch=st.integers(1, 300), largest=st.integers(0, 300), processes=st.integers(1, 8))
def test_a_step_is_shared_evenly_or_not_at_all(batch: int, largest: int, processes: int) -> None:
    """What passes the check gives each process the same number of micro-batches of one size."""
    from host_trainer.data import share

    document = {
        "run": "r", "model": {"source": "zoo:net"}, "data": {"train": "x"},
        "optimize": {"batch_size": batch, "micro_batch_size": min(largest, batch)},
    }  # fmt: skip
    loaded = config.parse(document, "here")
    try:
        parts = [share(loaded, rank, processes) for rank in range(processes)]
    except ConfigError as error:
        assert "optimize." in error.what  # noqa: PT017  # the error is one of two right answers
        return
    assert sum(part.accumulated * part.micro_batch_size for part in parts) == batch
    assert all(not largest or part.micro_batch_size <= largest for part in parts)
