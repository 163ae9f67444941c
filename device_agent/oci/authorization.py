"""How a registry is told who asks: Basic, and the Bearer token flow of the Docker registry.

A registry answers 401 with a challenge. For ``Bearer`` it names a token service (the realm), which gives a
token for the scope in exchange for the credentials, or for nothing where everybody may read.
Source: the distribution project's "Token Authentication Specification" and its OAuth2 extension.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass, field
from typing import Dict, List, Optional, Tuple
from urllib.parse import urlencode

from device_agent import json_text
from device_agent.oci.errors import Denied, RegistryError
from device_agent.oci.transport import Transport

_MAX_TOKEN_BYTES = 256 * 1024
_CHALLENGE = re.compile(r"\s*([A-Za-z]+)\s+(.*)", re.DOTALL)
_PARAMETER = re.compile(r'([A-Za-z_]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))')
_TOKEN = re.compile(r"[\x21-\x7e]+")


@dataclass(frozen=True)
class Credentials:
    """What a person or a device is known by; all empty: nobody in particular.

    Attributes:
        username: with ``password``.
        password: a password or an access token in its place.
        refresh_token: an OAuth2 refresh token ("identity token"), used in the password's place.
        bearer_token: sent to the registry as it is, without a token service.
    """

    username: str = ""
    password: str = field(default="", repr=False)
    refresh_token: str = field(default="", repr=False)
    bearer_token: str = field(default="", repr=False)

    @property
    def secret(self) -> bool:
        """Whether there is anything to keep secret."""
        return bool(self.password or self.refresh_token or self.bearer_token)

    def basic(self) -> str:
        """The value of a Basic ``Authorization`` header."""
        pair = f"{self.username}:{self.password}".encode()
        return "Basic " + base64.b64encode(pair).decode("ascii")


class Authorizer:
    """Finds the ``Authorization`` header that a registry wants, and remembers it."""

    def __init__(self, transport: Transport, credentials: Credentials) -> None:
        self._transport = transport
        self._credentials = credentials
        self._header = ""

    def headers(self, url: str) -> Dict[str, str]:
        """What to send along with a request."""
        bearer = self._credentials.bearer_token
        if not self._header and bearer and self._transport.security.allows_secrets(url):
            self._header = f"Bearer {bearer}"
        return {"Authorization": self._header} if self._header else {}

    def answer(self, challenges: List[str], url: str) -> None:
        """Take up the challenges of a 401 from ``url``.

        Raises:
            Denied: there are no credentials that would answer them, or they are not taken.
            RegistryError: the token service fails.
        """
        found = dict(parse_challenge(challenge) for challenge in challenges)
        parameters = found.get("bearer")
        if parameters is not None and not self._credentials.bearer_token:
            self._header = f"Bearer {self._fetch_token(parameters, url)}"
        elif "basic" in found and self._credentials.password:
            self._refuse_in_the_clear(url)
            self._header = self._credentials.basic()
        else:
            raise denied(url, "it takes none of the credentials that were given", self._credentials)

    def _fetch_token(self, parameters: Dict[str, str], url: str) -> str:
        realm = parameters.get("realm", "")
        if not self._transport.security.allows(realm):
            raise RegistryError(
                f"{url.split('/v2/')[0]} cannot be used",
                f"it names {realm[:200]!r} as its token service, which is not encrypted",
                "tell the registry's administrator",
            )
        query = [(key, parameters[key]) for key in ("service",) if key in parameters]
        query += [("scope", scope) for scope in parameters.get("scope", "").split()]
        if self._credentials.refresh_token:
            return self._exchange_refresh_token(realm, query)
        headers = {}
        if self._credentials.password:
            self._refuse_in_the_clear(realm)
            headers["Authorization"] = self._credentials.basic()
        separator = "&" if "?" in realm else "?"
        return self._ask("GET", f"{realm}{separator}{urlencode(query)}", headers, None)

    def _exchange_refresh_token(self, realm: str, query: List[Tuple[str, str]]) -> str:
        self._refuse_in_the_clear(realm)
        form = {
            "grant_type": "refresh_token",
            "client_id": "edgekit",
            "service": dict(query).get("service", ""),
            "scope": " ".join(value for key, value in query if key == "scope"),
            "refresh_token": self._credentials.refresh_token,
        }
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        return self._ask("POST", realm, headers, urlencode(form).encode())

    def _ask(self, method: str, url: str, headers: Dict[str, str], body: Optional[bytes]) -> str:
        with self._transport.request(method, url, headers, body) as response:
            if response.status in (400, 401, 403):
                raise denied(url, f"its token service answers {response.status}", self._credentials)
            if response.status != 200:
                raise _bad_token_service(url, f"it answers {response.status}")
            return _token(response.read(_MAX_TOKEN_BYTES), url)

    def _refuse_in_the_clear(self, url: str) -> None:
        if not self._transport.security.allows_secrets(url):
            raise Denied(
                f"no password is sent to {url.split('?')[0]}",
                "the connection is not encrypted",
                "give the registry a certificate, or let everybody read from it",
            )


def parse_challenge(text: str) -> Tuple[str, Dict[str, str]]:
    """A ``WWW-Authenticate`` header's scheme and its parameters, both names in lower case (RFC 7235)."""
    match = _CHALLENGE.match(text)
    if match is None:
        return text.strip().lower(), {}
    parameters = {
        name.lower(): re.sub(r"\\(.)", r"\1", quoted) or plain
        for name, quoted, plain in _PARAMETER.findall(match[2])
    }
    return match[1].lower(), parameters


def denied(url: str, why: str, credentials: Credentials) -> Denied:
    """The error for a registry that lets nobody, or not these credentials, in."""
    have = "the credentials may be wrong or may not allow this" if credentials.secret else "none were given"
    return Denied(
        f"{url.split('?')[0]} wants other credentials",
        f"{why}; {have}",
        "log in to the registry; on a device, give [follow.NAME] a password_file or a token_file",
    )


def _token(data: bytes, url: str) -> str:
    try:
        document = json_text.loads(data)
        token = document.get("token") or document.get("access_token")
    except (ValueError, AttributeError) as error:
        raise _bad_token_service(url, "its answer is not a JSON object") from error
    if not isinstance(token, str) or not _TOKEN.fullmatch(token):
        raise _bad_token_service(url, "its answer holds no token")
    return token


def _bad_token_service(url: str, why: str) -> RegistryError:
    return RegistryError(
        f"the token service {url.split('?')[0]} fails", why, "try later, or tell the registry's administrator"
    )
