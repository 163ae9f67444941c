"""What models are trained with, and what runs them: imported, or started, to see that it does."""

from __future__ import annotations

import tempfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from edgekit.doctor.finding import Finding

_RTX_TIMEOUT_S = 60


def look() -> list[Finding]:
    """A line each."""
    return [_torch(), *_onnxruntime(), _tensorrt_rtx(), _tensorrt()]


def _torch() -> Finding:
    try:
        import torch
    except Exception as error:  # a build for another CUDA or glibc fails in ways of its own
        return _broken("torch", error)
    if not torch.cuda.is_available():
        return Finding("torch", "ok", f"{torch.__version__} on the CPU; no GPU that it can use")
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return Finding("torch", "ok", f"{torch.__version__}, CUDA {torch.version.cuda}: {', '.join(names)}")


def _onnxruntime() -> list[Finding]:
    try:
        import onnxruntime
    except Exception as error:  # as above
        return [_broken("onnxruntime", error)]
    providers = [name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()]
    return [Finding("onnxruntime", "ok", f"{onnxruntime.__version__}: {', '.join(providers)}")]


def _broken(name: str, error: Exception) -> Finding:
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    return Finding(name, "missing", f"it cannot be imported: {said}", f"pip install --force-reinstall {name}")


def _tensorrt_rtx() -> Finding:
    """Asks its parser, in a process of its own: what is installed need not run here."""
    from edgekit.builders import rtx

    use = "engines ahead of time for RTX cards, and a second opinion of `edgekit check`"
    if find_spec("tensorrt_rtx") is None:
        return Finding("tensorrt-rtx", "absent", f"for {use}", "pip install tensorrt-rtx-cu13")
    with tempfile.TemporaryDirectory(prefix="edgekit-") as temporary:
        graph = Path(temporary, "relu.onnx")
        graph.write_bytes(_smallest_graph())
        (answer,) = rtx.ask([rtx.Job(str(graph))], _RTX_TIMEOUT_S)
    if answer.accepted:
        return Finding("tensorrt-rtx", "ok", f"{answer.version}: {use}")
    return Finding("tensorrt-rtx", "warning", f"it does not run: {answer.why}", "install another version")


def _smallest_graph() -> bytes:
    from onnx import TensorProto, helper

    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 8]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "doctor", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def _tensorrt() -> Finding:
    if find_spec("tensorrt") is None:
        detail = "not needed here: a device that has it builds its engine from the bundle"
        return Finding("tensorrt", "absent", detail)
    try:
        version = metadata.version("tensorrt")
    except metadata.PackageNotFoundError:
        version = "version unknown"
    return Finding("tensorrt", "ok", f"{version}: an agent on this machine can build and serve its engines")
