"""Write real English sentences to calibrate and to judge a text encoder with.

    python examples/text_encoder/sentences.py DIR      writes DIR/calib.jsonl and DIR/held_out.jsonl

They come from what is installed anyway: the descriptions of scikit-learn's data sets and the documentation
of NumPy's functions. Every third sentence is held out; none is in both files.
"""

from __future__ import annotations

import json
import re
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_PLAIN = re.compile(r"[A-Z][A-Za-z0-9 ,;:'\"()`/.-]{30,300}[.!?]")


def sentences() -> list[str]:
    """Plain sentences, each once, in an order that does not change."""
    texts = [
        path.read_text(encoding="utf-8")
        for path in sorted(files("sklearn.datasets.descr").iterdir(), key=lambda path: path.name)
        if path.name.endswith(".rst")
    ]
    texts += [getattr(np, name).__doc__ or "" for name in sorted(np.__all__)]
    found = (
        sentence
        for text in texts
        for paragraph in re.split(r"\n\s*\n", text)
        for sentence in _SENTENCE_END.split(" ".join(paragraph.split()))
        if _PLAIN.fullmatch(sentence)
    )
    return list(dict.fromkeys(found))


def main(directory: Path) -> None:
    """Write both files."""
    directory.mkdir(parents=True, exist_ok=True)
    everything = sentences()
    parts = {
        "calib.jsonl": [text for number, text in enumerate(everything) if number % 3],
        "held_out.jsonl": everything[::3],
    }
    for name, part in parts.items():
        lines = [json.dumps({"text": text}) + "\n" for text in part]
        (directory / name).write_text("".join(lines), encoding="utf-8")
        print(f"{directory / name}: {len(part)} sentences")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
