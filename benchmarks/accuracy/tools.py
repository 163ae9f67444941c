"""The tools that are compared: each writes an INT8 ONNX graph from the same float model and the same rows."""

from __future__ import annotations

import contextlib
import io
import logging
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from serving import venvs

from accuracy.case import JUDGING_FRACTION, Case, Feed

NNCF = venvs.Environment(
    "nncf", ("nncf==3.4.0", "onnx==1.23.2", "onnxruntime==1.32.0", "numpy==2.4.6")
)  # fmt: skip
_WORKER = Path(__file__).with_name("nncf_worker.py")
_NNCF_TIMEOUT_S = 1200
_THREADS = 1


class ToolFailed(Exception):
    """A tool wrote no graph; says why in one line."""


@dataclass(frozen=True)
class Result:
    """What a tool did.

    Attributes:
        settings: what it chose by itself, if anything.
        attempts: the score of all that it tried, by name.
    """

    settings: str = ""
    attempts: Mapping[str, float] | None = None


#: From a float model and calibration rows to an INT8 model at a path.
Tool = Callable[[Case, Path, Sequence[Feed], Path], Result]


def ours(case: Case, model: Path, rows: Sequence[Feed], out: Path) -> Result:
    """``calibration.choose`` as it comes, without labels: judged by the outputs' signal to noise."""
    import onnx

    from calibration import CalibrationError, Options, choose

    cut = round(len(rows) * (1 - JUDGING_FRACTION))
    try:
        choice = choose(onnx.load(str(model)), rows[:cut], rows[cut:], Options(threads=_THREADS))
    except CalibrationError as error:
        raise ToolFailed(f"{error.what}: {error.why}") from error
    onnx.save(choice.quantized.model, str(out))
    return Result(" + ".join((choice.observer, *choice.methods)), choice.scores)


def onnxruntime_static(
    method: str,
    case: Case,
    model: Path,
    rows: Sequence[Feed],
    out: Path,
    *,
    operators: Sequence[str] | None = None,
) -> Result:
    """``quantize_static`` as its guide recommends for x86 with VNNI: Q/DQ, u8 activations, per channel.

    Args:
        method: a ``CalibrationMethod`` of onnxruntime.
        case: the model.
        model: its float graph.
        rows: what is calibrated on.
        out: where the INT8 graph goes.
        operators: types of operators to quantize; None: all that onnxruntime can.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    # Rows of different lengths cannot be stacked, so the calibrator then gets them one by one.
    options = {} if case.fixed_length else {"CalibStridedMinMax": 1}
    with _silent():
        try:
            quantize_static(
                model, out, _reader(rows), quant_format=QuantFormat.QDQ, per_channel=True,
                op_types_to_quantize=operators, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod[method], extra_options=options,
            )  # fmt: skip
        except Exception as error:  # whatever stops it is what the table says
            raise ToolFailed(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}") from error
    return Result()


def nncf(case: Case, model: Path, rows: Sequence[Feed], out: Path) -> Result:
    """NNCF's post-training quantization for ONNX, in an environment of its own, with its defaults."""
    try:
        venvs.prepare(NNCF)
    except venvs.EnvironmentFailed as error:
        raise ToolFailed(f"not installed: {error}") from error
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        samples = Path(temporary) / "rows.npz"
        named: dict[str, Any] = {
            f"{i}/{name}": value for i, row in enumerate(rows) for name, value in row.items()
        }
        np.savez(samples, **named)
        command: list[str | Path] = [NNCF.python, _WORKER, model, samples, out]
        if case.transformer:
            command.append("--transformer")
        done = subprocess.run(command, capture_output=True, text=True, timeout=_NNCF_TIMEOUT_S)
    if done.returncode != 0:
        raise ToolFailed((done.stderr.strip().splitlines() or ["no output"])[-1])
    return Result()


#: With all operator types, which is onnxruntime's default, transformers collapse. Those who know that hold it
#: to the linear ones, so on transformers ours is judged against the better of both.
_LINEAR = ("Conv", "MatMul", "Gemm")
_ort_linear = partial(onnxruntime_static, operators=_LINEAR)

#: By the name in the table.
TOOLS: Mapping[str, Tool] = {
    "ours": ours,
    "ort_minmax": partial(onnxruntime_static, "MinMax"),
    "ort_entropy": partial(onnxruntime_static, "Entropy"),
    "ort_percentile": partial(onnxruntime_static, "Percentile"),
    "ort_minmax_linear": partial(_ort_linear, "MinMax"),
    "ort_entropy_linear": partial(_ort_linear, "Entropy"),
    "ort_percentile_linear": partial(_ort_linear, "Percentile"),
    "nncf": nncf,
}
PEERS = tuple(name for name in TOOLS if name != "ours")


def applies(name: str, case: Case) -> bool:
    """Whether a tool is run on a model: onnxruntime's linear variants are peers on transformers only."""
    return case.transformer or not name.endswith("_linear")


def _reader(rows: Sequence[Feed]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime ships no types
        def __init__(self) -> None:
            self.rows = iter(rows)

        def __len__(self) -> int:
            return len(rows)

        def set_range(self, start_index: int, end_index: int) -> None:
            self.rows = iter(rows[start_index:end_index])

        def get_next(self) -> Feed | None:
            return next(self.rows, None)

    return Reader()


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep what onnxruntime prints and logs while it calibrates from the document."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
        sys.stdout.flush()
