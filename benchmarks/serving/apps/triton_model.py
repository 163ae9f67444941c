"""Triton's Python backend on the same session; a batch that Triton formed runs as one."""

import json

import numpy as np
import triton_python_backend_utils as pb_utils
from onnx_models import open_model


class TritonPythonModel:
    """What the Python backend looks for in ``model.py``."""

    def initialize(self, args):
        """Open the ONNX file that the configuration names."""
        parameters = json.loads(args["model_config"])["parameters"]
        self.model = open_model(
            parameters["path"]["string_value"], json.loads(parameters["shape"]["string_value"])
        )

    def execute(self, requests):
        """Answer the requests in order."""
        arrays = [pb_utils.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
        answers = self.model.run(arrays[0] if len(arrays) == 1 else np.concatenate(arrays))
        responses, start = [], 0
        for array in arrays:
            part = answers[start : start + len(array)]
            start += len(array)
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("y", part)]))
        return responses
