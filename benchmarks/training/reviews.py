"""Sentences of film reviews with the mean rating of 20 people: a real task with real text.

From Hutto and Gilbert, "VADER" (ICWSM 2014), over Pang and Lee's sentences; the MIT-licensed source archive
of the package vaderSentiment carries them. The task: is the sentence for or against the film?
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

PACKAGE = "vaderSentiment==3.3.2"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
FILE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
SHA256 = "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"
#: Sentences about which people agree at least so much, of 4, are taken.
CLEAR_RATING = 0.5


class Review(NamedTuple):
    """A sentence; label 1 is for the film, 0 against it."""

    text: str
    label: int


def load(file: Path | None) -> list[Review]:
    """The clear sentences, in the order of the file.

    Args:
        file: ``movieReviewSnippets_GroundTruth.txt``; None fetches the package's source with pip.
    """
    content = _fetched() if file is None else file.read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256:
        sys.exit(f"{file or PACKAGE}: not the file that this benchmark was written for")
    rows = (line.split("\t") for line in content.decode("utf-8", "replace").splitlines() if line)
    rated = ((float(rating), text.strip()) for _, rating, text in rows)
    return [Review(text, int(rating > 0)) for rating, text in rated if abs(rating) >= CLEAR_RATING]


def _fetched() -> bytes:
    with tempfile.TemporaryDirectory(prefix="edgekit-bench-") as temporary:
        subprocess.run(
            [
                sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:",
                "--dest", temporary, PACKAGE,
            ],
            check=True,
        )  # fmt: skip
        [archive] = Path(temporary).glob("*.tar.gz")
        return _member(_member(archive.read_bytes(), INNER), FILE)


def _member(archive: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as opened:
        stream = opened.extractfile(name)
        if stream is None:
            sys.exit(f"{name} is not in {PACKAGE}")
        return stream.read()
