"""LitServe with one API for each model, on the same session. ``litserve_app.py PORT BATCHED_MODEL...``."""

import sys

import litserve
from onnx_models import described, open_model

MAX_BATCH_SIZE = 16


class OnnxAPI(litserve.LitAPI):
    """One model; rows come as Base64 in JSON."""

    def __init__(self, name, batched):
        super().__init__(
            api_path=f"/{name}",
            max_batch_size=MAX_BATCH_SIZE if batched else 1,
            batch_timeout=0.001 if batched else 0.0,
        )
        self._name = name
        self._batched = batched

    def setup(self, device):
        """Open the ONNX file in the worker."""
        self._model = open_model(**described()[self._name])

    def decode_request(self, request):
        """The row, still as text."""
        return request["x"]

    def batch(self, inputs):
        """Rows are put together when they are decoded."""
        return inputs

    def predict(self, x):
        """Answer one row, or a batch of them."""
        return self._model.run_text(x) if self._batched else self._model.run_text([x])[0]

    def unbatch(self, output):
        """One answer for each row."""
        return output

    def encode_response(self, output):
        """The answer as JSON."""
        return {"y": output}


if __name__ == "__main__":
    apis = [OnnxAPI(name, name in sys.argv[2:]) for name in described()]
    server = litserve.LitServer(apis, accelerator="cpu", workers_per_device=1)
    server.run(
        host="127.0.0.1", port=int(sys.argv[1]), num_api_servers=1, generate_client_file=False,
        log_level="error", access_log=False,
    )  # fmt: skip
