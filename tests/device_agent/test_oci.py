"""The client of OCI registries: what it takes, what it refuses, and what it never gives away."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_agent.errors import AgentError, BadInput
from device_agent.oci import artifact, reference, transport
from device_agent.oci.assembly import Assembly, fetch_head
from device_agent.oci.authorization import Credentials, parse_challenge
from device_agent.oci.client import Repository
from device_agent.oci.digests import digest_of
from device_agent.oci.errors import Denied, NotThere, RegistryError
from device_agent.oci.transport import Security, Transport
from registry_kit import Front, Registry, TokenService, answer, artifact_of, layer, needs_registry
from storage_kit import make_bundle
from test_access import issue

BLOB = bytes(range(256)) * 2000
DIGEST = digest_of(BLOB)
NOBODY = Credentials()
Rule = Callable[[Any], bool]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """One real registry, with a bundle of a blob that is worth interrupting."""
    root = tmp_path_factory.mktemp("registry")
    started = Registry(root / "files")
    make_bundle(root / "bundle", {"weights.bin": BLOB})
    started.push(root / "bundle")
    yield started
    started.stop()


@pytest.fixture
def front(request: pytest.FixtureRequest) -> Iterator[Front]:
    """A server in front of the real registry; in front of nothing where the test does without."""
    behind = request.getfixturevalue("real").host if "real" in request.fixturenames else ""
    started = Front(behind)
    yield started
    started.stop()


def repository(host: str, credentials: Credentials = NOBODY) -> Repository:
    """A repository at a host of loopback."""
    found = reference.parse(f"oci://{host}/models/model:stable")
    return Repository(found, Transport(Security()), credentials)


def download(front: Front, part: Path, counted: List[int]) -> None:
    """Download the blob once."""
    repository(front.host).download(DIGEST, len(BLOB), part, counted.append)


# Downloads


@needs_registry
def test_an_interrupted_download_goes_on(real: Registry, front: Front, tmp_path: Path) -> None:
    """However often the line is cut, what came is kept, and not one percent is sent twice."""
    front.cut_after_bytes = [1, 100_000, 250_000, 77_777]
    part, counted = tmp_path / "part", []  # type: ignore[var-annotated]  # integers
    for _ in range(4):
        with pytest.raises(RegistryError, match="came only in part"):
            download(front, part, counted)
    download(front, part, counted)
    assert part.read_bytes() == BLOB
    assert sum(counted) == len(BLOB)
    assert front.sent_bytes[DIGEST] <= len(BLOB) * 1.01
    ranges = [headers["Range"] for _, _, headers in front.seen if "Range" in headers]
    assert ranges[:2] == ["bytes=1-", "bytes=100001-"]


@needs_registry
def test_a_bundle_whose_line_is_cut_again_and_again_arrives(
    real: Registry, front: Front, tmp_path: Path
) -> None:
    """Cuts that each bring something are lived through within one call."""
    front.cut_after_bytes = [100_000, 100_000, 100_000]
    remote = repository(front.host)
    head = fetch_head(remote, remote.resolve(reference.parse(f"oci://{front.host}/models/model:stable")))
    assembly = Assembly(tmp_path / "work", head, {})
    assert assembly.missing_bytes() == sum(entry.size_bytes for entry in head.manifest.files)
    directory = assembly.complete(remote, lambda count: None)
    assert (directory / "weights.bin").read_bytes() == BLOB
    assert front.sent_bytes[DIGEST] <= len(BLOB) * 1.01


def _serve_blob(change: Callable[[Any], bool]) -> Rule:
    def rule(handler: Any) -> bool:
        return "/blobs/" in handler.path and change(handler)

    return rule


def test_a_registry_without_ranges_is_begun_again(front: Front, tmp_path: Path) -> None:
    """Where Range is ignored, the whole blob is taken, over what there was."""
    front.rules.append(_serve_blob(lambda handler: answer(handler, 200, BLOB)))
    (tmp_path / "part").write_bytes(BLOB[:1000])
    download(front, tmp_path / "part", [])
    assert (tmp_path / "part").read_bytes() == BLOB


def test_a_range_that_begins_elsewhere_is_not_taken(front: Front, tmp_path: Path) -> None:
    """A 206 for another range than was asked for is an error, and what there was stays."""
    wrong = {"Content-Range": f"bytes 0-9/{len(BLOB)}"}
    front.rules.append(_serve_blob(lambda handler: answer(handler, 206, BLOB[:10], wrong)))
    (tmp_path / "part").write_bytes(BLOB[:1000])
    with pytest.raises(RegistryError, match="206"):
        download(front, tmp_path / "part", [])
    assert (tmp_path / "part").read_bytes() == BLOB[:1000]


def test_a_part_that_the_registry_does_not_know_is_dropped(front: Front, tmp_path: Path) -> None:
    """After a 416 the next attempt begins again."""
    front.rules.append(
        _serve_blob(lambda handler: answer(handler, *((416,) if "Range" in handler.headers else (200, BLOB))))
    )
    (tmp_path / "part").write_bytes(b"x" * 1000)
    with pytest.raises(RegistryError, match="416"):
        download(front, tmp_path / "part", [])
    download(front, tmp_path / "part", [])
    assert (tmp_path / "part").read_bytes() == BLOB


def test_a_wrong_blob_is_thrown_away(front: Front, tmp_path: Path) -> None:
    """Content with another digest is refused and not gone on from."""
    front.rules.append(_serve_blob(lambda handler: answer(handler, 200, BLOB[::-1])))
    with pytest.raises(RegistryError, match="not what its digest says"):
        download(front, tmp_path / "part", [])
    assert not (tmp_path / "part").exists()


def test_not_a_byte_more_than_the_manifest_says(front: Front, tmp_path: Path) -> None:
    """A blob that is larger than the signed manifest says fills no disk."""
    front.rules.append(_serve_blob(lambda handler: answer(handler, 200, BLOB * 3)))
    counted: List[int] = []
    with pytest.raises(RegistryError, match="not what its digest says"):
        download(front, tmp_path / "part", counted)
    assert sum(counted) <= len(BLOB)
    assert (tmp_path / "part").stat().st_size <= len(BLOB)


def test_an_empty_blob_is_a_blob(front: Front, tmp_path: Path) -> None:
    """A file without content is fetched like any other."""
    front.rules.append(_serve_blob(lambda handler: answer(handler, 200, b"")))
    repository(front.host).download(digest_of(b""), 0, tmp_path / "part", lambda count: None)
    assert (tmp_path / "part").read_bytes() == b""


# Answers


@pytest.mark.parametrize(
    ("status", "error", "fragment"),
    [
        (404, NotThere, "does not exist"),
        (403, Denied, "wants other credentials"),
        (401, Denied, "none were given"),
        (429, RegistryError, "cannot be had now"),
        (500, RegistryError, "cannot be had now"),
        (302, RegistryError, "answers 302"),
    ],
)
def test_refusals_are_told_apart(front: Front, status: int, error: type, fragment: str) -> None:
    """What a registry answers instead of a manifest is an error that says what to do."""
    front.rules.append(lambda handler: answer(handler, status, b"", {"Retry-After": "17"}))
    with pytest.raises(error) as caught:
        repository(front.host).manifest(DIGEST)
    assert fragment in str(caught.value)
    assert caught.value.retry_after_s == (17 if status in (429, 500) else 0)


def test_documents_are_bounded(front: Front) -> None:
    """A manifest without end is not read to its end, whether or not its size was announced."""
    size = artifact.MAX_ARTIFACT_BYTES + 1
    front.rules.append(lambda handler: answer(handler, 200, b" " * size))
    with pytest.raises(RegistryError, match="larger than it may be"):
        repository(front.host).manifest(DIGEST)
    front.rules[0] = lambda handler: answer(handler, 200, b"x" * 1000)
    with pytest.raises(RegistryError, match="larger than it may be"):
        repository(front.host).blob(DIGEST, 999)

    def endless(handler: Any) -> bool:
        handler.send_response(200)
        handler.end_headers()
        with suppress(OSError):
            while True:
                handler.wfile.write(b" " * 65536)
        return True

    front.rules[0] = endless
    with pytest.raises(RegistryError, match="larger than it may be"):
        repository(front.host).manifest(DIGEST)


def test_a_manifest_is_held_to_its_digest(front: Front) -> None:
    """Another manifest under a digest is refused; a header that claims the digest does not help."""
    claim = {"Docker-Content-Digest": DIGEST}
    front.rules.append(lambda handler: answer(handler, 200, b"{}", claim))
    with pytest.raises(RegistryError, match="not what its digest says"):
        repository(front.host).manifest(DIGEST)


def test_a_tag_resolves_without_the_optional_header(front: Front) -> None:
    """A registry that does not name the digest of a tag is asked for the manifest."""
    front.rules.append(lambda handler: answer(handler, 200, b"" if handler.command == "HEAD" else b"{}"))
    found = repository(front.host).resolve(reference.parse(f"oci://{front.host}/models/model:stable"))
    assert found == digest_of(b"{}")
    pinned = reference.parse(f"oci://{front.host}/models/model@{DIGEST}")
    before = len(front.seen)
    assert repository(front.host).resolve(pinned) == DIGEST
    assert len(front.seen) == before


def _raw_server(talk: Callable[[socket.socket], None]) -> str:
    """A peer that speaks whatever ``talk`` says, to one client."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with listener:
            peer, _ = listener.accept()
            with peer:
                peer.recv(65536)
                try:
                    talk(peer)
                except OSError:
                    return

    threading.Thread(target=serve, daemon=True).start()
    return f"127.0.0.1:{listener.getsockname()[1]}"


def _drip(peer: socket.socket) -> None:
    for _ in range(2000):
        peer.sendall(b"H")
        time.sleep(0.005)


def _drip_body(peer: socket.socket) -> None:
    peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 512000\r\n\r\n")
    _drip(peer)


def test_headers_that_drip_are_waited_for_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that sends a byte now and then, for ever, is left."""
    monkeypatch.setattr(transport, "_ANSWER_TIMEOUT_S", 0.05)
    with pytest.raises(RegistryError, match="no answer from"):
        repository(_raw_server(_drip)).manifest(DIGEST)


def test_documents_that_drip_are_waited_for_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """So is one whose body drips."""
    monkeypatch.setattr(transport, "_SMALL_TIMEOUT_S", 0.05)
    with pytest.raises(RegistryError):
        repository(_raw_server(_drip_body)).manifest(DIGEST)


def test_blobs_that_drip_are_given_up_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A blob that hardly moves is given up; what came stays for the next attempt."""
    monkeypatch.setattr(transport, "_STALL_S", 0.05)
    with pytest.raises(RegistryError, match="too slow"):
        repository(_raw_server(_drip_body)).download(DIGEST, 512_000, tmp_path / "part", lambda count: None)
    assert 0 < (tmp_path / "part").stat().st_size < 4096


@pytest.mark.parametrize(
    "bytes_",
    [
        b"",
        b"SSH-2.0-nope\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf",
    ],
    ids=["silence", "another protocol", "many headers", "a long header", "no chunk", "half"],
)
def test_nonsense_is_a_registry_error(bytes_: bytes) -> None:
    """Whatever answers in the registry's place, the client says so and goes on living."""
    with pytest.raises(RegistryError):
        repository(_raw_server(lambda peer: peer.sendall(bytes_))).manifest(DIGEST)


def test_close_breaks_off_a_transfer_at_once(tmp_path: Path) -> None:
    """A stopping agent does not wait for a download."""
    found = reference.parse(f"oci://{_raw_server(_drip_body)}/models/model:stable")
    carrier = Transport(Security())
    started = threading.Event()
    failures: List[RegistryError] = []

    def fetch() -> None:
        try:
            Repository(found, carrier, Credentials()).download(
                DIGEST, 512_000, tmp_path / "part", lambda count: started.set()
            )
        except RegistryError as error:
            failures.append(error)

    thread = threading.Thread(target=fetch)
    thread.start()
    assert started.wait(20)
    carrier.close()
    thread.join(5)
    assert not thread.is_alive()
    assert failures
    with pytest.raises(RegistryError, match="broken off"):
        Repository(found, carrier, Credentials()).manifest(DIGEST)
    nobody = reference.parse("oci://127.0.0.1:1/models/model:stable")
    with pytest.raises(RegistryError, match="broken off"):
        Repository(nobody, carrier, Credentials()).manifest(DIGEST)


# Redirects and secrets


def test_a_redirect_takes_no_credentials_to_another_host(front: Front, tmp_path: Path) -> None:
    """Blobs that lie elsewhere are fetched from there, and the token stays with the registry."""
    store = Front()
    store.rules.append(lambda handler: answer(handler, 200, BLOB))
    place = {"Location": f"http://{store.host}/bucket/blob?signature=secret"}
    front.rules.append(_serve_blob(lambda handler: answer(handler, 307, b"", place)))
    try:
        asked = repository(front.host, Credentials(bearer_token="t0p"))
        asked.download(DIGEST, len(BLOB), tmp_path / "part", lambda count: None)
    finally:
        store.stop()
    assert front.authorizations() == ["Bearer t0p"]
    assert store.authorizations() == []
    assert store.paths() == ["/bucket/blob?signature=secret"]


def test_a_store_of_blobs_cannot_ask_for_credentials(front: Front, tmp_path: Path) -> None:
    """A 401 from where the registry redirects to is refused: no password goes to its token service."""
    store = Front()
    service = TokenService(store, "ann", "s3cret")
    front.rules.append(
        _serve_blob(lambda handler: answer(handler, 302, b"", {"Location": f"http://{store.host}/x"}))
    )
    asked = repository(front.host, Credentials("ann", "s3cret"))
    try:
        with pytest.raises(Denied):
            asked.download(DIGEST, len(BLOB), tmp_path / "part", lambda count: None)
    finally:
        store.stop()
    assert (service.asked, store.authorizations()) == ([], [])


@pytest.mark.parametrize(
    ("location", "fragment"),
    [
        ("http://registry.example.com/blob", "not encrypted"),
        ("file:///etc/passwd", "not encrypted"),
        ("/v2/again", "in a circle"),
        ("http://127.0.0.1:notaport/", "no answer"),
    ],
)
def test_bad_redirects_are_not_followed(front: Front, location: str, fragment: str) -> None:
    """Not in the clear over a network, not to a file, not for ever."""
    front.rules.append(lambda handler: answer(handler, 307, b"", {"Location": location}))
    with pytest.raises(RegistryError) as caught:
        repository(front.host).manifest(DIGEST)
    assert fragment in str(caught.value)


def test_the_query_of_an_address_is_never_shown(front: Front, tmp_path: Path) -> None:
    """The secret in the address of a blob store does not get into errors or logs."""
    place = {"Location": "http://127.0.0.1:1/bucket?signature=s3cret"}
    front.rules.append(_serve_blob(lambda handler: answer(handler, 307, b"", place)))
    with pytest.raises(RegistryError) as caught:
        download(front, tmp_path / "part", [])
    assert "s3cret" not in str(caught.value)
    assert "/bucket" in str(caught.value)


@needs_registry
def test_the_token_flow(real: Registry, front: Front) -> None:
    """A token is got once for user and password, used for every request, and renewed when it expires."""
    service = TokenService(front, "ann", "s3cret")
    asked = repository(front.host, Credentials("ann", "s3cret"))
    stable = reference.parse(f"oci://{front.host}/models/model:stable")
    digest = asked.resolve(stable)
    asked.manifest(digest)
    assert service.asked == [{"service": ["kit"], "scope": ["repository:a:pull"]}]
    service.expire()
    asked.manifest(digest)
    assert len(service.asked) == 2
    with pytest.raises(Denied, match="may be wrong"):
        repository(front.host, Credentials("ann", "wrong")).manifest(digest)
    with pytest.raises(Denied, match="none were given"):
        repository(front.host).manifest(digest)


@needs_registry
def test_everybody_may_get_a_token_where_that_is_allowed(real: Registry, front: Front) -> None:
    """Without credentials an anonymous token is asked for, as public registries want it."""
    service = TokenService(front)
    asked = repository(front.host)
    asked.manifest(asked.resolve(reference.parse(f"oci://{front.host}/models/model:stable")))
    assert len(service.asked) == 1
    assert front.authorizations()
    assert not any(value.startswith("Basic") for value in front.authorizations())


def test_a_refresh_token_is_exchanged(front: Front) -> None:
    """An identity token goes to the token service only, in the body of a POST."""
    forms: List[bytes] = []

    def rule(handler: Any) -> bool:
        if handler.path == "/token":
            forms.append(handler.rfile.read(int(handler.headers["Content-Length"])))
            return answer(handler, 200, b'{"access_token": "fresh"}')
        if handler.headers.get("Authorization") == "Bearer fresh":
            return answer(handler, 200, b"{}")
        where = f'Bearer realm="http://{front.host}/token",service="kit",scope="s"'
        return answer(handler, 401, b"", {"WWW-Authenticate": where})

    front.rules.append(rule)
    repository(front.host, Credentials(refresh_token="r3fresh")).manifest(digest_of(b"{}"))
    assert len(forms) == 1
    assert b"grant_type=refresh_token" in forms[0]
    assert b"refresh_token=r3fresh" in forms[0]


@pytest.mark.parametrize(
    ("challenge", "fragment"),
    [
        ('Bearer realm="http://tokens.example.com/t"', "not encrypted"),
        ('Bearer realm="file:///etc/passwd"', "not encrypted"),
        ("Bearer", "not encrypted"),
        ("Negotiate", "none of the credentials"),
    ],
)
def test_a_password_never_goes_where_it_could_be_read(front: Front, challenge: str, fragment: str) -> None:
    """A token service without TLS beyond loopback gets nothing."""
    front.rules.append(lambda handler: answer(handler, 401, b"", {"WWW-Authenticate": challenge}))
    with pytest.raises(RegistryError) as caught:
        repository(front.host, Credentials("ann", "s3cret")).manifest(DIGEST)
    assert fragment in str(caught.value)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b"{}", b'{"token": 5}', b'{"token": "a\\r\\nX: y"}'])
def test_a_confused_token_service_is_an_error(front: Front, body: bytes) -> None:
    """Whatever is no token is not sent as one, least of all into the headers."""

    def rule(handler: Any) -> bool:
        if handler.path.startswith("/token"):
            return answer(handler, 200, body)
        where = f'Bearer realm="http://{front.host}/token"'
        return answer(handler, 401, b"", {"WWW-Authenticate": where})

    front.rules.append(rule)
    with pytest.raises(RegistryError, match="token service"):
        repository(front.host).manifest(DIGEST)


# Pure parts


def test_challenges_are_read() -> None:
    """Quoted values with commas and escapes, plain ones, and schemes without any."""
    assert parse_challenge('Bearer realm="https://a/t",scope="repository:m:pull,push", error=x') == (
        "bearer",
        {"realm": "https://a/t", "scope": "repository:m:pull,push", "error": "x"},
    )
    assert parse_challenge(r'Basic realm="say \"hi\""') == ("basic", {"realm": 'say "hi"'})
    assert parse_challenge("Negotiate") == ("negotiate", {})


@given(st.text(max_size=50))
def test_no_challenge_breaks_the_parser(text: str) -> None:
    """Any header gives a scheme and parameters."""
    scheme, parameters = parse_challenge(text)
    assert scheme == scheme.lower()
    assert isinstance(parameters, dict)


_names = st.from_regex(r"[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+){0,2}", fullmatch=True)
_hosts = st.from_regex(r"[a-z0-9]([a-z0-9.-]{0,10}[a-z0-9])?(:[0-9]{1,5})?", fullmatch=True)


@given(
    _hosts,
    st.lists(_names, min_size=1, max_size=3),
    st.from_regex(r"(:[A-Za-z0-9_][A-Za-z0-9._-]{0,20})?", fullmatch=True),
    st.booleans(),
)
def test_references_read_back_as_written(host: str, parts: List[str], tag: str, pinned: bool) -> None:
    """Every reference of the distribution specification's grammar is taken apart and put together again."""
    text = f"{host}/{'/'.join(parts)}{tag}{'@' + DIGEST if pinned else ''}"
    if not tag and not pinned:
        with pytest.raises(BadInput, match="names no version"):
            reference.parse("oci://" + text)
        return
    found = reference.parse("oci://" + text)
    assert str(found) == text
    assert found.manifest_name == (DIGEST if pinned else tag[1:])
    assert str(found.pinned(DIGEST)) == f"{host}/{'/'.join(parts)}@{DIGEST}"


@given(st.text(max_size=100))
def test_anything_else_is_no_reference(text: str) -> None:
    """A text is a reference that reads back as it was, or refused as bad input."""
    with suppress(BadInput):
        assert "oci://" + str(reference.parse(text)) == text


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@given(
    st.one_of(
        st.binary(max_size=50),
        _json.map(lambda value: json.dumps(value).encode()),
        _json.map(lambda value: json.dumps({"layers": value}).encode()),
        _json.map(lambda value: _artifact(layers=[{"digest": DIGEST, "size": 1, "annotations": value}])),
    )
)
def test_no_artifact_breaks_the_parser(data: bytes) -> None:
    """Whatever a registry calls a manifest is an artifact with sound layers, or refused as none."""
    try:
        parsed = artifact.parse(data)
    except BadInput:
        return
    for layer_of_name in parsed.named.values():
        assert re.fullmatch(r"sha256:[0-9a-f]{64}", layer_of_name.digest)
        assert parsed.sizes[layer_of_name.digest] == layer_of_name.size_bytes >= 0


def _artifact(**changes: Any) -> bytes:
    document: Dict[str, Any] = {"layers": [layer("manifest.json", b"{}")], **changes}
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (_artifact(mediaType="application/vnd.oci.image.index.v1+json"), "of another kind"),
        (_artifact(layers=[layer("x", b"")] * 5000), "more than"),
        (_artifact(layers=[layer("x", b"1"), layer("x", b"2")]), "two layers named x"),
        (_artifact(layers=[{"digest": "sha512:" + "0" * 128, "size": 1}]), "no SHA-256"),
        (_artifact(layers=[{"digest": DIGEST, "size": -1}]), "no SHA-256"),
        (_artifact(layers=[{"digest": DIGEST, "size": True}]), "no SHA-256"),
        (b"{" * 100_000, "malformed"),
    ],
)
def test_what_is_no_bundle_is_told(data: bytes, why: str) -> None:
    """An index, too many layers, names that clash and other digests have their own words."""
    with pytest.raises(BadInput) as caught:
        artifact.parse(data)
    assert why in caught.value.why


def test_an_artifact_that_lacks_a_file_is_refused_before_any_large_blob(front: Front, tmp_path: Path) -> None:
    """The bundle's own manifest says what must be there."""
    make_bundle(tmp_path / "bundle", {"weights.bin": BLOB})
    data, blobs = artifact_of(tmp_path / "bundle")
    document = json.loads(data)
    document["layers"] = [item for item in document["layers"] if item["digest"] != DIGEST]
    served = {digest_of(blob): blob for blob in [*blobs, json.dumps(document).encode()]}
    front.rules.append(lambda handler: answer(handler, 200, served[handler.path.rpartition("/")[2]]))
    with pytest.raises(BadInput, match=r"lacks weights\.bin"):
        fetch_head(repository(front.host), digest_of(json.dumps(document).encode()))
    assert not [path for path in front.paths() if path.endswith(DIGEST)]


def test_work_is_checked_before_it_is_used(front: Front, tmp_path: Path) -> None:
    """Of an earlier attempt, files that decayed are fetched again and strangers are removed."""
    head = make_bundle(tmp_path / "bundle")
    served = {digest_of(blob): blob for blob in artifact_of(tmp_path / "bundle")[1]}
    front.rules.append(lambda handler: answer(handler, 200, served[handler.path.rpartition("/")[2]]))
    work = tmp_path / "work"
    (work / "bundle").mkdir(parents=True)
    (work / "parts").mkdir()
    good = (tmp_path / "bundle" / "model.onnx").read_bytes()
    (work / "bundle" / "model.onnx").write_bytes(good[::-1])
    (work / "bundle" / "stranger").write_bytes(b"?")
    (work / "parts" / "old").write_bytes(b"?")
    decayed = tmp_path / "decayed"
    decayed.write_bytes(b"not the golden inputs")
    here = {entry.sha256: decayed for entry in head.manifest.files if entry.path == "golden/inputs.npz"}
    directory = Assembly(work, head, here).complete(repository(front.host), lambda count: None)
    for path in ("manifest.json", *(entry.path for entry in head.manifest.files)):
        assert (directory / path).read_bytes() == (tmp_path / "bundle" / path).read_bytes()
    assert not (directory / "stranger").exists()
    assert decayed.read_bytes() == b"not the golden inputs"


def test_a_host_without_tls_is_told_to_get_it() -> None:
    """A reference to a host beyond loopback is never asked in the clear by mistake."""
    carrier = Transport(Security())
    with pytest.raises(BadInput, match="without encryption"), carrier.request(
        "GET", "http://registry.example.com/v2/", {}
    ):
        pass


@needs_registry
def test_certificates_are_verified(tmp_path: Path) -> None:
    """A registry over TLS is believed if ca_file vouches for its name, and else gets no request."""
    make_bundle(tmp_path / "bundle")
    plain = Registry(tmp_path / "files")
    digest = plain.push(tmp_path / "bundle")
    plain.stop()
    for name in ("ca", "server"):
        issue(tmp_path, name)
    (tmp_path / "other").mkdir()
    issue(tmp_path / "other", "ca")
    secure = Registry(tmp_path / "files", tmp_path / "server.pem")
    try:
        found = reference.parse(f"oci://localhost:{secure.host.rpartition(':')[2]}/models/model:stable")
        trusted = Repository(found, Transport(Security(str(tmp_path / "ca.pem"))), NOBODY)
        assert trusted.resolve(found) == digest
        stranger = Repository(found, Transport(Security(str(tmp_path / "other" / "ca.pem"))), NOBODY)
        with pytest.raises(RegistryError, match="CERTIFICATE_VERIFY_FAILED"):
            stranger.resolve(found)
        by_address = replace(found, host=secure.host)
        misnamed = Repository(by_address, Transport(Security(str(tmp_path / "ca.pem"))), NOBODY)
        with pytest.raises(RegistryError, match="CERTIFICATE_VERIFY_FAILED"):
            misnamed.resolve(by_address)
    finally:
        secure.stop()


def test_certificates_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    """A wrong ca_file is an error that names it, not a connection without checks."""
    (tmp_path / "ca.pem").write_text("no certificate")
    found = reference.parse("oci://localhost:1/models/model:stable")
    with pytest.raises(AgentError, match=r"ca\.pem"):
        Repository(found, Transport(Security(str(tmp_path / "ca.pem"))), Credentials()).manifest(DIGEST)
