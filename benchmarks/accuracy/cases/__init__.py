"""The trained models, one a module."""

from __future__ import annotations

from collections.abc import Mapping

from accuracy.case import Case
from accuracy.cases import detector, digits, encoder, language, mobile, segmenter

#: By name, in the order of the table.
CASES: Mapping[str, Case] = {
    case.name: case
    for case in (digits.CASE, detector.CASE, encoder.CASE, mobile.CASE, segmenter.CASE, language.CASE)
}
