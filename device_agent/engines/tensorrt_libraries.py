"""Which kernels TensorRT may try: those of cuDNN and cuBLAS only where these libraries work.

TensorRT 8 asks them for kernels by default, and its builder fails where they are missing or are not what they
seem (in containers they often are left out). TensorRT's own kernels do without.
"""

from __future__ import annotations

import ctypes
from typing import List, Optional, Tuple

from device_agent.engines.tensorrt_module import TensorRt

_OWN = ("EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS")
#: Source, the names of its library by CUDA (8.6 comes for 11 and for 12: JetPack 6.0 has the latter), and a
#: function of it that tells its version.
_OTHERS = (
    ("CUBLAS", ("libcublas.so.11", "libcublas.so.12"), "cublasGetCudartVersion"),
    ("CUBLAS_LT", ("libcublasLt.so.11", "libcublasLt.so.12"), "cublasLtGetVersion"),
    ("CUDNN", ("libcudnn.so.8",), "cudnnGetVersion"),
)
_SMALLEST_VERSION = 1000  # of any of these, as they write it


def tactic_sources(trt: TensorRt) -> Optional[Tuple[str, ...]]:
    """Names of ``trt.TacticSource`` to build with; None: TensorRT's own choice, which is right from 10 on."""
    if not hasattr(trt, "TacticSource") or hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        return None
    working: List[str] = [
        source for source, libraries, probe in _OTHERS if any(_works(library, probe) for library in libraries)
    ]
    if len(working) == len(_OTHERS):
        return None
    return tuple(name for name in (*_OWN, *working) if hasattr(trt.TacticSource, name))


def _works(library: str, probe: str) -> bool:
    try:
        function = getattr(ctypes.CDLL(library), probe)
    except (OSError, AttributeError):
        return False
    function.restype = ctypes.c_size_t
    return int(function()) > _SMALLEST_VERSION
