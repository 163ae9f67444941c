"""A bundle, ready to be sent in chunks to any number of devices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from device_agent import archive
from device_agent.manifest import Manifest
from device_agent.transfer import offer
from edgekit.bundle import bundle_errors, open_bundle


@dataclass(frozen=True)
class Payload:
    """What is offered, and where the chunks come from.

    Attributes:
        directory: the unpacked bundle.
        head: its manifest and signature.
        files: the chunks of every file.
        listed: the chunks as they are offered on the wire.
    """

    directory: Path
    head: archive.Head
    files: tuple[offer.ChunkedFile, ...]
    listed: bytes

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self.head.manifest

    @property
    def digest(self) -> str:
        """The bundle's digest."""
        return self.head.digest

    def offer(self) -> tuple[dict[str, object], bytes]:
        """The request that offers the bundle, and its body."""
        signature = self.head.signature or b""
        message: dict[str, object] = {
            "op": "offer",
            "manifest_bytes": len(self.head.manifest_bytes),
            "signature_bytes": len(signature),
            "chunks_bytes": len(self.listed),
        }
        return message, self.head.manifest_bytes + signature + self.listed

    def chunks(self, missing: list[list[int]]) -> Iterator[bytes]:
        """The content of chunks.

        Args:
            missing: runs ``[first, count]`` of chunks, numbered through all files.
        """
        places = [(file.path, chunk) for file in self.files for chunk in file.chunks]
        for first, count in missing:
            for path, chunk in places[first : first + count]:
                with (self.directory / path).open("rb") as stream:
                    stream.seek(chunk.offset)
                    yield stream.read(chunk.length_bytes)


@contextmanager
def prepared(bundle: Path) -> Iterator[Payload]:
    """Check a bundle, either form, and cut it, for the length of a ``with`` block.

    Raises:
        BadInput: it is missing, malformed or damaged.
    """
    with open_bundle(bundle) as opened:
        with bundle_errors():
            head = archive.read_head(opened.directory)
            files = offer.cut(opened.directory, head.manifest)
        yield Payload(opened.directory, head, files, offer.encode(files))
