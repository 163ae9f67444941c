"""The engine process: ``python -m device_agent.engines.worker CHANNEL REQUEST ANSWER PARENT``.

Opens one engine and runs what it is told to until the agent closes the channel. The numbers are inherited
descriptors, a socket and two memfds, and the agent's process id. It imports no server and no store.
"""

from __future__ import annotations

import json
import logging
import signal
import socket
import sys
from dataclasses import asdict
from typing import List, Optional

from device_agent import engines
from device_agent.affinity import place_process
from device_agent.ending import die_with, prefer_to_be_ended
from device_agent.engines import process_messages as messages
from device_agent.engines.base import Engine, EngineError, InputError
from device_agent.engines.process_memory import SharedMemory, read_tensors, write_tensors
from device_agent.engines.source import settings_of, source_of
from device_agent.errors import AgentError, Missing

_OOM_SCORE = 500  # the kernel ends an engine, which is started again, rather than the agent

_log = logging.getLogger(__name__)


def main(arguments: List[str]) -> int:
    """Serve one engine until the channel is closed."""
    channel_fd, request_fd, answer_fd, parent = map(int, arguments)
    die_with(parent)
    prefer_to_be_ended(_OOM_SCORE)
    # The agent ends this process; a signal to the whole group (Ctrl-C, systemd) must not come before that.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=channel_fd) as channel:
        try:
            engine = _open(channel)
            if engine is None:
                return 1
            _serve(channel, engine, SharedMemory(request_fd), SharedMemory(answer_fd))
        except messages.ConnectionLost:
            return 0
    return 0


def _open(channel: socket.socket) -> Optional[Engine]:
    _, body = messages.receive(channel)
    document = json.loads(body)
    settings = settings_of(document["settings"])
    try:
        place_process(settings.placement)
        engine = engines.open_here(source_of(document["source"]), settings)
    except AgentError as error:
        refusal = {"what": error.what, "why": error.why, "fix": error.fix}
        messages.send_json(channel, messages.REFUSED, {**refusal, "missing": isinstance(error, Missing)})
        return None
    ready = {
        "runtime": engine.runtime,
        "inputs": [asdict(spec) for spec in engine.inputs],
        "outputs": [asdict(spec) for spec in engine.outputs],
        "memory_policy": engine.memory_policy,
    }
    messages.send_json(channel, messages.READY, ready)
    return engine


def _serve(channel: socket.socket, engine: Engine, request: SharedMemory, answer: SharedMemory) -> None:
    while True:
        _, header = messages.receive(channel)
        try:
            outputs = engine.run(read_tensors(request, engine.inputs, header))
            done = write_tensors(answer, engine.outputs, outputs)
        except InputError as error:
            messages.send(channel, messages.BAD_INPUT, str(error).encode())
        except EngineError as error:
            messages.send(channel, messages.FAILED, str(error).encode())
        except Exception as error:  # the process must outlive whatever a runtime raises
            _log.exception("the engine raised an error of an unexpected type")
            messages.send(channel, messages.FAILED, f"{type(error).__name__}: {error}".encode())
        else:
            messages.send(channel, messages.DONE, done)
            del outputs  # not while it waits for the next request


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    sys.exit(main(sys.argv[1:]))
