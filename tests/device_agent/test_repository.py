"""``--model-repository``: a Triton-layout directory served by a real agent, asked by Triton's own client."""

from __future__ import annotations

import base64
import json
import re
import resource
import tempfile
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Optional

import numpy as np
import onnx
import pytest
import tritonclient.grpc
import tritonclient.http
from onnx import helper
from tritonclient.utils import InferenceServerException

from agent_testing import AgentProcess, identity, install, linear, linear_bundle, make_model, session_of
from device_agent.errors import BadInput
from device_agent.manifest import TensorSpec
from device_agent.repository.uploads import Uploads

LINEAR = """
max_batch_size: 8
input { name: "x" data_type: TYPE_FP32 dims: 8 }
output { name: "scores" data_type: TYPE_FP32 dims: 4 label_filename: "labels.txt" }
version_policy { all { } }
dynamic_batching { preferred_batch_size: [ 4 ] max_queue_delay_microseconds: 100 }
"""
X = np.random.default_rng(3).standard_normal((2, 8)).astype(np.float32)


def put(root: Path, name: str, version: int, model: onnx.ModelProto, config: Optional[str] = None) -> Path:
    """Put a version of a model into a repository."""
    directory = root / name / str(version)
    directory.mkdir(parents=True)
    (directory / "model.onnx").write_bytes(model.SerializeToString())
    if config is not None:
        (root / name / "config.pbtxt").write_text(config)
    return root / name


def rows_in_one() -> onnx.ModelProto:
    """``y`` is ``x`` with all but the batch in one axis."""
    flatten = helper.make_node("Flatten", ["x"], ["y"], axis=1)
    return make_model([flatten], [TensorSpec("x", "FP32", (-1, 2, 3))], [TensorSpec("y", "FP32", (-1, 6))])


def index_of(client: Any) -> Dict[str, Dict[str, str]]:
    """State and reason of every model, by ``name`` or ``name/version``."""
    return {
        "/".join(part for part in (entry["name"], entry["version"]) if part): entry
        for entry in client.get_model_repository_index()
    }


def infer(client: Any, model: str, x: np.ndarray, output: str = "scores", version: str = "") -> np.ndarray:
    """One output for one input, both binary."""
    tensor = tritonclient.http.InferInput("x", list(x.shape), "FP32")
    tensor.set_data_from_numpy(x)
    answer: np.ndarray = client.infer(model, [tensor], model_version=version).as_numpy(output)
    return answer


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository: two versions with a configuration, one without, one that reshapes, and broken ones."""
    root = tmp_path_factory.mktemp("repository") / "models"
    for version in (1, 3):
        directory = put(root, "linear", version, linear(seed=version), LINEAR)
    (directory / "labels.txt").write_text("ant\nbee\ncat\ndog\n")
    put(root, "auto", 2, identity("FP32"))
    reshape = 'max_batch_size: 4 input { name: "x" dims: 6 reshape { shape: [2, 3] } } output { name: "y" }'
    put(root, "shaped", 1, rows_in_one(), reshape)
    put(root, "ensemble", 1, identity("FP32"), 'platform: "ensemble"')
    (root / "empty").mkdir()
    (root / "broken" / "1").mkdir(parents=True)
    (root / "broken" / "1" / "model.onnx").write_bytes(b"no graph")
    (root / "model" / "1").mkdir(parents=True)  # the name of the installed bundle
    (root / "model" / "1" / "model.onnx").write_bytes(identity("FP32").SerializeToString())
    return root


@pytest.fixture(scope="module")
def agent(root: Path) -> Iterator[AgentProcess]:
    """An agent that serves the repository beside an installed bundle; clients may load and unload."""
    directory = root.parent / "agent"
    directory.mkdir()
    arguments = ["--model-repository", str(root), "--model-control-mode", "explicit", "--load-model", "*"]
    settings = "[grpc]\nenabled = true\nport = 0\n[limits]\nmax_upload_bytes = 100000\n"
    running = AgentProcess(directory, settings, arguments)
    install(directory / "state", [linear_bundle(root.parent / "bundle")])
    yield running.start()
    running.kill()


@pytest.fixture
def client(agent: AgentProcess) -> Iterator[Any]:
    """Triton's own HTTP client, unmodified."""
    with tritonclient.http.InferenceServerClient(agent.http) as connected:
        yield connected


def test_several_versions_serve_side_by_side(client: Any) -> None:
    """Each version answers with its own graph; without a version, the highest does."""
    for version in (1, 3):
        expected = session_of(linear(seed=version)).run(None, {"x": X})[0]
        assert np.array_equal(infer(client, "linear", X, version=str(version)), expected)
        assert client.is_model_ready("linear", str(version))
    assert np.array_equal(infer(client, "linear", X), infer(client, "linear", X, version="3"))
    assert client.get_model_metadata("linear")["versions"] == ["1", "3"]
    with pytest.raises(InferenceServerException, match="has no version 2; it has 1, 3"):
        infer(client, "linear", X, version="2")
    stats = client.get_inference_statistics("linear")["model_stats"]
    assert [entry["version"] for entry in stats] == ["1", "3"]


def test_the_configuration_is_shown_as_triton_shows_it(client: Any) -> None:
    """Clients that read dims, labels and batching from the configuration find them."""
    config = client.get_model_config("linear")
    assert config["max_batch_size"] == 8
    assert config["output"][0]["label_filename"] == "labels.txt"
    assert config["dynamic_batching"]["preferred_batch_size"] == [4]
    assert config["version_policy"] == {"all": {}}
    assert client.get_model_config("auto")["max_batch_size"] == 4


def test_a_reshape_is_invisible_to_clients(client: Any) -> None:
    """Clients send the configured dims, the graph sees its own."""
    x = np.arange(12, dtype=np.float32).reshape(2, 6)
    assert np.array_equal(infer(client, "shaped", x, "y"), x)
    assert client.get_model_metadata("shaped")["inputs"][0]["shape"] == [-1, 6]


@pytest.mark.parametrize("binary", [True, False])
def test_classification_names_the_best_classes(client: Any, binary: bool) -> None:
    """``score:index:label`` as binary and as JSON, from the labels file beside the configuration."""
    tensor = tritonclient.http.InferInput("x", [2, 8], "FP32")
    tensor.set_data_from_numpy(X)
    wanted = tritonclient.http.InferRequestedOutput("scores", binary_data=binary, class_count=2)
    answer = client.infer("linear", [tensor], outputs=[wanted], model_version="1").as_numpy("scores")
    assert answer.shape == (2, 2)
    for row, texts in zip(session_of(linear(seed=1)).run(None, {"x": X})[0], answer):
        text = texts[0].decode() if binary else texts[0]
        score, index, label = text.split(":")
        assert (int(index), label) == (row.argmax(), ["ant", "bee", "cat", "dog"][row.argmax()])
        assert float(score) == pytest.approx(row.max(), abs=1e-6)


def test_grpc_sees_the_same_repository(agent: AgentProcess) -> None:
    """Versions, classes, configuration and an upload, through Triton's gRPC client."""
    address = agent.wait_for(r"grpc=(\S+)").group(1)
    with tritonclient.grpc.InferenceServerClient(address) as client:
        tensor = tritonclient.grpc.InferInput("x", [2, 8], "FP32")
        tensor.set_data_from_numpy(X)
        wanted = tritonclient.grpc.InferRequestedOutput("scores", class_count=1)
        answer = client.infer("linear", [tensor], outputs=[wanted], model_version="1").as_numpy("scores")
        best = session_of(linear(seed=1)).run(None, {"x": X})[0].argmax(axis=1)
        assert [int(text.split(b":")[1]) for text in answer.ravel()] == best.tolist()
        assert client.get_model_config("linear").config.output[0].label_filename == "labels.txt"
        graph = linear(seed=8).SerializeToString()
        client.load_model("over-grpc", config="{}", files={"file:1/model.onnx": graph})
        expected = session_of(linear(seed=8)).run(None, {"x": X})[0]
        assert np.array_equal(client.infer("over-grpc", [tensor]).as_numpy("scores"), expected)
        client.unload_model("over-grpc")


def test_a_load_goes_on_when_its_client_gives_up(agent: AgentProcess) -> None:
    """A model whose loading takes longer than its client waits serves when it is ready, as over HTTP."""
    sample = {"x": {"data_type": "TYPE_FP32", "dims": [8], "zero_data": True}}
    config = {"model_warmup": [{"name": "long", "batch_size": 65536, "count": 1000, "inputs": sample}]}
    graph = linear(seed=9).SerializeToString()
    address = agent.wait_for(r"grpc=(\S+)").group(1)
    with tritonclient.grpc.InferenceServerClient(address) as client:
        with pytest.raises(InferenceServerException, match="Deadline"):
            client.load_model(
                "slow", config=json.dumps(config), files={"file:1/model.onnx": graph}, client_timeout=0.1
            )
        deadline_s = time.monotonic() + 30
        while not client.is_model_ready("slow"):
            assert time.monotonic() < deadline_s, "it never served"
            time.sleep(0.05)
        client.unload_model("slow")


def test_what_does_not_load_says_why_and_harms_nobody(client: Any, agent: AgentProcess) -> None:
    """The index names a broken model, an empty one and one that cannot be served, each with its reason."""
    index = index_of(client)
    assert index["linear/3"]["state"] == "READY"
    assert "ensemble" in index["ensemble"]["reason"]
    assert "no version" in index["empty"]["reason"]
    assert "does not load" in index["broken"]["reason"]
    assert all(index[name]["state"] == "UNAVAILABLE" for name in ("ensemble", "empty", "broken"))
    assert "are not signed" in agent.log()


def test_an_installed_bundle_keeps_its_name(client: Any, agent: AgentProcess) -> None:
    """A directory of the same name never replaces a signed model."""
    expected = session_of(linear()).run(None, {"x": X})[0]
    assert np.array_equal(infer(client, "model", X), expected)
    assert "installed bundle" in agent.log()
    with pytest.raises(InferenceServerException, match="signed"):
        client.load_model("model", config="{}", files={"file:1/model.onnx": b""})


def test_models_are_unloaded_and_loaded_again(client: Any) -> None:
    """An unloaded model is in the index, not ready, and comes back with every version."""
    client.unload_model("auto")
    assert not client.is_model_ready("auto")
    assert index_of(client)["auto"]["reason"] == "unloaded"
    client.load_model("auto")
    assert client.is_model_ready("auto", "2")
    client.unload_model("never-heard-of")  # which is no error, as in Triton


def test_a_configuration_in_the_request_replaces_the_file(client: Any) -> None:
    """``config`` holds for this load alone; the next one reads the file again."""
    client.load_model("linear", config=json.dumps({"version_policy": {"latest": {"num_versions": 1}}}))
    assert client.get_model_metadata("linear")["versions"] == ["3"]
    client.load_model("linear")
    assert client.get_model_metadata("linear")["versions"] == ["1", "3"]
    with pytest.raises(InferenceServerException, match="sequence_batching"):
        client.load_model("linear", config='{"sequence_batching": {}}')
    assert client.get_model_metadata("linear")["versions"] == ["1", "3"]


def test_a_model_arrives_in_the_request(client: Any) -> None:
    """An uploaded graph serves under a new name until it is unloaded, and then is gone."""
    graph = linear(seed=7).SerializeToString()
    client.load_model("uploaded", config="{}", files={"file:5/model.onnx": graph})
    expected = session_of(linear(seed=7)).run(None, {"x": X})[0]
    assert np.array_equal(infer(client, "uploaded", X, version="5"), expected)
    client.unload_model("uploaded")
    assert "uploaded" not in index_of(client)
    with pytest.raises(InferenceServerException, match="not in the repository"):
        client.load_model("uploaded")


@pytest.mark.parametrize(
    ("config", "files", "names"),
    [
        ("{}", {"file:../escape": b""}, "not inside"),
        ("{}", {"file:/etc/passwd": b""}, "not inside"),
        ("{}", {"file:1/model.onnx": b"x" * 200_000}, "too large"),
        ("{}", {"file:1/model.onnx": b"no graph"}, "does not load"),
        ("{}", {"file:1": b"", "file:1/model.onnx": b""}, "cannot be stored"),
        ("[]", {"file:1/model.onnx": b""}, "no object"),
    ],
)
def test_an_upload_that_cannot_serve_is_refused_whole(
    client: Any, config: str, files: Dict[str, bytes], names: str
) -> None:
    """Paths stay inside the model's directory, sizes inside the limit, and nothing of it remains."""
    with pytest.raises(InferenceServerException, match=names):
        client.load_model("bad", config=config, files=files)
    assert "bad" not in index_of(client)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of this test's own, with a file in it, where temporary files are kept."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "of another program").touch()
    return tmp_path


@pytest.mark.parametrize("name", ["", ".", "..", "../up", "a\0b"])
def test_a_model_without_a_usable_name_leaves_temporary_files_alone(temporary: Path, name: str) -> None:
    """An upload for a model that cannot have a directory is refused, and nothing of others is deleted."""
    uploads = Uploads(limit_bytes=100)
    try:
        with pytest.raises(BadInput, match="its name cannot be"):
            uploads.remove(uploads.add(name, {"1/model.onnx": b""}))
    finally:
        uploads.clear()
    assert [path.name for path in temporary.iterdir()] == ["of another program"]


def test_a_file_name_that_cannot_be_stored_takes_no_room(temporary: Path) -> None:
    """Half a character, which JSON can carry, is in no file's name: refused, it leaves the room to others."""
    uploads = Uploads(limit_bytes=100)
    try:
        with pytest.raises(BadInput, match="no usable path"):
            uploads.add("model", {"1/\ud800": bytes(60)})
        uploads.remove(uploads.add("model", {"1/model.onnx": bytes(60)}))
    finally:
        uploads.clear()
    assert [path.name for path in temporary.iterdir()] == ["of another program"]


def test_uploads_that_come_together_share_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two that would fit alone, one is refused."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    make_directory = tempfile.mkdtemp

    def slowly(prefix: str) -> str:
        time.sleep(0.2)
        return make_directory(prefix=prefix)

    monkeypatch.setattr(tempfile, "mkdtemp", slowly)
    uploads = Uploads(limit_bytes=100)

    def add(name: str) -> bool:
        try:
            uploads.add(name, {"1/model.onnx": bytes(60)})
        except BadInput:
            return False
        return True

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(add, ["a", "b"])) == [False, True]
    uploads.clear()
    assert not list(tmp_path.iterdir())


DIGITS = "9" * 5000
FIXED = {"data_type": "TYPE_FP32", "dims": [8]}


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"max_batch_size": DIGITS}, "not a whole number"),
        ({"max_batch_size": "0x" + "f" * 5000}, "not a whole number"),
        ({"input": [{"name": "x", "data_type": DIGITS}]}, "data_type"),
        ({"parameters": {"intra_op_thread_count": {"string_value": DIGITS}}}, "intra_op_thread_count"),
        ({"dynamic_batching": {"priority_queue_policy": {DIGITS: {}}}}, "priority_queue_policy"),
        ({"name": "\ud800"}, "not JSON"),
        ({"\ud800": 1}, "not JSON"),
        ({"output": [{"name": "scores", "label_filename": "\ud800"}]}, "not JSON"),
        ({"parameters": {"\ud800": {"string_value": ""}}}, "not JSON"),
        ({"platform": "p" * 100_000}, "platform"),
        ({"p" * 100_000: 1}, "unknown"),
        ({"platform": "\u20ac" * 100_000}, "platform"),
        ({"model_warmup": [{"inputs": {"x": {**FIXED, "dims": [1] * 99, "zero_data": True}}}]}, "axes"),
        (
            {
                "model_warmup": [
                    {"batch_size": 65536, "inputs": {"x": {**FIXED, "dims": [2**28], "random_data": True}}}
                ]
            },
            "elements",
        ),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_the_clients_mistake(
    client: Any, agent: AgentProcess, config: Dict[str, Any], names: str
) -> None:
    """Numbers, texts and sizes beyond reason are a 400 and an ``INVALID_ARGUMENT`` that name the field."""
    files = {"file:1/model.onnx": linear().SerializeToString()}
    parameters = {"config": json.dumps(config)}
    parameters.update({path: base64.b64encode(data).decode() for path, data in files.items()})
    body = json.dumps({"parameters": parameters}).encode()
    request = urllib.request.Request(f"http://{agent.http}/v2/repository/models/odd/load", body)
    with pytest.raises(urllib.error.HTTPError) as refusal, urllib.request.urlopen(request):
        pass
    with refusal.value as answer:
        assert answer.code == 400
        assert re.search(names, answer.read().decode())
    with tritonclient.grpc.InferenceServerClient(agent.wait_for(r"grpc=(\S+)").group(1)) as other:
        with pytest.raises(InferenceServerException, match=names) as failure:
            other.load_model("odd", config=json.dumps(config), files=files, client_timeout=20)
        assert failure.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert client.is_server_live()


def test_a_name_beyond_reason_is_an_invalid_argument(agent: AgentProcess) -> None:
    """A client of gRPC's that names something with 200,000 letters is told what was wrong, in few words."""
    name = "n" * 200_000
    with tritonclient.grpc.InferenceServerClient(agent.wait_for(r"grpc=(\S+)").group(1)) as client:
        for ask in (
            lambda: client.load_model(name),
            lambda: client.load_model(name, config="{}", files={"file:1/model.onnx": b""}),
            lambda: client.register_system_shared_memory("region", name, 4),
        ):
            with pytest.raises(InferenceServerException, match="nnn") as failure:
                ask()
            assert failure.value.status() == "StatusCode.INVALID_ARGUMENT"
            assert len(failure.value.message()) < 4096


def test_a_wish_to_batch_what_has_no_batch_is_no_trouble(client: Any, agent: AgentProcess) -> None:
    """Both protocols show the configuration as it holds, without the queues of a batch that there is not."""
    graph = identity("FP32", (2, 3)).SerializeToString()
    config = json.dumps({"dynamic_batching": {"priority_queue_policy": {"all": {}}}})
    client.load_model("alone", config=config, files={"file:1/model.onnx": graph})
    assert "dynamic_batching" not in client.get_model_config("alone")
    with tritonclient.grpc.InferenceServerClient(agent.wait_for(r"grpc=(\S+)").group(1)) as other:
        assert not other.get_model_config("alone").config.HasField("dynamic_batching")
    client.unload_model("alone")


def test_an_agent_that_is_killed_leaves_nothing_for_ever(
    start_agent: Callable[..., AgentProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was uploaded to an agent that was killed goes at the next start; what others have stays.

    A second agent of the same user keeps its files, and so do programs whose names look alike.
    """
    home = tmp_path / "tmp"
    home.mkdir()
    monkeypatch.setenv("TMPDIR", str(home))
    repository = tmp_path / "models"
    repository.mkdir()
    others = [home / f"edgekit-upload-{end}" for end in ("notes", "abcdefgh", "12345678")]
    others[0].mkdir(mode=0o700)  # not a name that is made here
    others[1].symlink_to(repository)
    others[2].mkdir(mode=0o755)  # not made to keep others out
    settings = "[grpc]\nenabled = false\n"
    arguments = ["--model-repository", str(repository), "--model-control-mode", "explicit"]
    graph = linear(seed=4).SerializeToString()

    def uploads() -> set[Path]:
        return {path for path in home.glob("edgekit-*") if path not in others}

    killed = start_agent(settings=settings, arguments=arguments)
    with tritonclient.http.InferenceServerClient(killed.http) as client:
        for name in ("one", "two"):
            client.load_model(name, config="{}", files={"file:1/model.onnx": graph})
    left = uploads()
    killed.kill()
    assert left
    assert uploads() == left

    running = start_agent(settings=settings, arguments=arguments)
    assert not uploads()
    with tritonclient.http.InferenceServerClient(running.http) as client:
        client.load_model("mine", config="{}", files={"file:1/model.onnx": graph})
        kept = uploads()
        third = start_agent(settings=settings, arguments=arguments)
        assert uploads() == kept
        assert third.stop() == 0
        client.load_model("mine", config='{"max_batch_size": 2}', files={"file:1/model.onnx": graph})
        assert np.array_equal(infer(client, "mine", X), session_of(linear(seed=4)).run(None, {"x": X})[0])
    assert running.stop() == 0
    assert not uploads()
    assert all(path.is_dir() for path in others)


def test_a_model_that_was_unloaded_holds_no_memory(
    start_agent: Callable[..., AgentProcess], tmp_path: Path
) -> None:
    """A client that loads under a new name each time, asks once and unloads, does not make the agent grow."""
    arguments = ["--model-repository", str(tmp_path), "--model-control-mode", "explicit"]
    agent = start_agent(arguments=arguments)
    config = {"output": [{"name": "scores", "label_filename": "labels"}]}
    files = {"file:1/model.onnx": linear().SerializeToString(), "file:labels": b"l" * 8_000_000}

    def grown_bytes(names: range) -> int:
        before = memory_bytes(agent)
        for number in names:
            client.load_model(f"m{number}", config=json.dumps(config), files=files)
            infer(client, f"m{number}", X)
            client.unload_model(f"m{number}")
        return memory_bytes(agent) - before

    with tritonclient.http.InferenceServerClient(agent.http) as client:
        grown_bytes(range(5))  # what the allocator keeps
        assert grown_bytes(range(5, 20)) < 60_000_000  # of 120,000,000 that the labels took


def memory_bytes(agent: AgentProcess) -> int:
    """What an agent has in memory."""
    pages = int(Path(f"/proc/{agent.process.pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def test_an_upload_without_a_place_is_refused(
    start_agent: Callable[..., AgentProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the directory for temporary files is gone, the client is told so, and may try again later."""
    home = tmp_path / "tmp"
    home.mkdir()
    monkeypatch.setenv("TMPDIR", str(home))
    arguments = ["--model-repository", str(tmp_path), "--model-control-mode", "explicit"]
    agent = start_agent(arguments=arguments)
    graph = linear().SerializeToString()
    home.rmdir()
    with tritonclient.http.InferenceServerClient(agent.http) as client:
        with pytest.raises(InferenceServerException, match="cannot be stored"):
            client.load_model("late", config="{}", files={"file:1/model.onnx": graph})
        home.mkdir()
        client.load_model("late", config="{}", files={"file:1/model.onnx": graph})
        assert client.is_model_ready("late")


def test_files_without_a_configuration_are_refused(agent: AgentProcess) -> None:
    """As in Triton, an upload comes with its configuration; base64 that is none is a 400 too."""
    for parameters in ({"file:1/model.onnx": ""}, {"config": "{}", "file:1/model.onnx": "*"}, {"config": 1}):
        body = json.dumps({"parameters": parameters}).encode()
        request = urllib.request.Request(f"http://{agent.http}/v2/repository/models/bad/load", body)
        with pytest.raises(urllib.error.HTTPError) as refusal, urllib.request.urlopen(request):
            pass
        assert refusal.value.code == 400
        refusal.value.close()


def test_a_reload_under_load_fails_no_request(client: Any, agent: AgentProcess, root: Path) -> None:
    """A new file takes over between two requests, and the old version answers what it accepted."""
    stop, failures = threading.Event(), []

    def ask() -> None:
        with tritonclient.http.InferenceServerClient(agent.http) as own:
            while not stop.is_set():
                try:
                    infer(own, "linear", X, version="3")
                except InferenceServerException as error:
                    failures.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    path = root / "linear" / "3" / "model.onnx"
    before = path.read_bytes()
    try:
        for seed in range(20, 25):
            path.write_bytes(linear(seed=seed).SerializeToString())
            client.load_model("linear")
            expected = session_of(linear(seed=seed)).run(None, {"x": X})[0]
            assert np.array_equal(infer(client, "linear", X), expected)
    finally:
        stop.set()
        asking.join()
        path.write_bytes(before)
        client.load_model("linear")
    assert failures == []


def test_triton_without_control_loads_all_and_lets_nobody_load(
    start_agent: Callable[..., AgentProcess], root: Path
) -> None:
    """``--model-control-mode none``, the default, is the whole repository and no other."""
    agent = start_agent(arguments=["--model-repository", str(root)])
    with tritonclient.http.InferenceServerClient(agent.http) as client:
        assert client.is_model_ready("linear")
        for change in (client.load_model, client.unload_model):
            with pytest.raises(InferenceServerException, match="not loaded or unloaded by clients"):
                change("linear")
    assert agent.stop() == 0


def test_explicit_control_starts_with_what_is_named(
    start_agent: Callable[..., AgentProcess], root: Path
) -> None:
    """``--load-model`` names what serves from the start; the rest waits for clients."""
    arguments = ["--model-repository", str(root), "--model-control-mode", "explicit", "--load-model", "auto"]
    agent = start_agent(arguments=arguments)
    with tritonclient.http.InferenceServerClient(agent.http) as client:
        assert client.is_model_ready("auto")
        assert index_of(client)["linear"]["reason"] == "not loaded"
        client.load_model("linear")
        assert client.is_model_ready("linear", "1")


def test_metrics_tell_versions_apart(client: Any, agent: AgentProcess) -> None:
    """Triton's names carry model and version, so its dashboards show each version."""
    infer(client, "linear", X, version="1")
    with urllib.request.urlopen(f"http://{agent.metrics}/metrics") as page:
        text = page.read().decode()
    assert re.search(r'nv_inference_request_success\{model="linear",version="1"\} [1-9]', text)
    assert 'nv_inference_request_success{model="linear",version="3"}' in text
