"""A bundle, checked on this machine and ready to be sent in chunks to any number of devices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from device_agent.transfer.payload import Payload, prepare
from edgekit.bundle import bundle_errors, open_bundle

__all__ = ["Payload", "prepared"]


@contextmanager
def prepared(bundle: Path) -> Iterator[Payload]:
    """Check a bundle, either form, and cut it, for the length of a ``with`` block.

    Raises:
        BadInput: it is missing, malformed or damaged.
    """
    with open_bundle(bundle) as opened:
        with bundle_errors():
            payload = prepare(opened.directory)
        yield payload
