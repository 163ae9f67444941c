"""Opening a model in ONNX Runtime on the CPU."""

from __future__ import annotations

import onnxruntime as ort
from onnx import ModelProto

from calibration.errors import CalibrationError

_ERRORS_ONLY = 4


def open_session(model: ModelProto, threads: int = 0) -> ort.InferenceSession:
    """A session on the CPU provider.

    Args:
        model: a float or quantized model.
        threads: within one operator; 0 leaves the choice to ONNX Runtime.

    Raises:
        CalibrationError: ONNX Runtime refuses the model.
    """
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.intra_op_num_threads = threads
    try:
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors share no base class below Exception
        raise CalibrationError(
            "ONNX Runtime cannot load the model",
            str(error).strip().splitlines()[0],
            "check the file with onnx.checker, or export it again",
        ) from error
