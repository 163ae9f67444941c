"""ONNX Runtime sessions on this machine's CPU, opened the same way everywhere."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.errors import BadInput
from edgekit.tensors import Arrays


class Session:
    """An ONNX graph, ready to run.

    Attributes:
        outputs: names of the outputs, in order.
    """

    def __init__(
        self, graph: Path | bytes, threads: int | None = None, profile_prefix: Path | None = None
    ) -> None:
        """Load the graph.

        Args:
            graph: an ``.onnx`` file, or a serialized model.
            threads: of one run; None: one a physical core, at most as many as this process may use.
            profile_prefix: where to write what each kernel took; None: it is not looked at.

        Raises:
            BadInput: ONNX Runtime does not accept the graph.
        """
        import onnxruntime

        from calibration.session import exact_session

        onnxruntime.set_default_logger_severity(3)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or default_threads()
        options.inter_op_num_threads = 1
        # A session's idle threads otherwise spin on into the next session's turn: two sessions that take
        # turns on two cores were each measured at twice their latency.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.log_severity_level = 3
        if profile_prefix is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile_prefix)
        try:
            source = str(graph) if isinstance(graph, Path) else graph
            self._session = exact_session(source, options)
        except Exception as error:  # ONNX Runtime's own exceptions share no base class
            name = graph.name if isinstance(graph, Path) else "the graph"
            raise BadInput(
                f"ONNX Runtime {onnxruntime.__version__} does not accept {name}",
                str(error).strip().splitlines()[0],
                "check the model with `python -m onnx.checker`, or use another precision",
            ) from error
        self.inputs = tuple(tensor.name for tensor in self._session.get_inputs())
        self.outputs = tuple(tensor.name for tensor in self._session.get_outputs())

    def run(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """Run once; arrays by output name."""
        feed = {name: inputs[name] for name in self.inputs}
        return dict(zip(self.outputs, self._session.run(None, feed), strict=True))

    def end_profile(self) -> Path:
        """The file of a session that was opened with ``profile_prefix``, which records no more."""
        return Path(self._session.end_profiling())


class Chain:
    """A model with what is computed behind it; runs as one, and gives the outputs of both.

    Attributes:
        outputs: names of the outputs, the model's first.
    """

    def __init__(self, model: Session, behind: Session | None) -> None:
        self._model = model
        self._behind = behind
        self.inputs = model.inputs
        self.outputs = model.outputs + (behind.outputs if behind else ())

    def run(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """Run once; arrays by output name."""
        made = self._model.run(inputs)
        return made if self._behind is None else {**made, **self._behind.run(made)}


def open_chain(graph: Path | bytes, behind: bytes | None, threads: int | None = None) -> Chain:
    """Load a model's graph, and the graph behind it if there is one; raises BadInput as ``Session``."""
    return Chain(Session(graph, threads), None if behind is None else Session(behind, threads))


def default_threads() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def version() -> str:
    """Version of ONNX Runtime."""
    import onnxruntime

    return str(onnxruntime.__version__)
