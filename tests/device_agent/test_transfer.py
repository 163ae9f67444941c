"""Bundles that arrive in chunks: only what is lacking, only what is trusted, and never damaged."""

from __future__ import annotations

import io
import json
import os
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_testing import AgentProcess, linear_bundle
from control_kit import RunningControl
from device_agent import archive
from device_agent.errors import BadInput
from device_agent.transfer import chunking, offer, payload
from storage_kit import make_bundle, make_key, sign_bundle, signed_bundle
from transfer_kit import cut, missing_data


def weights(seed: int, size: int = 400_000) -> bytes:
    """Bytes that do not repeat."""
    return np.random.default_rng(seed).bytes(size)


class Client:
    """A host at the other end of a control connection, which can break off at any byte."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(20)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("rb")
        self.reported: List[int] = []

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._socket.close()

    def ask(self, message: Dict[str, Any], body: bytes = b"") -> Dict[str, Any]:
        """Send a request and what follows it; return the answer."""
        self.send(message, body)
        while True:
            answer: Dict[str, Any] = json.loads(self._lines.readline().decode())
            if "ok" in answer:
                return answer
            self.reported.append(answer.get("received_bytes", 0))

    def send(self, message: Dict[str, Any], body: bytes = b"") -> None:
        """Send without waiting."""
        self._socket.sendall(json.dumps(message).encode() + b"\n" + body)

    def offer(self, bundle: Path, listed: Optional[bytes] = None) -> Dict[str, Any]:
        """Offer a bundle directory."""
        head = archive.read_head(bundle)
        signature = head.signature or b""
        listed = offer.encode(cut(bundle, head.manifest)) if listed is None else listed
        sizes = {"manifest": head.manifest_bytes, "signature": signature, "chunks": listed}
        message = {"op": "offer", **{f"{key}_bytes": len(data) for key, data in sizes.items()}}
        return self.ask(message, head.manifest_bytes + signature + listed)

    def install(self) -> Dict[str, Any]:
        """Have what was offered installed."""
        return self.ask({"op": "install", "offered": True, "activate": True})


def deploy(path: Path, bundle: Path) -> int:
    """Bring a bundle to a device; return how many bytes of chunks that took."""
    with Client(path) as client:
        offered = client.offer(bundle)
        assert offered["ok"], offered
        data = missing_data(bundle, offered["result"]["missing"])
        assert len(data) == offered["result"]["missing_bytes"]
        assert client.ask({"op": "receive"}, data)["result"] == {"received_bytes": len(data)}
        installed = client.install()
        assert installed["result"]["state"] == "committed", installed
    return len(data)


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[RunningControl]:
    """A running agent with no model."""
    running = RunningControl(tmp_path)
    yield running
    running.close()


@pytest.fixture
def key(tmp_path: Path) -> Any:
    """A key that the agent trusts."""
    return make_key(tmp_path / "keys")


def incoming(root: Path) -> List[Path]:
    """What is on its way on a device."""
    directory = root / "state" / "incoming" / "chunks"
    return sorted(directory.iterdir()) if directory.is_dir() else []


# Cutting

pieces = st.lists(st.binary(max_size=3000) | st.integers(1, 40_000).map(lambda n: weights(n, n)), max_size=6)


@given(pieces, st.sampled_from([4096, 16384]))
@settings(max_examples=60)
def test_chunks_make_up_the_file(parts: List[bytes], average: int) -> None:
    """Every byte is in exactly one chunk, and no chunk is outside the bounds."""
    data = b"".join(parts)
    lengths = chunking.lengths(io.BytesIO(data), average)
    assert sum(lengths) == len(data)
    assert all(length <= chunking.largest(average) for length in lengths)
    assert all(length >= chunking.smallest(average) for length in lengths[:-1])
    assert lengths == [] if not data else lengths[-1] > 0


@given(st.integers(0, 300_000), st.binary(min_size=1, max_size=5000), st.booleans())
@settings(max_examples=40)
def test_a_change_moves_only_the_chunks_around_it(at: int, change: bytes, insert: bool) -> None:
    """What is inserted or overwritten in the middle leaves the chunks before and after it as they were."""
    data = weights(1, 300_000)
    changed = data[:at] + change + data[at + (0 if insert else len(change)) :]
    before, after = ({*_contents(version)} for version in (data, changed))
    assert sum(len(chunk) for chunk in after - before) <= len(change) + 3 * chunking.largest(4096)


def _contents(data: bytes) -> Iterator[bytes]:
    start = 0
    for length in chunking.lengths(io.BytesIO(data), 4096):
        yield data[start : start + length]
        start += length


def test_a_run_of_zeros_is_not_cut_to_crumbs() -> None:
    """Empty parts of a file cost few chunks."""
    assert chunking.lengths(io.BytesIO(bytes(100_000)), 4096)[:3] == [16384] * 3


def test_the_list_of_chunks_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Host and device speak of the same chunks; any other list is refused."""
    head = make_bundle(tmp_path / "b", extra={"model.onnx": weights(1)})
    files = cut(tmp_path / "b", head.manifest)
    data = offer.encode(files)
    assert offer.decode(data, head.manifest) == files
    assert len(data) <= offer.max_encoded_bytes(head.manifest)
    for wrong in (data[:-1], data + b"x", b"\0" * len(data), b"\xff" * len(data), data[8:]):
        with pytest.raises(BadInput, match="malformed"):
            offer.decode(wrong, head.manifest)


@given(st.sets(st.integers(0, 50)))
def test_runs_name_every_number(numbers: Any) -> None:
    """What is missing is said in runs, and nothing is lost in them."""
    runs = offer.runs_of(sorted(numbers))
    assert [n for first, count in runs for n in range(first, first + count)] == sorted(numbers)


# Transfers


def test_a_bundle_arrives_and_is_installed(tmp_path: Path, agent: RunningControl, key: Any) -> None:
    """The first version comes whole, is verified as any other, and leaves nothing behind."""
    head = signed_bundle(tmp_path / "b", key, extra={"model.onnx": weights(1)})
    sent = deploy(agent.path, tmp_path / "b")
    assert sent <= sum(entry.size_bytes for entry in head.manifest.files)
    assert agent.models.serving["demo"].digest == head.digest
    archive.check_files(tmp_path / f"state/models/demo/versions/{head.digest}", head.manifest)
    assert incoming(tmp_path) == []


def test_only_what_changed_is_sent(tmp_path: Path, agent: RunningControl, key: Any) -> None:
    """A new version with another head takes the rest from the old one, though the rest has moved."""
    body = weights(1)
    signed_bundle(tmp_path / "1", key, extra={"model.onnx": b"first" + body + weights(2, 4000)})
    signed_bundle(tmp_path / "2", key, extra={"model.onnx": b"second!" + body + weights(3, 4000)}, version=2)
    deploy(agent.path, tmp_path / "1")
    assert deploy(agent.path, tmp_path / "2") <= 0.15 * len(body)


def test_what_is_installed_is_not_sent_again(tmp_path: Path, agent: RunningControl, key: Any) -> None:
    """A version that is on the device already, active or not, costs no chunk."""
    head = signed_bundle(tmp_path / "1", key, extra={"model.onnx": weights(1)})
    signed_bundle(tmp_path / "2", key, extra={"model.onnx": weights(2)}, version=2)
    deploy(agent.path, tmp_path / "1")
    deploy(agent.path, tmp_path / "2")
    assert deploy(agent.path, tmp_path / "2") == 0
    agent.ask({"op": "rollback", "name": "demo"})
    assert agent.models.serving["demo"].digest == head.digest
    assert incoming(tmp_path) == []


def test_a_broken_transfer_goes_on_where_it_broke(tmp_path: Path, agent: RunningControl, key: Any) -> None:
    """What arrived in whole chunks is not sent again, also after the agent was started anew."""
    signed_bundle(tmp_path / "b", key, extra={"model.onnx": weights(1)})
    with Client(agent.path) as client:
        offered = client.offer(tmp_path / "b")["result"]
        data = missing_data(tmp_path / "b", offered["missing"])
        client.send({"op": "receive"}, data[:300_000])
        while not client.reported or client.reported[-1] < 250_000:
            client.reported.append(json.loads(client._lines.readline().decode())["received_bytes"])
    agent.close()
    restarted = RunningControl(tmp_path)
    try:
        again = deploy(restarted.path, tmp_path / "b")
    finally:
        restarted.close()
        agent.close = lambda: None  # type: ignore[method-assign]  # it is closed
    assert 0 < again <= len(data) - client.reported[-1]


def test_a_broken_transfer_helps_the_next_version(tmp_path: Path, agent: RunningControl, key: Any) -> None:
    """Where a newer version is deployed instead, the chunks that it shares are taken from the broken one."""
    body = weights(1)
    signed_bundle(tmp_path / "1", key, extra={"model.onnx": body})
    signed_bundle(tmp_path / "2", key, extra={"model.onnx": body + b"more"}, version=2)
    with Client(agent.path) as client:
        offered = client.offer(tmp_path / "1")["result"]
        client.ask({"op": "receive"}, missing_data(tmp_path / "1", offered["missing"]))
    assert deploy(agent.path, tmp_path / "2") <= 0.1 * len(body)
    assert incoming(tmp_path) == []


def test_what_a_power_cut_tore_is_sent_again(tmp_path: Path, agent: RunningControl, key: Any) -> None:
    """A chunk that is not what it should be on the disk is noticed and replaced before it is installed."""
    head = signed_bundle(tmp_path / "b", key, extra={"model.onnx": weights(1)})
    with Client(agent.path) as client:
        offered = client.offer(tmp_path / "b")["result"]
        client.ask({"op": "receive"}, missing_data(tmp_path / "b", offered["missing"]))
    (partial,) = incoming(tmp_path)
    with (partial / "model.onnx").open("r+b") as stream:
        stream.seek(200_000)
        stream.write(bytes(100))
    assert 0 < deploy(agent.path, tmp_path / "b") <= 2 * chunking.largest(4096)
    assert agent.models.serving["demo"].digest == head.digest


# Refusals


def test_nothing_is_stored_of_a_bundle_that_is_not_trusted(tmp_path: Path, agent: RunningControl) -> None:
    """Trust is checked on the head: an untrusted offer is refused before a chunk, and leaves no trace."""
    make_key(tmp_path / "keys")
    signed_bundle(tmp_path / "b", make_key(None))
    with Client(agent.path) as client:
        refused = client.offer(tmp_path / "b")
        assert (refused["ok"], refused["exit_code"]) == (False, 2)
        assert client._lines.readline() == b""  # what follows could not be told from chunks
    assert incoming(tmp_path) == []


def test_what_does_not_fit_is_refused_before_a_chunk(tmp_path: Path, agent: RunningControl, key: Any) -> None:
    """The space is asked for first, and a refusal says so."""
    make_bundle(tmp_path / "b")
    head = archive.read_head(tmp_path / "b")
    text = head.manifest_bytes.decode().replace(f'"size_bytes": {7 * 500}', f'"size_bytes": {2**50}')
    (tmp_path / "b" / "manifest.json").write_text(text)
    sign_bundle(tmp_path / "b", key)
    with Client(agent.path) as client:
        refused = client.offer(tmp_path / "b", listed=b"")
    assert (refused["exit_code"], "no space" in refused["what"]) == (5, True)
    assert incoming(tmp_path) == []


def test_a_damaged_chunk_is_never_installed(tmp_path: Path, agent: RunningControl, key: Any) -> None:
    """A byte that changed on the way is refused at once; the next transfer sends that chunk again."""
    head = signed_bundle(tmp_path / "b", key, extra={"model.onnx": weights(1)})
    with Client(agent.path) as client:
        offered = client.offer(tmp_path / "b")["result"]
        data = bytearray(missing_data(tmp_path / "b", offered["missing"]))
        data[200_000] ^= 1
        client.send({"op": "receive"}, bytes(data))
        answer = next(a for a in map(json.loads, client._lines) if "ok" in a)
        assert "damaged on its way" in answer["what"]
    again = deploy(agent.path, tmp_path / "b")
    assert 150_000 < again < len(data) - 150_000
    assert agent.models.serving["demo"].digest == head.digest


def test_chunks_that_belie_the_manifest_are_not_installed(
    tmp_path: Path, agent: RunningControl, key: Any
) -> None:
    """A host whose chunks are consistent with each other, but not what was signed, is refused."""
    signed_bundle(tmp_path / "good", key)
    signed_bundle(tmp_path / "evil", key)
    (tmp_path / "evil" / "model.onnx").write_bytes(b"eviltxt" * 500)
    manifest = archive.read_head(tmp_path / "evil").manifest
    with Client(agent.path) as client:
        offered = client.offer(tmp_path / "evil", offer.encode(cut(tmp_path / "evil", manifest)))
        client.ask({"op": "receive"}, missing_data(tmp_path / "evil", offered["result"]["missing"]))
        refused = client.install()
    assert (refused["ok"], refused["exit_code"]) == (False, 2)
    assert "model.onnx" in refused["what"]
    assert agent.models.serving == {}
    deploy(agent.path, tmp_path / "good")


def test_an_incomplete_bundle_is_not_installed(tmp_path: Path, agent: RunningControl, key: Any) -> None:
    """Nothing can be received or installed that was not offered, nor before all of it is here."""
    signed_bundle(tmp_path / "b", key)
    with Client(agent.path) as client:
        assert "nothing was offered" in client.install()["why"]
        assert client.offer(tmp_path / "b")["ok"]
        assert "chunks are missing" in client.install()["why"]
    with Client(agent.path) as client:
        assert "nothing was offered" in client.ask({"op": "receive"})["why"]


def test_a_new_connection_takes_over(tmp_path: Path, agent: RunningControl, key: Any) -> None:
    """A connection that hangs on a dead link is no hindrance: the next one goes on."""
    signed_bundle(tmp_path / "b", key, extra={"model.onnx": weights(1)})
    with Client(agent.path) as hanging:
        data = missing_data(tmp_path / "b", hanging.offer(tmp_path / "b")["result"]["missing"])
        assert deploy(agent.path, tmp_path / "b") == len(data)
        hanging.send({"op": "receive"}, data[:50_000])
        answer = next(a for a in map(json.loads, hanging._lines) if "ok" in a)
        assert "taken over" in answer["what"]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({}, "'manifest_bytes' is not a number"),
        ({"manifest_bytes": -1}, "'manifest_bytes' is not a number"),
        ({"manifest_bytes": True}, "'manifest_bytes' is not a number"),
        ({"manifest_bytes": 2**40}, "'manifest_bytes' is not a number"),
        ({"manifest_bytes": 2, "signature_bytes": None}, "'signature_bytes' is not a number"),
        ({"manifest_bytes": 2, "signature_bytes": 0, "chunks_bytes": 0}, "schema"),
    ],
)
def test_a_malformed_offer_is_refused(agent: RunningControl, message: Dict[str, Any], reason: str) -> None:
    """An offer that cannot be one is answered, and the agent goes on."""
    with Client(agent.path) as client:
        answer = client.ask({"op": "offer", **message}, b"{}")
        assert reason in answer["why"] + answer["what"]
    assert agent.ask({"op": "list"}) == []


def test_what_nobody_comes_back_for_is_removed(tmp_path: Path, agent: RunningControl, key: Any) -> None:
    """A broken transfer is kept for a week."""
    signed_bundle(tmp_path / "old", key, name="other")
    signed_bundle(tmp_path / "new", key)
    with Client(agent.path) as client:
        client.offer(tmp_path / "old")
    (partial,) = incoming(tmp_path)
    deploy(agent.path, tmp_path / "new")
    assert incoming(tmp_path) == [partial]
    old_s = time.time() - 8 * 24 * 3600
    os.utime(str(partial), (old_s, old_s))
    deploy(agent.path, tmp_path / "new")
    assert incoming(tmp_path) == []


def test_a_transfer_that_goes_on_for_weeks_loses_nothing(
    tmp_path: Path, agent: RunningControl, key: Any
) -> None:
    """The week counts from the last chunk that came, not from the first."""
    signed_bundle(tmp_path / "b", key, extra={"model.onnx": weights(1)})
    with Client(agent.path) as client:
        offered = client.offer(tmp_path / "b")["result"]
        (partial,) = incoming(tmp_path)
        old_s = time.time() - 8 * 24 * 3600
        os.utime(str(partial), (old_s, old_s))  # as if it had begun then
        data = missing_data(tmp_path / "b", offered["missing"])
        client.send({"op": "receive"}, data[:300_000])
        while not client.reported or client.reported[-1] < 250_000:
            client.reported.append(json.loads(client._lines.readline().decode())["received_bytes"])
    assert deploy(agent.path, tmp_path / "b") <= len(data) - client.reported[-1]


@pytest.mark.parametrize("form", ["directory", "file"])
def test_a_bundle_is_sent_from_where_it_lies(tmp_path: Path, form: str) -> None:
    """Either form gives the same offer and the same bytes, without being unpacked."""
    make_bundle(
        tmp_path / "b", extra={"model.onnx": weights(1), "empty.txt": b"", "z/other.bin": weights(2, 9)}
    )
    archive.pack(tmp_path / "b", tmp_path / "b.edgekit")
    sent = payload.prepare(tmp_path / ("b" if form == "directory" else "b.edgekit"))
    assert sent.files == cut(tmp_path / "b", sent.manifest)
    count = sum(len(file.chunks) for file in sent.files)
    whole = b"".join((tmp_path / "b" / entry.path).read_bytes() for entry in sent.manifest.files)
    assert b"".join(sent.chunks([[0, 1], [1, count - 1]])) == whole


def test_a_bundle_of_another_shape_is_not_sent(tmp_path: Path) -> None:
    """What the manifest does not list, a file of another size and a cut archive are refused by the sender."""
    make_bundle(tmp_path / "b", extra={"model.onnx": weights(1)})
    archive.pack(tmp_path / "b", tmp_path / "b.edgekit")
    data = (tmp_path / "b.edgekit").read_bytes()
    (tmp_path / "cut.edgekit").write_bytes(data[:-2000])
    with pytest.raises(BadInput, match="not a usable bundle archive"):
        payload.prepare(tmp_path / "cut.edgekit")
    (tmp_path / "b" / "extra").write_text("")
    with pytest.raises(BadInput, match="does not list"):
        payload.prepare(tmp_path / "b")
    (tmp_path / "b" / "extra").unlink()
    (tmp_path / "b" / "model.onnx").write_bytes(b"short")
    with pytest.raises(BadInput, match="was changed"):
        payload.prepare(tmp_path / "b")


# The connection that SSH starts


def connect(root: Path, *requests: Dict[str, Any]) -> List[Dict[str, Any]]:
    """Run ``edgekit-agent connect`` with requests on its standard input; return its lines."""
    done = subprocess.run(
        [sys.executable, "-m", "device_agent.cli", "connect", "--config", str(root / "agent.toml")],
        input=b"".join(json.dumps(request).encode() + b"\n" for request in requests),
        stdout=subprocess.PIPE,
        timeout=60,
    )
    return [json.loads(line.decode()) for line in done.stdout.splitlines()]


def test_connect_reaches_the_running_agent(tmp_path: Path, start_agent: Any) -> None:
    """What is asked over standard input is answered by the agent that serves; who asked is in its log."""
    bundle = linear_bundle(tmp_path / "bundle")
    agent = start_agent(bundle, settings="control_socket_mode = 0o660\n")
    greeting, answer = connect(agent.control.parent, {"op": "agent"})
    assert (greeting["edgekit"], greeting["serving"]) == ("connect", True)
    (model,) = answer["result"]["models"]
    assert (model["name"], model["serving"]) == ("model", bundle.digest)
    assert connect(agent.control.parent, {"op": "rollback", "name": "model"})[1]["ok"] is False
    assert "rollback, asked for by " in agent.log()
    assert stat.S_IMODE(agent.control.stat().st_mode) == 0o660


def test_connect_acts_on_the_store_where_no_agent_runs(tmp_path: Path) -> None:
    """A device can be given its first bundle before it serves."""
    agent = AgentProcess(tmp_path)
    bundle = linear_bundle(tmp_path / "bundle")
    greeting, *states, answer = connect(
        agent.control.parent, {"op": "install", "bundle": str(bundle.directory), "activate": True}
    )
    assert greeting["serving"] is False
    assert {"state": "selftested"} in states
    assert answer["result"]["digest"] == bundle.digest


def test_connect_says_why_it_cannot(tmp_path: Path) -> None:
    """A store that cannot be opened is an answer like any other."""
    (tmp_path / "agent.toml").write_text(
        f'state_dir = "{tmp_path / "agent.toml"}"\ncontrol_socket = "{tmp_path / "none.sock"}"\n'
    )
    (answer,) = connect(tmp_path)
    assert (answer["ok"], answer["exit_code"]) == (False, 5)
    assert "cannot be opened" in answer["what"]
