"""Calibration: ranges of activations, scales, and the INT8 and FP16 graphs made from them.

from calibration import calibrate, quantize

scales = calibrate(model, samples)
int8 = quantize(model, scales).model
"""

from calibration.choice import METHODS, Attempt, Choice, Options, choose
from calibration.errors import CalibrationError
from calibration.fp16 import Fp16Report, to_fp16
from calibration.prepare import prepare
from calibration.progress import ProgressBar
from calibration.protection import Protected, protect
from calibration.quantizer import Quantized, Report, quantize
from calibration.runner import calibrate, calibrate_each
from calibration.scales import Scales, TensorRange, load
from calibration.sensitivity import LayerSensitivity, sensitivity, sqnr_db
from calibration.storage import load_model, save_model
from calibration.tensorrt_cache import layer_precisions, read_cache, write_cache

__all__ = [
    "METHODS",
    "Attempt",
    "CalibrationError",
    "Choice",
    "Fp16Report",
    "LayerSensitivity",
    "Options",
    "ProgressBar",
    "Protected",
    "Quantized",
    "Report",
    "Scales",
    "TensorRange",
    "calibrate",
    "calibrate_each",
    "choose",
    "layer_precisions",
    "load",
    "load_model",
    "prepare",
    "protect",
    "quantize",
    "read_cache",
    "save_model",
    "sensitivity",
    "sqnr_db",
    "to_fp16",
    "write_cache",
]
