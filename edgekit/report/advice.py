"""What to do next, read off the document: what would help, with the command or the setting for it."""

from __future__ import annotations

from dataclasses import dataclass

from edgekit.report.document import Report

#: A kind of kernel that takes at least this share of the time is worth a look.
_MUCH = 0.2


@dataclass(frozen=True)
class Advice:
    """One thing to do: why, and how (a command or a setting of the recipe; empty: nothing to type)."""

    why: str
    how: str


def next_steps(report: Report) -> list[Advice]:
    """What would help most comes first; where nothing is missing, that is to deploy."""
    steps = [*_of_contract(report), *_of_certainty(report), *_of_engines(report), *_of_time(report)]
    if report.contract.met:
        steps.append(
            Advice(
                "The contract is met on the files in the bundle. Sign it, and bring it to a device.",
                f"edgekit sign {report.bundle.file} --key release.key",
            )
        )
    return steps


def _of_contract(report: Report) -> list[Advice]:
    advice = {
        "size": Advice(
            "No layer may lose more channels: the bound on one layer, or the device's alignment, holds them.",
            "[prune] max_layer_ratio = 0.9, or a larger --size",
        ),
        "max_drop": _of_drop(report),
        "latency": _of_latency(report),
        "faster_than_original": Advice(
            "No candidate is faster than the original here. Small models gain little from INT8; measure with "
            "nothing else running, or prune further.",
            "--size below the present one",
        ),
    }
    return [advice[name] for name in report.contract.unmet if name in advice]


def _of_drop(report: Report) -> Advice:
    calibration = report.chosen.calibration
    drop = calibration.drop if calibration else None
    if drop is not None and drop.in_float >= drop.at_least:
        return Advice(
            "The loss is INT8's: in float the same graph keeps enough of the metric on calibration data.",
            "--precision auto, or a higher [quantize] max_kept_float where one is set",
        )
    return Advice(
        "The loss was there before INT8: pruning took more than recovery gave back.",
        "[recover] epochs = 24, more data with --train, or a larger --size",
    )


def _of_latency(report: Report) -> Advice:
    if "latency_ms" in report.why:
        return Advice(
            f"Nobody measured it: {report.why['latency_ms']}.",
            "edgekit compress ... on such a machine, or --measure-on ssh://user@device",
        )
    return Advice("The chosen graph is too slow; fewer channels make it faster.", "a smaller --size")


def _of_certainty(report: Report) -> list[Advice]:
    """Intervals shrink with the square root of the samples."""
    interval, bound = report.chosen.metric_drop_interval, report.contract.max_drop
    left = None if bound is None else bound - report.chosen.metric_drop
    if report.contract.max_drop_certain is not False or interval is None or left is None or left <= 0:
        return []
    samples = report.chosen.metric.samples
    times = (interval.high - report.chosen.metric_drop) / left
    return [
        Advice(
            f"{samples} samples cannot show that the drop is within its bound: it lies between "
            f"{interval.low:+.4f} and {interval.high:+.4f}. About {int(samples * times**2):,} could.",
            "more held-out data with --eval",
        )
    ]


def _of_engines(report: Report) -> list[Advice]:
    waiting = [engine for engine in report.engines if not engine.executed]
    if not waiting:
        return []
    names = ", ".join(dict.fromkeys(f"{engine.builder} for {engine.target}" for engine in waiting))
    return [
        Advice(
            f"Not executed here: {names}. A device serves an engine only after it gave the golden outputs.",
            f"edgekit deploy {report.bundle.file} --to ssh://user@device",
        )
    ]


def _of_time(report: Report) -> list[Advice]:
    total_ms = sum(layer.median_ms for layer in report.layers)
    in_float_ms = sum(layer.median_ms for layer in report.layers if layer.precision in ("fp16", "fp32"))
    if report.chosen.precision != "int8" or in_float_ms < _MUCH * total_ms or not total_ms:
        return []
    return [
        Advice(
            f"{in_float_ms / total_ms:.0%} of the time goes to operators in float (see Where time goes).",
            "operators that INT8 has, such as ReLU, in place of those",
        )
    ]
