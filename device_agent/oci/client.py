"""A repository in a registry: resolve a tag, read manifests and blobs, go on with a download that was cut.

Everything that is read is held to its SHA-256, so neither the registry nor a store of blobs behind it has to
be trusted for anything but to answer.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Callable, Dict, Iterator, Optional, Tuple
from urllib.parse import urljoin

from device_agent.oci.artifact import DOCKER_MANIFEST, IMAGE_MANIFEST, MAX_ARTIFACT_BYTES
from device_agent.oci.authorization import Authorizer, Credentials, denied
from device_agent.oci.digests import digest_of, digest_of_file, valid_digest
from device_agent.oci.errors import NotThere, RegistryError
from device_agent.oci.reference import Reference
from device_agent.oci.transport import Body, Response, Transport

OnBytes = Callable[[int], None]

_ACCEPT = {"Accept": f"{IMAGE_MANIFEST}, {DOCKER_MANIFEST}"}
_AGAIN = "try again later; if it goes on, tell the registry's administrator"
_MAX_RETRY_AFTER_S = 24 * 3600.0


class Repository:
    """One repository, which is one name in a registry."""

    def __init__(self, reference: Reference, transport: Transport, credentials: Credentials) -> None:
        self._base = f"{transport.security.base_url(reference.host)}/v2/{reference.repository}/"
        self._transport = transport
        self._credentials = credentials
        self._authorizer = Authorizer(transport, credentials)

    def resolve(self, reference: Reference) -> str:
        """The digest that a reference points at now; one that is pinned needs no question.

        Raises:
            NotThere: there is no such tag.
            RegistryError: see ``request``.
        """
        if reference.digest:
            return reference.digest
        with self.request("HEAD", f"manifests/{reference.tag}", _ACCEPT) as response:
            if response.status == 200 and valid_digest(response.header("Docker-Content-Digest")):
                return response.header("Docker-Content-Digest")
        return digest_of(self._read_manifest(reference.tag))  # the header is optional

    def manifest(self, digest: str) -> bytes:
        """An artifact's manifest.

        Raises:
            NotThere: there is no such manifest.
            RegistryError: it is not what the digest says; or see ``request``.
        """
        data = self._read_manifest(digest)
        if digest_of(data) != digest:
            raise _wrong(f"the manifest {digest}")
        return data

    def blob(self, digest: str, limit_bytes: int) -> bytes:
        """A small blob.

        Raises:
            NotThere: there is no such blob.
            RegistryError: it is too large, or not what the digest says; or see ``request``.
        """
        with self.request("GET", f"blobs/{digest}") as response:
            data = expect(response, 200).read(limit_bytes)
        if digest_of(data) != digest:
            raise _wrong(f"the blob {digest}")
        return data

    def download(self, digest: str, size_bytes: int, part: Path, on_bytes: OnBytes) -> None:
        """Complete the file ``part``, which may hold the beginning of the blob already.

        Args:
            digest: of the blob.
            size_bytes: of the blob; not a byte more is taken.
            part: the file. After an error it holds what came, for the next call to go on from; a content
                that turned out to be wrong is removed.
            on_bytes: told of each piece that came, in bytes.

        Raises:
            NotThere: there is no such blob.
            RegistryError: the transfer was cut, or the content is wrong; or see ``request``.
            OSError: ``part`` cannot be written.
        """
        have_bytes = part.stat().st_size if part.exists() else 0
        if have_bytes > size_bytes:
            have_bytes = 0
        if have_bytes < size_bytes or size_bytes == 0:
            self._fill(digest, size_bytes, part, have_bytes, on_bytes)
        if digest_of_file(part) != digest:
            part.unlink()
            raise _wrong(f"the blob {digest}")

    @contextmanager
    def request(
        self,
        method: str,
        path: str,
        headers: Optional[Dict[str, str]] = None,
        open_body: Optional[Callable[[], Tuple[Body, int]]] = None,
    ) -> Iterator[Response]:
        """Make a request, with a token where the registry wants one.

        Args:
            method: the HTTP method.
            path: relative to the repository, or an absolute address that the registry named.
            headers: of the request.
            open_body: gives the body and its size; called again if it must be sent twice.

        Yields:
            The answer, whose status is neither 401 nor 403, nor a sign of trouble in the registry.

        Raises:
            Denied: credentials are missing, wrong, or not enough.
            RegistryError: no answer, or one that says try later.
        """
        url = urljoin(self._base, path)
        at_home = self._is_home(url)
        for attempt in range(2):
            sent = {**(headers or {}), **(self._authorizer.headers(url) if at_home else {})}
            body, size_bytes = open_body() if open_body is not None else (None, 0)
            try:
                with self._transport.request(method, url, sent, body, size_bytes) as response:
                    # A store of blobs that was redirected to gets no say in where credentials go.
                    if response.status == 401 and attempt == 0 and self._is_home(response.url):
                        challenges = response.headers("WWW-Authenticate")
                    else:
                        self._refuse_trouble(response)
                        yield response
                        return
            finally:
                if body is not None and not isinstance(body, bytes):
                    body.close()
            self._authorizer.answer(challenges, url)

    def _is_home(self, url: str) -> bool:
        return urljoin(url, "/") == urljoin(self._base, "/")

    def _refuse_trouble(self, response: Response) -> None:
        if response.status in (401, 403):
            raise denied(response.url, f"it answers {response.status}", self._credentials)
        if response.status == 429 or response.status >= 500:
            raise RegistryError(
                f"{response.url.split('?')[0]} cannot be had now",
                f"the registry answers {response.status}",
                _AGAIN,
                _retry_after_s(response.header("Retry-After")),
            )

    def _read_manifest(self, name: str) -> bytes:
        with self.request("GET", f"manifests/{name}", _ACCEPT) as response:
            return expect(response, 200).read(MAX_ARTIFACT_BYTES)

    def _fill(self, digest: str, size_bytes: int, part: Path, have_bytes: int, on_bytes: OnBytes) -> None:
        headers = {"Range": f"bytes={have_bytes}-"} if have_bytes else {}
        with self.request("GET", f"blobs/{digest}", headers) as response:
            if response.status == 416:
                part.unlink()  # the registry knows better what the blob's size is; begin again
            start = have_bytes if _continues(response, have_bytes) else 0
            if start == 0:
                expect(response, 200)
            with part.open("r+b" if part.exists() else "wb") as out:
                out.truncate(start)
                out.seek(start)
                received = _copy(response, out, size_bytes - start, on_bytes)
        if start + received != size_bytes:
            raise RegistryError(
                f"the blob {digest[:19]} came only in part",
                f"the connection ended after {start + received} of {size_bytes} bytes",
                "the next attempt goes on from there",
            )


def expect(response: Response, *statuses: int) -> Response:
    """The answer, if it has one of these statuses.

    Raises:
        NotThere: 404.
        RegistryError: any other.
    """
    if response.status in statuses:
        return response
    where = response.url.split("?")[0]
    if response.status == 404:
        raise NotThere(f"{where} does not exist", "the registry answers 404", "check the name and the tag")
    raise RegistryError(f"{where} cannot be had", f"the registry answers {response.status}", _AGAIN)


def _copy(response: Response, out: BinaryIO, limit_bytes: int, on_bytes: OnBytes) -> int:
    received = 0
    for chunk in response.chunks():
        if received + len(chunk) > limit_bytes:
            raise _wrong(response.url.split("?")[0])
        out.write(chunk)
        received += len(chunk)
        on_bytes(len(chunk))
    out.flush()
    os.fsync(out.fileno())
    return received


def _continues(response: Response, have_bytes: int) -> bool:
    """Whether the answer begins where the file ends; a registry may ignore Range, or mistake it."""
    return response.status == 206 and response.header("Content-Range").startswith(f"bytes {have_bytes}-")


def _retry_after_s(value: str) -> float:
    """Seconds; the form with a date is not worth a clock that may be wrong."""
    return min(float(value), _MAX_RETRY_AFTER_S) if value.isdecimal() else 0.0


def _wrong(what: str) -> RegistryError:
    return RegistryError(f"{what} is not what its digest says", "the registry or a proxy is faulty", _AGAIN)
