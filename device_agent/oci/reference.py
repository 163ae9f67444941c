"""Where an artifact lies: ``oci://HOST[:PORT]/NAME:TAG``, ``oci://HOST/NAME@sha256:...``, or both."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, replace

from device_agent.errors import BadInput

SCHEME = "oci://"

# The grammar of the distribution specification 1.1, sections "Pulling manifests" and "Digests".
_COMPONENT = r"[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*"
_HOST = r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?"
_REFERENCE = re.compile(
    rf"(?P<host>{_HOST})/(?P<repository>{_COMPONENT}(?:/{_COMPONENT})*)"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)
_MAX_TEXT = 512


@dataclass(frozen=True)
class Reference:
    """A parsed reference.

    Attributes:
        host: the registry, with its port if one was given.
        repository: the name in the registry.
        tag: empty where only a digest was given.
        digest: ``sha256:`` and 64 hex digits; empty where only a tag was given. It wins over the tag.
    """

    host: str
    repository: str
    tag: str
    digest: str

    @property
    def manifest_name(self) -> str:
        """What the registry is asked for."""
        return self.digest or self.tag

    def pinned(self, digest: str) -> Reference:
        """The same artifact by its digest, which nobody can move."""
        return replace(self, tag="", digest=digest)

    def __str__(self) -> str:
        """The reference without its scheme, as other tools write it."""
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.host}/{self.repository}{tag}{digest}"


def parse(text: str) -> Reference:
    """Parse a reference.

    Raises:
        BadInput: it is malformed, or has neither a tag nor a digest.
    """
    match = _REFERENCE.fullmatch(text[len(SCHEME) :]) if len(text) <= _MAX_TEXT else None
    if not text.startswith(SCHEME) or match is None:
        raise BadInput(
            f"{text[:_MAX_TEXT]!r} is not a reference to a registry",
            "one looks like oci://registry.example.com/models/detector:stable",
            "write host, name in lower case, and a tag or @sha256:DIGEST",
        )
    found = Reference(match["host"], match["repository"], match["tag"] or "", match["digest"] or "")
    if not found.manifest_name:
        raise BadInput(
            f"{text!r} names no version", "it has neither a tag nor a digest", f"append a tag: {text}:latest"
        )
    return found


def is_loopback(hostname: str) -> bool:
    """Whether a host name, without port, always means this machine."""
    if hostname == "localhost":
        return True
    try:
        return ipaddress.ip_address(hostname.strip("[]")).is_loopback
    except ValueError:
        return False
