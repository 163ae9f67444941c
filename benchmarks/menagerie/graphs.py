"""One model of the zoo as an ONNX graph, unpruned, in a process of its own.

    python -m benchmarks.menagerie.graphs NAME DIRECTORY

It writes NAME.onnx there, or NAME.txt with the reason why there is none.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

from benchmarks.menagerie.models import subjects
from benchmarks.menagerie.worker import export, set_statistics

#: A graph of more is held in memory several times over, and the largest do not fit an ONNX file.
MOST_PARAMETERS = 200_000_000


def main() -> None:
    """Export the model that is named."""
    warnings.simplefilter("ignore")
    name, directory = sys.argv[1], Path(sys.argv[2])
    try:
        _write(name, directory / f"{name}.onnx")
    except Exception as error:  # every failure becomes its one-line reason
        why = " ".join(f"{type(error).__name__}: {error}".split())
        (directory / f"{name}.txt").write_text(why[:300])


def _write(name: str, path: Path) -> None:
    import torch

    from edgekit.modules import parameter_count

    subject = subjects()[name]
    torch.manual_seed(0)
    module = subject.build().eval()
    if parameter_count(module) > MOST_PARAMETERS:
        raise ValueError(f"it has more than {MOST_PARAMETERS:,} parameters")
    set_statistics(module, subject)
    temporary = path.with_suffix(".part")
    export(module, subject, temporary)
    temporary.rename(path)


if __name__ == "__main__":
    main()
