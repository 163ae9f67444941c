"""Push a bundle to an OCI registry and pull it from there; what is there already is not sent again.

The client is the agent's own (``device_agent.oci``), with uploads added. The ``oras`` library was considered
and is used in the tests as the other side only: it reads a whole blob into memory to send it, does not check
the digest of what it receives, cannot go on with a download, and sets no time limits.
Source: the OCI distribution specification 1.1, sections "Pushing" and "Pull".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urljoin

from device_agent import keys, signature
from device_agent import manifest as manifest_module
from device_agent.errors import AgentError
from device_agent.oci import assembly
from device_agent.oci import reference as references
from device_agent.oci.artifact import IMAGE_MANIFEST
from device_agent.oci.client import Repository, expect
from device_agent.oci.digests import digest_of
from device_agent.oci.errors import Denied, NotThere, RegistryError
from device_agent.oci.reference import Reference
from device_agent.oci.transport import Body, Security, Transport
from edgekit import modelpack
from edgekit.bundle import bundle_errors, open_bundle, place, refuse_foreign
from edgekit.docker_config import credentials_for
from edgekit.errors import BadInput, Missing

#: Told of each file: its path, its size in bytes, and whether it had to be sent or fetched.
OnFile = Callable[[str, int, bool], None]
_OpenBody = Callable[[], tuple[Body, int]]

_ATTEMPTS = 3
_PAUSE_S = 1.0


@dataclass(frozen=True)
class Pushed:
    """What lies in the registry now.

    Attributes:
        reference: the artifact by its digest, which nobody can move: ``host/name@sha256:...``.
        tag: the tag that points at it.
        digest: the bundle's own digest, as devices show it.
        signed: whether the bundle is signed; devices take no others, unless told to.
        sent_bytes: of the files that the registry lacked.
        reused_bytes: of the files that it had.
    """

    reference: str
    tag: str
    digest: str
    signed: bool
    sent_bytes: int
    reused_bytes: int


@dataclass(frozen=True)
class Pulled:
    """What was fetched.

    Attributes:
        reference: the artifact by its digest.
        directory: the bundle, in its directory form.
        digest: the bundle's own digest.
        signer: fingerprint of the key that signed it, where it was to be checked; else empty.
        fetched_bytes: of blobs that came over the network.
        reused_bytes: of files that were here.
    """

    reference: str
    directory: Path
    digest: str
    signer: str
    fetched_bytes: int
    reused_bytes: int


def push(bundle: Path, target: str, security: Security, on_file: OnFile) -> Pushed:
    """Push a bundle, either form, and let the tag point at it once everything is there.

    Args:
        bundle: the directory or the single file.
        target: ``oci://host/name:tag``.
        security: how the connection is trusted.
        on_file: told of each file.

    Raises:
        BadInput: the bundle is damaged, the reference has no tag, or the registry denies it.
        Missing: the registry cannot be reached, or fails.
    """
    with _errors():
        reference = references.parse(target)
        if not reference.tag or reference.digest:
            raise BadInput(
                f"{target} cannot be pushed to", "it names no tag, or a digest", "give oci://host/name:tag"
            )
        with open_bundle(bundle) as opened:
            artifact = modelpack.describe(opened.directory)
            uploads = _Uploads(_repository(reference, security))
            for file in artifact.files:
                uploads.file(opened.directory / file.path, file, on_file)
            uploads.blob("the configuration", digest_of(artifact.config), _bytes(artifact.config))
            uploads.manifest(reference.tag, artifact.manifest)
            signed = any(file.path == manifest_module.SIGNATURE_NAME for file in artifact.files)
    pinned = reference.pinned(digest_of(artifact.manifest))
    return Pushed(str(pinned), reference.tag, opened.digest, signed, uploads.sent_bytes, uploads.reused_bytes)


def pull(source: str, out: Path, security: Security, key: Path | None = None) -> Pulled:
    """Fetch a bundle into ``OUT/NAME``; a bundle of that name is replaced, once the new one is whole.

    Files of the bundle that is there are not fetched again, and neither is what an interrupted pull left.

    Args:
        source: ``oci://host/name:tag`` or ``oci://host/name@sha256:...``.
        out: the directory to put it into.
        security: how the connection is trusted.
        key: a public key that must have signed it, checked before the large files are fetched.

    Raises:
        BadInput: no bundle there, not signed by ``key``, wrong credentials, or no bundle to replace.
        Missing: the registry cannot be reached, or fails; the next call goes on.
    """
    with _errors():
        reference = references.parse(source)
        repository = _repository(reference, security)
        pinned = reference.pinned(repository.resolve(reference))
        head = assembly.fetch_head(repository, pinned.digest)
        signer = ""
        if key is not None:
            signer = signature.authenticate(head, [keys.load_public_key(key)]).fingerprint
        directory, work = out / head.manifest.name, out / f".{head.manifest.name}.pull"
        if directory.exists():
            refuse_foreign(directory)
        received: list[int] = []
        assembled = assembly.Assembly(work, head, _files_of(directory)).complete(repository, received.append)
        place(assembled, directory)
        work.rmdir()
    fetched_bytes = sum(received)
    total_bytes = sum(entry.size_bytes for entry in head.manifest.files)
    return Pulled(
        str(pinned), directory, head.digest, signer, fetched_bytes, max(0, total_bytes - fetched_bytes)
    )


class _Uploads:
    """Sends what a repository lacks, each blob once."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._done: set[str] = set()
        self.sent_bytes = self.reused_bytes = 0

    def file(self, path: Path, file: modelpack.File, on_file: OnFile) -> None:
        sent = self.blob(file.path, file.digest, lambda: (path.open("rb"), file.size_bytes))
        if sent:
            self.sent_bytes += file.size_bytes
        else:
            self.reused_bytes += file.size_bytes
        on_file(file.path, file.size_bytes, sent)

    def blob(self, name: str, digest: str, open_body: _OpenBody) -> bool:
        """Send a blob, unless the registry has it; whether it was sent."""
        if digest in self._done or self._has(digest):
            return False
        _retry(lambda: self._send(name, digest, open_body))
        self._done.add(digest)
        return True

    def manifest(self, tag: str, data: bytes) -> None:
        """Send the manifest; from then on the tag points at it."""
        headers = {"Content-Type": IMAGE_MANIFEST}
        with self._repository.request("PUT", f"manifests/{tag}", headers, _bytes(data)) as response:
            expect(response, 201)
            found = response.header("Docker-Content-Digest")
        if found and found != digest_of(data):
            raise RegistryError(
                "the registry stored another manifest",
                f"it says {found}, and {digest_of(data)} was sent",
                "push again; if it goes on, tell the registry's administrator",
            )

    def _has(self, digest: str) -> bool:
        with self._repository.request("HEAD", f"blobs/{digest}") as response:
            return response.status == 200

    def _send(self, name: str, digest: str, open_body: _OpenBody) -> None:
        with self._repository.request("POST", "blobs/uploads/", open_body=_bytes(b"")) as response:
            location = expect(response, 202).header("Location")
            where = urljoin(response.url, location)
        if not location:
            raise RegistryError(f"{name} cannot be sent", "the registry says not where to", "try again later")
        url = f"{where}{'&' if '?' in where else '?'}digest={quote(digest, safe='')}"
        headers = {"Content-Type": "application/octet-stream"}
        with self._repository.request("PUT", url, headers, open_body) as response:
            expect(response, 201)


def _bytes(data: bytes) -> _OpenBody:
    return lambda: (data, len(data))


def _retry(attempt: Callable[[], None]) -> None:
    """Try again where it may help: a connection that broke, a registry that is busy."""
    for number in range(1, _ATTEMPTS + 1):
        try:
            return attempt()
        except (Denied, NotThere):
            raise
        except RegistryError as error:
            if number == _ATTEMPTS:
                raise
            time.sleep(max(_PAUSE_S * number, min(error.retry_after_s, 30.0)))


def _repository(reference: Reference, security: Security) -> Repository:
    return Repository(reference, Transport(security), credentials_for(reference.host))


def _files_of(directory: Path) -> dict[str, Path]:
    """The files of a bundle that is here, by SHA-256; when they are used they are checked."""
    try:
        listed = manifest_module.read(directory)[0].files
    except (AgentError, OSError):
        return {}
    return {entry.sha256: directory / entry.path for entry in listed}


@contextmanager
def _errors() -> Iterator[None]:
    with bundle_errors():
        try:
            yield
        except RegistryError as error:
            if error.exit_code != Missing.exit_code:
                raise
            raise Missing(error.what, error.why, error.fix) from error
