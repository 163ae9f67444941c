"""Listeners beyond loopback: TLS, tokens, client certificates, and what happens to those who guess."""

from __future__ import annotations

import asyncio
import datetime
import http.client
import json
import re
import signal
import socket
import ssl
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, Optional

import grpc
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from activation_kit import listen
from agent_testing import AgentProcess, linear_bundle
from device_agent.check import check
from device_agent.config import Address, Limits, Tls, parse
from device_agent.errors import BadInput
from device_agent.server import access as access_module
from device_agent.server.access import Access
from device_agent.server.attempts import BURST, MAX_CLIENTS, REFILL_S, FailedAttempts
from device_agent.server.frames import GOAWAY
from device_agent.server.http import HttpServer

TOKEN = "a-token-of-thirty-two-characters"
BODY = json.dumps({"inputs": [{"name": "x", "shape": [1, 8], "datatype": "FP32", "data": [0.5] * 8}]})


@dataclass(frozen=True)
class Credentials:
    """The files of one test: a small authority, a server, a client of it, and a token."""

    root: Path

    def __getattr__(self, name: str) -> str:
        """The path of a file, such as ``server_pem``."""
        return str(self.root / name.replace("_", "."))

    def settings(self, *, token: bool = True, client_ca: bool = False) -> str:
        """The table ``[tls]``."""
        lines = [f'certificate = "{self.server_pem}"', f'key = "{self.server_key}"']
        if token:
            lines.append(f'token_file = "{self.token}"')
        if client_ca:
            lines.append(f'client_ca = "{self.ca_pem}"')
        return "[tls]\n" + "\n".join(lines) + "\n"


def issue(root: Path, name: str, authority: str = "ca") -> None:
    """Write ``NAME.pem`` and ``NAME.key``, signed by an authority (or by itself, as one)."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    signer, issuer = key, subject
    if name != authority:
        loaded = serialization.load_pem_private_key((root / f"{authority}.key").read_bytes(), None)
        assert isinstance(loaded, ec.EllipticCurvePrivateKey)
        signer = loaded
        issuer = x509.load_pem_x509_certificate((root / f"{authority}.pem").read_bytes()).subject
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=name == authority, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(signer, hashes.SHA256())
    )
    (root / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (root / f"{name}.key").write_bytes(private)
    (root / f"{name}.key").chmod(0o600)


@pytest.fixture
def files(tmp_path: Path) -> Credentials:
    """An authority, a server's and a client's certificate, and a token."""
    root = tmp_path / "tls"
    root.mkdir()
    for name in ("ca", "server", "client"):
        issue(root, name)
    (root / "token").write_text(TOKEN + "\n")
    (root / "token").chmod(0o600)
    return Credentials(root)


def client_context(files: Credentials, certificate: str = "") -> ssl.SSLContext:
    """A client that trusts the authority, with a certificate of its own if one is named."""
    context = ssl.create_default_context(cafile=files.ca_pem)
    if certificate:
        context.load_cert_chain(files.root / f"{certificate}.pem", files.root / f"{certificate}.key")
    return context


def connect(agent: AgentProcess, context: ssl.SSLContext, door: str = "") -> http.client.HTTPSConnection:
    """A connection to one of an agent's listeners, the serving one if none is named."""
    port = int((door or agent.http).rpartition(":")[2])
    return http.client.HTTPSConnection("localhost", port, context=context, timeout=10)


def ask(
    connection: http.client.HTTPConnection, token: Optional[str], method: str = "GET", path: str = "/v2"
) -> http.client.HTTPResponse:
    """One request on a connection, read to its end."""
    headers: Dict[str, str] = {} if token is None else {"Authorization": f"Bearer {token}"}
    connection.request(method, path, BODY if method == "POST" else None, headers)
    answer = connection.getresponse()
    answer.read()
    return answer


def test_a_token_opens_both_ports_and_nothing_else_does(
    start_agent: Callable[..., AgentProcess], files: Credentials, tmp_path: Path
) -> None:
    """Without the token every path is 401, health and metrics too; with it, all is served over TLS."""
    agent = start_agent(linear_bundle(tmp_path / "bundle"), settings=files.settings())
    context = client_context(files)
    for door, path in [(agent.http, "/v2"), (agent.http, "/v2/health/live"), (agent.metrics, "/metrics")]:
        for token in (None, "", TOKEN[:-1], TOKEN + "x"):
            connection = connect(agent, context, door)
            answer = ask(connection, token, path=path)
            assert answer.status == 401
            assert answer.headers["WWW-Authenticate"] == 'Bearer realm="edgekit-agent"'
            connection.close()
        connection = connect(agent, context, door)
        assert ask(connection, TOKEN, path=path).status == 200
        connection.close()
    connection = connect(agent, context)
    for _ in range(2):
        assert ask(connection, TOKEN, "POST", "/v2/models/model/infer").status == 200
    connection.close()
    assert TOKEN not in agent.log()


def test_an_unmodified_client_is_served(
    start_agent: Callable[..., AgentProcess], files: Credentials, tmp_path: Path
) -> None:
    """Triton's client speaks to the agent with its own options for TLS and a header."""
    agent = start_agent(linear_bundle(tmp_path / "bundle"), settings=files.settings())
    client = triton_http.InferenceServerClient(
        f"localhost:{agent.http.rpartition(':')[2]}",
        ssl=True,
        ssl_context_factory=lambda: client_context(files),
    )
    assert client.is_model_ready("model", headers={"Authorization": f"Bearer {TOKEN}"})
    assert not client.is_model_ready("model")
    client.close()


def test_the_body_of_a_stranger_is_not_read(
    start_agent: Callable[..., AgentProcess], files: Credentials
) -> None:
    """A request without the token is refused by its head, while its body is still to come."""
    agent = start_agent(settings=files.settings())
    raw = socket.create_connection(("127.0.0.1", int(agent.http.rpartition(":")[2])), timeout=10)
    with client_context(files).wrap_socket(raw, server_hostname="localhost") as stream:
        stream.sendall(b"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 60000000\r\n\r\n")
        assert stream.recv(4096).startswith(b"HTTP/1.1 401 ")


def test_who_guesses_has_to_wait(start_agent: Callable[..., AgentProcess], files: Credentials) -> None:
    """After some wrong tokens an address gets 429 with Retry-After, even with the right one."""
    agent = start_agent(settings=files.settings())
    context = client_context(files)
    statuses = []
    for number in range(BURST + 2):
        connection = connect(agent, context)
        answer = ask(connection, f"wrong-token-number-{number}")
        statuses.append(answer.status)
        connection.close()
    assert statuses[:BURST] == [401] * BURST
    assert statuses[-1] == 429
    connection = connect(agent, context)
    answer = ask(connection, TOKEN)
    assert answer.status == 429
    assert 0 < int(answer.headers["Retry-After"]) <= REFILL_S + 1
    connection.close()


def test_a_client_certificate_can_be_asked_for(
    start_agent: Callable[..., AgentProcess], files: Credentials
) -> None:
    """With ``client_ca``, who has no certificate of it does not get through the handshake."""
    issue(files.root, "other", "other")
    issue(files.root, "forged", "other")
    agent = start_agent(settings=files.settings(token=False, client_ca=True))
    for certificate in ("", "forged"):
        connection = connect(agent, client_context(files, certificate))
        with pytest.raises((ssl.SSLError, ConnectionError, http.client.HTTPException)):
            ask(connection, None)
        connection.close()
    connection = connect(agent, client_context(files, "client"))
    assert ask(connection, None).status == 200
    connection.close()


def test_old_versions_of_tls_and_plain_http_are_refused(
    start_agent: Callable[..., AgentProcess], files: Credentials
) -> None:
    """TLS 1.1 ends in the handshake, and a client without TLS gets nothing."""
    agent = start_agent(settings=files.settings())
    old = client_context(files)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises((ssl.SSLError, ConnectionError)):
        connect(agent, old).connect()
    plain = http.client.HTTPConnection("127.0.0.1", int(agent.http.rpartition(":")[2]), timeout=10)
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        ask(plain, TOKEN)
    plain.close()


@pytest.mark.parametrize("passed", [False, True])
def test_grpc_asks_for_the_same(
    activated: Callable[..., AgentProcess], files: Credentials, passed: bool
) -> None:
    """Over gRPC a call needs the token and the certificate too, on a passed socket as well."""
    with listen() as listener:
        settings = f"[grpc]\nenabled = {str(not passed).lower()}\nport = 0\n" + files.settings(client_ca=True)
        sockets = {"grpc": listener} if passed else {}
        _ask_over_grpc(activated(sockets, settings).start(), files)


def test_a_client_whose_handshake_ends_late_is_told_to_go(
    activated: Callable[..., AgentProcess], files: Credentials
) -> None:
    """On a passed socket, who connected before the agent began to end goes to the next one without a failure.

    Behind the server's settings comes the frame that sends it away, before it can send a call to be refused.
    """
    context = client_context(files)
    context.set_alpn_protocols(["h2"])

    def greeted(plain: socket.socket) -> ssl.SSLSocket:
        client = context.wrap_socket(plain, server_hostname="localhost")
        client.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0" + bytes(4))
        return client

    def sent_away(client: ssl.SSLSocket) -> bool:
        received = b""
        while GOAWAY not in received:
            more = client.recv(4096)
            if not more:
                return False
            received += more
        return True

    with listen() as listener:
        agent = activated({"grpc": listener}, files.settings()).start()
        address = ("127.0.0.1", listener.getsockname()[1])
        first, late = (socket.create_connection(address, timeout=20) for _ in range(2))
        with greeted(first) as first_client:
            assert first_client.recv(1)  # the agent has accepted both
            agent.process.send_signal(signal.SIGTERM)
            assert sent_away(first_client)
            with greeted(late) as late_client:
                assert sent_away(late_client)
        assert agent.process.wait(timeout=30) == 0


def _ask_over_grpc(agent: AgentProcess, files: Credentials) -> None:
    address = f"localhost:{agent.wait_for(r'grpc=([0-9.:]+)').group(1).rpartition(':')[2]}"
    root = Path(files.ca_pem).read_bytes()
    client, key = Path(files.client_pem).read_bytes(), Path(files.client_key).read_bytes()
    with triton_grpc.InferenceServerClient(
        address, creds=grpc.ssl_channel_credentials(root, key, client)
    ) as good:
        assert good.is_model_ready("model", headers={"authorization": f"Bearer {TOKEN}"})
        for headers in (None, {"authorization": "Bearer wrong-token-of-enough-size"}):
            with pytest.raises(triton_grpc.InferenceServerException, match="token"):
                good.is_model_ready("model", headers=headers)
    bad = triton_grpc.InferenceServerClient(address, creds=grpc.ssl_channel_credentials(root))
    with pytest.raises(triton_grpc.InferenceServerException):
        bad.is_server_live(headers={"authorization": f"Bearer {TOKEN}"}, client_timeout=5)
    bad.close()
    with triton_grpc.InferenceServerClient(
        address, creds=grpc.ssl_channel_credentials(root, key, client)
    ) as guesses:
        for number in range(20):
            with pytest.raises(triton_grpc.InferenceServerException) as caught:
                guesses.is_server_live(headers={"authorization": f"Bearer guess-{number}-of-enough-size"})
        assert "too many attempts" in str(caught.value)
    assert "came from 127.0.0.1" in agent.log()


def test_certificate_and_token_are_replaced_without_a_restart(
    files: Credentials, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """New files count after a moment; a pair that does not fit is named, and the old one goes on."""
    monkeypatch.setattr(access_module, "_RELOAD_S", 0.0)
    door = Access(Tls(files.server_pem, files.server_key, token_file=files.token))
    before = door.pem()
    issue(files.root, "server")
    Path(files.token).write_text(f"{TOKEN}\nanother-token-of-enough-size\n")
    assert door.pem() != before
    for token in (TOKEN, "another-token-of-enough-size"):
        assert door.refusal(f"Bearer {token}".encode(), "192.0.2.1") is None
    after = door.pem()
    Path(files.server_key).write_bytes(Path(files.client_key).read_bytes())
    assert door.pem() == after
    assert "new TLS files are not used" in caplog.text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[http]\nhost = '0.0.0.0'", "anyone on the network"),
        ("[tls]\ncertificate = 'a'\ntoken_file = 't'", "belong together"),
        ("[tls]\ncertificate = 'a'\nkey = 'b'", "tell clients apart"),
        ("[tls]\ntoken_file = 't'\n[metrics]\nhost = '::'", "tell clients apart"),
    ],
)
def test_half_a_door_is_refused(text: str, reason: str) -> None:
    """A bind address of the network needs TLS, and TLS needs a way to tell clients apart."""
    with pytest.raises(BadInput, match=reason):
        parse(text, "agent.toml")


def test_a_listener_of_the_network_is_allowed_behind_tls() -> None:
    """With certificate, key and token the agent may bind to any address."""
    text = "[http]\nhost = '0.0.0.0'\n[tls]\ncertificate = 'a'\nkey = 'b'\ntoken_file = 't'"
    assert parse(text, "agent.toml").http.host == "0.0.0.0"


def test_files_that_protect_nothing_are_refused(files: Credentials) -> None:
    """A key or token that everybody reads, a short token, and files that are no pair end the start."""
    settings = Tls(files.server_pem, files.server_key, token_file=files.token)
    Path(files.token).write_text("short\n")
    with pytest.raises(BadInput, match="16 characters"):
        Access(settings)
    Path(files.token).chmod(0o644)
    with pytest.raises(BadInput, match="everybody can read"):
        Access(settings)
    with pytest.raises(BadInput, match="belong together"):
        Access(Tls(files.server_pem, files.client_key, client_ca=files.ca_pem))
    with pytest.raises(BadInput, match="cannot be read"):
        Access(Tls(files.server_pem, str(files.root / "missing"), client_ca=files.ca_pem))


def test_a_token_that_was_taken_away_ends_open_connections_too(
    files: Credentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that sends the same head again and again is refused once its token is gone."""
    monkeypatch.setattr(access_module, "_RELOAD_S", 0.0)
    door = Access(Tls(files.server_pem, files.server_key, token_file=files.token))

    def client(port: int) -> list[int]:
        connection = http.client.HTTPSConnection("localhost", port, context=client_context(files))
        statuses = [ask(connection, TOKEN, "POST").status for _ in range(3)]
        Path(files.token).write_text("another-token-of-enough-size\n")
        door.refresh()
        statuses.append(ask(connection, TOKEN, "POST").status)
        connection.close()
        return statuses

    async def serve() -> list[int]:
        server = HttpServer(
            lambda request, connection: connection.respond(200, []), Limits(), lambda status: None, door
        )
        address = await server.start(Address())
        port = int(address.rpartition(":")[2])
        statuses: list[int] = await asyncio.get_running_loop().run_in_executor(None, client, port)
        await server.drain(1.0)
        return statuses

    assert asyncio.run(serve()) == [200, 200, 200, 401]


def test_the_check_names_the_day_on_which_the_certificate_ends(files: Credentials) -> None:
    """`edgekit-agent check` warns of a certificate that ends soon, and of files that cannot be used."""
    config = parse(files.settings(), "agent.toml")
    found = {finding.subject: finding for finding in check(config)}["tls"]
    assert found.status == "warning"  # the test's certificates are valid for a day
    assert re.search(r"valid until \d{4}-\d\d-\d\d", found.detail)
    Path(files.server_key).unlink()
    found = {finding.subject: finding for finding in check(config)}["tls"]
    assert found.status == "missing"


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0.0, 30.0)), max_size=80))
def test_failures_are_bounded_in_the_long_run(events: list[tuple[str, float]]) -> None:
    """No client gets more attempts than a burst and what the time since has brought; others do not wait."""
    attempts = FailedAttempts()
    now_s, allowed = 1000.0, {"a": 0, "b": 0, "c": 0}
    for client, pause_s in events:
        now_s += pause_s
        if attempts.wait_s(client, now_s) == 0.0:
            attempts.failed(client, now_s)
            allowed[client] += 1
        assert allowed[client] <= BURST + (now_s - 1000.0) / REFILL_S + 1e-6
        assert attempts.wait_s("someone else", now_s) == 0.0
        assert attempts.wait_s(client, now_s + REFILL_S + 1e-6) == 0.0


def test_the_memory_of_failures_is_bounded() -> None:
    """Many addresses cost no more than a fixed number of entries; one IPv6 site counts as one client."""
    attempts = FailedAttempts()
    for number in range(MAX_CLIENTS + 100):
        attempts.failed(f"198.51.{number // 256}.{number % 256}", 0.0)
    assert len(attempts) == MAX_CLIENTS
    for host in range(BURST):
        attempts.failed(f"2001:db8::{host + 1:x}", 0.0)
    assert attempts.wait_s("2001:db8::ffff", 0.0) > 0.0
    assert attempts.wait_s("2001:db8:0:1::1", 0.0) == 0.0
    assert attempts.wait_s("::ffff:198.51.16.1", time.monotonic()) == 0.0
