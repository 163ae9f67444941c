"""INT8 accuracy of ``calibration.choose`` beside onnxruntime's quantize_static and NNCF on trained models.

python benchmarks/calibration_accuracy.py [--json] [--quick] [--only digits,mobile] [--tools ours,nncf]

Every tool gets the same float model (after onnxruntime's quant_pre_process) and the same 256 unlabelled
rows of the training part; ours takes the last quarter of them to judge what it tries. All graphs then run
on the same held-out rows, on ONNX Runtime's CPU provider.

Decided before anything was measured: tools are ranked by the distance between the INT8 model's answers and
the float model's on the held-out rows, in the terms of the task (benchmarks/accuracy/judging.py says why).
The task's own metric with labels stands beside it, with the standard error of each difference; where ours
is lower than a peer's by more than two of those, that is a target missed as well.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from accuracy import verdict
from accuracy.cases import CASES
from accuracy.comparison import Comparison, compare
from accuracy.tools import NNCF, TOOLS
from common import document, finish

_QUICK_CASES = ("language",)
_QUICK_TOOLS = ("ours", "ort_minmax")
_QUICK_ROWS = 16
_CLAIM = (
    "our INT8 models are never further from their float originals than those of onnxruntime and NNCF, "
    "and closer on most"
)


def main() -> None:
    """Compare the tools on the models that were asked for."""
    options = _options()
    rows = _QUICK_ROWS if options.quick else None
    comparisons: list[Comparison] = []
    for name in options.only:
        comparisons.append(compare(CASES[name], options.tools, rows))
        if not options.json:
            print(verdict.render(comparisons[-1:]), flush=True)
    figures = verdict.figures(comparisons)
    targets = verdict.TARGETS
    if options.quick or options.only != list(CASES) or options.tools != list(TOOLS):
        targets = {key: target for key, target in targets.items() if key != "compared_pairs"}
    if options.json:
        figures |= {"table": verdict.table(comparisons), "peer_versions": {"nncf": NNCF.wanted}}
    finish(document("calibration_accuracy", _CLAIM, figures, targets, 1), options.json)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print the document only")
    parser.add_argument("--quick", action="store_true", help="one model and two tools, to see that it works")
    parser.add_argument("--only", metavar="NAMES", help=f"some of {', '.join(CASES)}, by comma")
    parser.add_argument("--tools", metavar="NAMES", help=f"some of {', '.join(TOOLS)}, by comma; always ours")
    options = parser.parse_args()
    options.only = _named(parser, options.only, CASES, _QUICK_CASES if options.quick else CASES)
    options.tools = _named(parser, options.tools, TOOLS, _QUICK_TOOLS if options.quick else TOOLS)
    if "ours" not in options.tools:
        options.tools.insert(0, "ours")
    return options


def _named(
    parser: argparse.ArgumentParser, text: str | None, known: Iterable[str], default: Iterable[str]
) -> list[str]:
    """The names that were given, in the order of ``known``."""
    if text is None:
        return list(default)
    wanted = set(text.split(","))
    unknown = sorted(wanted - set(known))
    if unknown:
        parser.error(f"{unknown[0]!r} is not one of {', '.join(known)}")
    return [name for name in known if name in wanted]


if __name__ == "__main__":
    main()
