"""Clients of gRPC, good and bad."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import grpc
import grpc.aio
import numpy as np
from tritonclient.grpc import service_pb2

from serving.soaking.link import HANG_S
from serving.soaking.site import Soaked
from serving.soaking.tally import Tally

_UNARY = "/inference.GRPCInferenceService/ModelInfer"
_STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
_MAX_REQUESTS = 20
_CODES = {
    grpc.StatusCode.OK: 200,
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.INTERNAL: 500,
    grpc.StatusCode.UNAVAILABLE: 503,
}


class RpcClient:
    """One client that sends requests, streams, nonsense, and gives up, on a channel for each visit."""

    def __init__(self, soaked: Soaked, tally: Tally, address: str, seed: int) -> None:
        self._soaked = soaked
        self._tally = tally
        self._address = address
        self._rng = random.Random(seed)
        self._ways = (self._ask, self._ask, self._stream, self._give_up, self._drop_stream, self._damage)

    async def visit(self) -> None:
        """Do one of these things."""
        way = self._rng.choice(self._ways)
        self._tally.actions[f"rpc {way.__name__.strip('_')}"] += 1
        async with grpc.aio.insecure_channel(self._address) as channel:
            await way(channel)

    async def _ask(self, channel: Any) -> None:
        for _ in range(self._rng.randint(1, _MAX_REQUESTS)):
            model, statuses, message = self._request()
            status, answer = await _outcome(channel.unary_unary(_UNARY)(message, timeout=HANG_S))
            self._note(model, status, statuses)
            if answer is not None:
                self._check(model, service_pb2.ModelInferResponse.FromString(answer))

    async def _stream(self, channel: Any) -> None:
        several = [self._request() for _ in range(self._rng.randint(1, _MAX_REQUESTS))]
        call = channel.stream_stream(_STREAM)(iter([message for _, _, message in several]), timeout=HANG_S)
        answers = [service_pb2.ModelStreamInferResponse.FromString(answer) async for answer in call]
        if len(answers) != len(several):
            self._tally.violate(f"a stream of {len(several)} requests got {len(answers)} answers")
        for (model, statuses, _), answer in zip(several, answers, strict=False):
            if answer.error_message:
                self._tally.uncertain[model] += 1  # the text is all that a stream says of the cause
                if statuses == (200,):
                    self._tally.violate(f"{model} failed in a stream: {answer.error_message[:200]}")
            else:
                self._tally.answered(model, 200)
                self._check(model, answer.infer_response)

    async def _give_up(self, channel: Any) -> None:
        model, _, message = self._request()
        self._tally.uncertain[model] += 1
        call = channel.unary_unary(_UNARY)(message, timeout=HANG_S)
        await asyncio.sleep(self._rng.random() * 0.005)
        call.cancel()

    async def _drop_stream(self, channel: Any) -> None:
        call = channel.stream_stream(_STREAM)()
        for _ in range(self._rng.randint(0, _MAX_REQUESTS)):
            model, _, message = self._request()
            self._tally.uncertain[model] += 1
            await call.write(message)
        await asyncio.sleep(self._rng.random() * 0.005)
        call.cancel()

    async def _damage(self, channel: Any) -> None:
        model, _, message = self._request()
        self._tally.uncertain[model] += 1
        data = bytearray(message)
        for _ in range(self._rng.randint(1, 4)):
            data[self._rng.randrange(len(data))] = self._rng.randrange(256)
        status, _ = await _outcome(channel.unary_unary(_UNARY)(bytes(data), timeout=HANG_S))
        self._tally.statuses[status] += 1

    def _request(self) -> tuple[str, tuple[int, ...], bytes]:
        """The model, the statuses that may come, and the message."""
        model = self._rng.choices(("tiny", "cnn", "spare", "fragile"), (60, 10, 20, 10))[0]
        row, statuses = self._soaked.models[model].row, (200, 404) if model == "spare" else (200,)
        if model == "fragile" and self._rng.random() < 0.3:
            row, statuses = np.full_like(row, 1e6), (500,)
        request = service_pb2.ModelInferRequest(model_name=model, id=str(self._rng.random()))
        tensor = request.inputs.add(name="x", datatype="FP32", shape=row.shape)
        if self._rng.random() < 0.3:
            tensor.contents.fp32_contents.extend(row.ravel().tolist())
        else:
            request.raw_input_contents.append(row.tobytes())
        if self._rng.random() < 0.2:
            request.parameters["timeout"].int64_param = self._rng.randint(1, 20_000)
            statuses = (*statuses, 503)
        return model, statuses, request.SerializeToString()

    def _note(self, model: str, status: int, statuses: tuple[int, ...]) -> None:
        self._tally.answered(model, status)
        if status not in statuses:
            self._tally.violate(f"{model} over gRPC: {status} where one of {statuses} was due")

    def _check(self, model: str, answer: Any) -> None:
        expected = self._soaked.answers[model, answer.model_version]
        if list(answer.raw_output_contents) != [expected.tobytes()]:
            self._tally.violate(f"{model} over gRPC: another answer than ONNX Runtime's")


async def _outcome(call: Any) -> tuple[int, bytes | None]:
    """The status as HTTP has it, and the answer where there is one."""
    try:
        return 200, await call
    except grpc.aio.AioRpcError as error:
        return _CODES.get(error.code(), 0), None
