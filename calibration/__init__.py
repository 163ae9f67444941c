"""Calibration: ranges of activations, scales, and the INT8 and FP16 graphs made from them.

from calibration import calibrate, quantize

scales = calibrate(model, samples)
int8 = quantize(model, scales).model
"""

from importlib import import_module
from typing import TYPE_CHECKING

from calibration.errors import CalibrationError, NothingToQuantize
from calibration.prepare import prepare
from calibration.runner import calibrate, calibrate_each
from calibration.scales import Scales, TensorRange, load
from calibration.storage import load_model, save_model

if TYPE_CHECKING:
    from calibration.choice import METHODS, Attempt, Choice, Options, choose
    from calibration.fp16 import Fp16Report, to_fp16
    from calibration.layer_sensitivity import LayerSensitivity, sensitivity, sqnr_db
    from calibration.progress import ProgressBar
    from calibration.protection import Protected, protect
    from calibration.quantizer import Quantized, Report, quantize
    from calibration.tensorrt_cache import layer_precisions, read_cache, write_cache

#: What ``calibrate`` does not need is imported when it is first asked for. No module here may be called like
#: a name that it gives: the import of a module sets that name in this package.
_MODULES = {
    "calibration.choice": ("METHODS", "Attempt", "Choice", "Options", "choose"),
    "calibration.fp16": ("Fp16Report", "to_fp16"),
    "calibration.layer_sensitivity": ("LayerSensitivity", "sensitivity", "sqnr_db"),
    "calibration.progress": ("ProgressBar",),
    "calibration.protection": ("Protected", "protect"),
    "calibration.quantizer": ("Quantized", "Report", "quantize"),
    "calibration.tensorrt_cache": ("layer_precisions", "read_cache", "write_cache"),
}

__all__ = [
    "METHODS",
    "Attempt",
    "CalibrationError",
    "Choice",
    "Fp16Report",
    "LayerSensitivity",
    "NothingToQuantize",
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


def __getattr__(name: str) -> object:
    """Import what is asked for (PEP 562)."""
    for module, names in _MODULES.items():
        if name in names:
            value: object = getattr(import_module(module), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
