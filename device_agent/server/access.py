"""Who may use the TCP listeners: TLS, and a token or a client certificate.

The files are read again when they change, so that a certificate is renewed, or a token replaced, without a
restart. Unix sockets need none of this: their file permissions decide.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import ssl
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional, Tuple

from device_agent.config import Tls
from device_agent.errors import BadInput
from device_agent.server.attempts import FailedAttempts

MIN_TOKEN_CHARACTERS = 16

_MAX_FILE_BYTES = 64 * 1024
_RELOAD_S = 10.0
_SCHEME = b"bearer "
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Refusal:
    """Why a client is not let in.

    Attributes:
        status: 401, or 429 for one that failed too often.
        message: for its user.
        retry_after_s: when it may try again; 0: no wait is asked for.
    """

    status: int
    message: str
    retry_after_s: int = 0

    @property
    def headers(self) -> bytes:
        """Header lines of the answer (RFC 6750, section 3; RFC 6585, section 4)."""
        if self.status == 401:
            return b'WWW-Authenticate: Bearer realm="edgekit-agent"\r\n'
        return b"Retry-After: %d\r\n" % self.retry_after_s


class Access:
    """The door of the TCP listeners.

    Attributes:
        context: TLS 1.2 and newer; with ``client_ca``, a client needs a certificate that it signed.
    """

    def __init__(self, settings: Tls) -> None:
        """Read the files.

        Raises:
            BadInput: one is missing, malformed, or readable by everybody.
        """
        self._settings = settings
        self._attempts = FailedAttempts()
        self._seen = _stamps(settings)
        self._looked_s = time.monotonic()
        self.context = _context(settings)
        self._contexts = [self.context]
        self._pair = _read_pair(settings)
        self._client_ca = Path(settings.client_ca).read_bytes() if settings.client_ca else None
        self._tokens = _read_tokens(settings)

    @property
    def needs_certificate(self) -> bool:
        """Whether clients must have a certificate."""
        return bool(self._settings.client_ca)

    def context_for(self, protocol: str) -> ssl.SSLContext:
        """TLS as in ``context``, for clients that ask for a protocol by its name (ALPN, RFC 7301)."""
        context = _context(self._settings)
        context.set_alpn_protocols([protocol])
        self._contexts.append(context)
        return context

    def pem(self) -> Tuple[bytes, bytes, Optional[bytes]]:
        """Key, certificate and the clients' authorities, for a library that makes its own context.

        What is given was accepted by ``context`` before.
        """
        self.refresh()
        return (*self._pair, self._client_ca)

    def refusal(self, authorization: Optional[bytes], client: str) -> Optional[Refusal]:
        """Why a request is not answered; None: it is.

        Args:
            authorization: its ``Authorization`` header.
            client: the address that it comes from.
        """
        if not self._settings.token_file:
            return None  # the handshake has asked for a certificate
        now_s = time.monotonic()
        wait_s = self._attempts.wait_s(client, now_s)
        if wait_s > 0.0:
            return Refusal(429, "too many attempts with a wrong token", int(wait_s) + 1)
        if self._knows(authorization or b""):
            return None
        if authorization is not None:  # a client that does not know yet that it needs one is not guessing
            self._attempts.failed(client, now_s)
            _log.warning("a wrong token came from %s", client)
        return Refusal(401, "a token is needed: 'Authorization: Bearer TOKEN'")

    def refresh(self) -> None:
        """Read the files again if they changed; on an error, go on with what was read before."""
        now_s = time.monotonic()
        if now_s - self._looked_s < _RELOAD_S:
            return
        self._looked_s = now_s
        stamps = _stamps(self._settings)
        if stamps == self._seen:
            return
        self._seen = stamps
        try:
            tokens = _read_tokens(self._settings)
            _context(self._settings)  # a pair that does not fit must not replace the one that does
            pair = _read_pair(self._settings)
            for context in self._contexts:
                context.load_cert_chain(self._settings.certificate, self._settings.key)
        except (BadInput, OSError, ssl.SSLError) as error:
            _log.error("new TLS files are not used: %s", str(error).replace("\n", ": "))
            return
        self._tokens, self._pair = tokens, pair
        _log.info("new TLS files are used")

    def _knows(self, authorization: bytes) -> bool:
        if authorization[: len(_SCHEME)].lower() != _SCHEME:
            return False
        offered = hashlib.sha256(authorization[len(_SCHEME) :].strip()).digest()
        found = False
        for token in self._tokens:  # all of them, so that the time tells nothing
            found |= hmac.compare_digest(offered, token)
        return found


def _context(settings: Tls) -> ssl.SSLContext:
    _require_private(Path(settings.key), "tls.key")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(settings.certificate, settings.key, password=_no_password)
        if settings.client_ca:
            context.load_verify_locations(cafile=settings.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ssl.SSLError) as error:
        named = " or ".join(path for path in (settings.certificate, settings.key, settings.client_ca) if path)
        raise BadInput(
            "TLS cannot be used",
            f"{named}: {error}",
            "give PEM files whose certificate and key belong together",
        ) from error
    return context


def _no_password() -> str:
    raise ssl.SSLError("the key is encrypted, and nobody is here to type its password")


def _read_pair(settings: Tls) -> Tuple[bytes, bytes]:
    return Path(settings.key).read_bytes(), Path(settings.certificate).read_bytes()


def _read_tokens(settings: Tls) -> Tuple[bytes, ...]:
    """SHA-256 of each token: one a line, so that a new one can be added before the old one goes."""
    if not settings.token_file:
        return ()
    path = Path(settings.token_file)
    _require_private(path, "tls.token_file")
    try:
        with path.open("rb") as stream:
            lines = stream.read(_MAX_FILE_BYTES).split(b"\n")
    except OSError as error:
        raise _unreadable(path, "tls.token_file", error) from error
    tokens: List[bytes] = [line.strip() for line in lines if line.strip()]
    if not tokens or min(map(len, tokens)) < MIN_TOKEN_CHARACTERS:
        raise BadInput(
            f"{path} cannot be used",
            f"a token has fewer than {MIN_TOKEN_CHARACTERS} characters, or there is none",
            f"make one with `openssl rand -hex 32 > {path}`",
        )
    return tuple(hashlib.sha256(token).digest() for token in tokens)


def _require_private(path: Path, key: str) -> None:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise _unreadable(path, key, error) from error
    if mode & stat.S_IROTH:
        raise BadInput(
            f"{path} cannot be used", f"everybody can read it ('{key}')", f"run `chmod o-rwx {path}`"
        )


def _unreadable(path: Path, key: str, error: OSError) -> BadInput:
    return BadInput(
        f"{path} cannot be read", error.strerror or str(error), f"correct '{key}', or the file's permissions"
    )


def _stamps(settings: Tls) -> Dict[str, Optional[Tuple[int, int]]]:
    """When each file that may change did so last, and which one it is; None for one that cannot be seen."""
    stamps: Dict[str, Optional[Tuple[int, int]]] = {}
    for path in (settings.certificate, settings.key, settings.token_file):
        if path:
            try:
                seen = os.stat(path)
            except OSError:
                stamps[path] = None
            else:
                stamps[path] = (seen.st_mtime_ns, seen.st_ino)
    return stamps
