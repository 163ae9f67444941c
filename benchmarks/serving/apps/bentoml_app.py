"""A BentoML service on the same sessions; rows come as Base64 in JSON."""

import bentoml
from onnx_models import open_models


@bentoml.service(workers=1, traffic={"timeout": 60}, logging={"access": {"enabled": False}})
class Service:
    """One API for each model. ``mlp`` batches, since it pays there."""

    def __init__(self):
        self._models = open_models()

    @bentoml.api
    async def tiny(self, x: str) -> str:
        """One row."""
        return self._models["tiny"].run_text([x])[0]

    @bentoml.api
    async def cnn(self, x: str) -> str:
        """One row."""
        return self._models["cnn"].run_text([x])[0]

    @bentoml.api(batchable=True, max_batch_size=16, max_latency_ms=60_000)
    async def mlp(self, x: list[str]) -> list[str]:
        """A batch."""
        return self._models["mlp"].run_text(x)
