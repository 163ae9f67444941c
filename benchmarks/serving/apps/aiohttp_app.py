"""A floor: one aiohttp route that runs the model, without a queue. ``aiohttp_app.py PORT``."""

from __future__ import annotations

import sys

import numpy as np
from aiohttp import web
from onnx_models import open_models

MODELS = open_models()


async def infer(request: web.Request) -> web.Response:
    """One row of raw FP32 in, one out."""
    model = MODELS[request.match_info["model"]]
    rows = np.frombuffer(await request.read(), dtype=np.float32).reshape(1, *model.shape)
    return web.Response(body=model.run(rows).tobytes())


def main() -> None:
    """Serve until SIGTERM."""
    application = web.Application(client_max_size=1 << 26)
    application.router.add_post("/v2/models/{model}/infer", infer)
    web.run_app(application, host="127.0.0.1", port=int(sys.argv[1]), access_log=None, print=None)


if __name__ == "__main__":
    main()
