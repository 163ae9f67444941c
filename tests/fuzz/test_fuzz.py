"""A short, repeatable run of each fuzz target; ``make fuzz`` runs them for long."""

from __future__ import annotations

import fuzz_connection
import fuzz_grpc
import fuzz_infer
import pytest
from fuzz_explore import explore
from tritonclient.grpc import service_pb2


def test_no_body_breaks_the_protocol() -> None:
    """Whatever a body holds, it is refused with an error that can be read, or it is a whole request."""
    outcomes = explore(fuzz_infer.run, list(fuzz_infer.seeds()), executions=8_000, seed=1)
    assert min(outcomes["served"], outcomes["refused"]) > 500


def test_no_bytes_break_a_connection() -> None:
    """Whatever bytes and events come, requests and answers keep their order, and nothing raises."""
    outcomes = explore(fuzz_connection.run, list(fuzz_connection.seeds()), executions=8_000, seed=1)
    assert min(outcomes["open"], outcomes["ended"], outcomes["lost"]) > 100


def test_no_message_breaks_grpc() -> None:
    """Whatever a message holds, it is refused with a status that can be read, or it is a whole request."""
    outcomes = explore(fuzz_grpc.run, list(fuzz_grpc.seeds()), executions=8_000, seed=1)
    assert min(outcomes["served"], outcomes["refused"]) > 500


def test_messages_are_read_as_protocol_buffers_reads_them() -> None:
    """What is accepted means the same to Triton's client, byte for byte."""
    reference = service_pb2.ModelInferRequest.FromString
    seeds = list(fuzz_grpc.seeds())
    outcomes = explore(lambda data: fuzz_grpc.differs(data, reference), seeds, executions=6_000, seed=2)
    assert outcomes["same"] > 2000
    assert outcomes["both refuse"] > 200
    assert outcomes["stricter"] < 200


@pytest.mark.parametrize("target", [fuzz_infer, fuzz_connection, fuzz_grpc])
def test_seeds_reach_every_outcome(target: object) -> None:
    """The seeds from which a long run starts are themselves both good and bad."""
    assert len({target.run(seed) for seed in target.seeds()}) >= 2  # type: ignore[attr-defined]
