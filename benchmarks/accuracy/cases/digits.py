"""The demo's residual network on scanned digits."""

from __future__ import annotations

from pathlib import Path

from accuracy import judging, training
from accuracy.case import CALIBRATION_ROWS, Case, Data, image_rows

_SEED = 0


def _export(path: Path) -> None:
    from edgekit.demo import digits

    train, _ = digits.load(_SEED)
    with training.threads(2):
        model = digits.train(train, _SEED, lambda *_: None)
    training.export(model, {"image": digits.example_inputs().repeat(2, 1, 1, 1)}, ["logits"], path)


def _data() -> Data:
    from edgekit.demo import digits

    train, held_out = digits.load(_SEED)
    return Data(
        calibration=image_rows(train.images[:CALIBRATION_ROWS]),
        test=image_rows(held_out.images, batch=64),
        truth=held_out.labels,
    )


def _sources() -> list[Path]:
    from edgekit.demo import digits

    return [Path(__file__), Path(digits.__file__)]


CASE = Case(
    name="digits",
    summary="the demo's residual network, 11 M parameters, on scanned digits",
    metric="accuracy",
    quality=judging.accuracy,
    distance_name="divergence_millibits",
    distance=judging.divergence(axis=1),
    transformer=False,
    export=_export,
    data=_data,
    sources=_sources(),
)
