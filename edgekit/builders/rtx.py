"""TensorRT-RTX in a process of its own: a graph that makes it crash costs an answer, not the run.

ask([Job("model.onnx")])                              does its parser take the graph?
ask([Job("model.onnx", "SM89", shapes, "m.engine")])  build an engine for a GPU that need not be here
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgekit.builders import child

_NOT_INSTALLED = "TensorRT-RTX is not installed here (the package tensorrt-rtx-cu13)"


@dataclass(frozen=True)
class Job:
    """A question.

    Attributes:
        graph: an ``.onnx`` file.
        architecture: such as ``SM89``; None: only parse.
        shapes: input -> least, usual and most, as in ``ShapeRange``; empty where all sizes are fixed.
        engine: file to write the engine to.
    """

    graph: str
    architecture: str | None = None
    shapes: Mapping[str, Mapping[str, Sequence[int]]] | None = None
    engine: str | None = None


@dataclass(frozen=True)
class Answer:
    """What TensorRT-RTX said.

    Attributes:
        version: of it; None where it is not installed.
        accepted: whether it parsed, or built where that was asked.
        why: its own words, where it did not.
        needs_gpu: it could not say, for it asks for a GPU to read the graph (RoiAlign).
        layer_listing: of the engine that was built, in its words; see ``engine_layers``.
    """

    version: str | None
    accepted: bool
    why: str
    layer_listing: str = ""
    needs_gpu: bool = False


def ask(jobs: Sequence[Job], timeout_s: float) -> list[Answer]:
    """Answer every job in turn; after a crash the next process goes on with the job behind it.

    Args:
        jobs: the questions.
        timeout_s: the longest that one process may take.
    """
    answers: list[Answer] = []
    while len(answers) < len(jobs):
        rest = [asdict(job) for job in jobs[len(answers) :]]
        found, how = child.ask(__name__, rest, timeout_s)
        answers += [Answer(**raw) for raw in found]
        if len(found) < len(rest):
            answers.append(Answer(None, False, f"TensorRT-RTX {how}"))
    return answers


# The child


def _answer(job: Job) -> Answer:
    try:
        import tensorrt_rtx as trt
    except ImportError:
        return Answer(None, False, _NOT_INSTALLED)
    from device_agent.engines.tensorrt_settings import BuildError, NeedsGpu

    version = str(trt.__version__)
    try:
        return Answer(version, True, "", _do(trt, job))
    except BuildError as error:
        return Answer(version, False, str(error), needs_gpu=isinstance(error, NeedsGpu))


def _do(trt: Any, job: Job) -> str:
    """Do it; returns the list of layers of what was built."""
    from device_agent.engines.tensorrt_build import build_engine, read_graph
    from device_agent.engines.tensorrt_settings import BuildError, BuildSettings
    from device_agent.manifest import ShapeRange

    graph = Path(job.graph).read_bytes()
    if job.architecture is None or job.engine is None:
        read_graph(trt, graph, job.graph)
        return ""
    if not hasattr(trt.ComputeCapability, job.architecture):
        raise BuildError(f"TensorRT-RTX {trt.__version__} does not build for {job.architecture}")
    ranges = {
        name: ShapeRange(*(tuple(shape[key]) for key in ("least", "usual", "most")))
        for name, shape in (job.shapes or {}).items()
    }
    settings = BuildSettings(profiles=(ranges,) if ranges else (), compute_capabilities=(job.architecture,))
    built = build_engine(trt, graph, settings, job.graph)
    Path(job.engine).write_bytes(built.engine)
    return built.layer_listing


if __name__ == "__main__":
    child.serve(lambda raw: asdict(_answer(Job(**raw))))
