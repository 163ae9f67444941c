"""Inference over gRPC: one request and one answer, or a stream of both.

A call whose client gives up is cancelled by gRPC, and with it the place of its request in the queue.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import Any, List, Optional, Set

import grpc

from device_agent.batching.job import Job
from device_agent.server.fields import ProtocolError
from device_agent.server.grpc_protocol import (
    Envelope,
    GrpcProtocol,
    open_envelope,
    stream_error,
    stream_response,
)
from device_agent.server.grpc_status import CountError, abort, code_of, without_frames
from device_agent.server.interface import InferRequest
from device_agent.server.service import INTERNAL_ERROR, InferenceService, Protocols

_STREAM_AHEAD = 64  # requests of one stream that are read before the oldest is answered

# Triton's clients send this header to have a failed request end its stream with a status of gRPC's.
_STRICT_ERRORS = ("triton_grpc_error", "true")

_log = logging.getLogger(__name__)


class GrpcInference:
    """The calls ``ModelInfer`` and ``ModelStreamInfer``.

    Args:
        service: what is called.
        count_error: told the status code of every failed request.
    """

    def __init__(self, service: InferenceService, count_error: CountError) -> None:
        self.count_error = count_error
        self._service = service
        self._protocols = Protocols(lambda interface: GrpcProtocol(interface, service.regions.view))
        self._streams: Set[_Stream] = set()
        self._refuses = False

    async def infer(self, message: bytes, context: Any) -> bytes:
        """Answer one ``ModelInferRequest``."""
        try:
            if self._refuses:
                raise _stopping()
            return await self.submit(open_envelope(message), final=False)
        except ProtocolError as error:
            failure = without_frames(error)
        except Exception:
            _log.exception("an inference request failed")
            failure = ProtocolError(500, INTERNAL_ERROR)
        return await abort(context, failure, self.count_error)

    async def stream(self, requests: Any, context: Any) -> None:
        """Answer the requests of a stream in their order; one that fails does not end it."""
        if self._refuses:
            await abort(context, _stopping(), self.count_error)
        stream = _Stream(self, context)
        self._streams.add(stream)
        try:
            await stream.run()
        finally:
            self._streams.discard(stream)

    def refuse(self) -> None:
        """Take no more calls; streams that are open still may send requests."""
        self._refuses = True

    def end_streams(self) -> None:
        """Read no more requests from streams; those that were read are still answered."""
        for stream in self._streams:
            stream.end()

    def submit(self, envelope: Envelope, final: bool) -> asyncio.Future[bytes]:
        """Queue a request; cancelling the result forgets it.

        Args:
            envelope: the request.
            final: say in the answer that no other follows.

        Returns:
            The ``ModelInferResponse``, or a ProtocolError.

        Raises:
            ProtocolError: the request is wrong or cannot be taken.
        """
        model = self._service.find(envelope.model, envelope.version)
        protocol = self._protocols.of(model)
        request = protocol.decode(envelope)
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        on_done = partial(self._finish, protocol, request, final, answer)
        forget = self._service.submit(model, request, on_done)
        answer.add_done_callback(lambda done: forget() if done.cancelled() else None)
        return answer

    def _finish(
        self,
        protocol: GrpcProtocol,
        request: InferRequest,
        final: bool,
        answer: asyncio.Future[bytes],
        job: Job,
    ) -> None:
        """Hand over what came of a job. Must not raise: the other requests of its batch come after it."""
        name = protocol.interface.name
        if answer.done():
            return
        try:
            answer.set_result(protocol.encode(request, self._service.outputs_of(name, job), final))
        except ProtocolError as error:
            answer.set_exception(without_frames(error))  # nobody may be left to take it
        except Exception:
            _log.exception("the answer of model %s could not be written", name)
            answer.set_exception(ProtocolError(500, INTERNAL_ERROR))


def _stopping() -> ProtocolError:
    """What is answered to those who come too late."""
    return ProtocolError(503, "the agent is stopping")


class _Stream:
    """One call of ``ModelStreamInfer``: requests are queued as they are read, and answered in that order."""

    def __init__(self, inference: GrpcInference, context: Any) -> None:
        self._inference = inference
        self._context = context
        self._is_strict = _STRICT_ERRORS in (tuple(item) for item in context.invocation_metadata() or ())
        self._answers: asyncio.Queue[Optional[asyncio.Task[bytes]]] = asyncio.Queue()
        self._slots = asyncio.Semaphore(_STREAM_AHEAD)
        self._reader: Optional[asyncio.Task[None]] = None
        self._is_ended = False

    async def run(self) -> None:
        """Answer until the client has no more requests, or the server ends the stream."""
        self._reader = asyncio.get_running_loop().create_task(self._read())
        failure: Optional[ProtocolError] = None
        try:
            await self._write()
        except ProtocolError as error:
            failure = without_frames(error)
        finally:
            self._reader.cancel()
            self._forget_unanswered()
        if failure is None and self._is_ended:
            failure = _stopping()
        if failure is not None:
            await abort(self._context, failure, self._inference.count_error)

    def end(self) -> None:
        """Read no more."""
        self._is_ended = True
        if self._reader is not None:
            self._reader.cancel()

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                await self._slots.acquire()
                message = await self._context.read()
                if message is grpc.aio.EOF:
                    return
                self._answers.put_nowait(loop.create_task(self._answer(message)))
        finally:
            self._answers.put_nowait(None)

    async def _write(self) -> None:
        while True:
            answer = await self._answers.get()
            if answer is None:
                return
            await self._context.write(await answer)
            self._slots.release()

    async def _answer(self, message: bytes) -> bytes:
        request_id: Optional[str] = None
        try:
            envelope = open_envelope(message)
            request_id = envelope.id
            return stream_response(await self._inference.submit(envelope, final=True))
        except ProtocolError as error:
            failure = without_frames(error)
        except Exception:
            _log.exception("an inference request of a stream failed")
            failure = ProtocolError(500, INTERNAL_ERROR)
        if self._is_strict:
            raise failure
        self._inference.count_error(code_of(failure).name)
        return stream_error(request_id, failure.message)

    def _forget_unanswered(self) -> None:
        left: List[asyncio.Task[bytes]] = []
        while not self._answers.empty():
            answer = self._answers.get_nowait()
            left += [answer] if answer is not None else []
        for answer in left:
            answer.cancel()
