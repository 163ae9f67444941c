"""Errors: three lines, an exit code, a suggestion."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edgekit import errors


def test_exit_codes_are_the_promised_ones() -> None:
    """Scripts may rely on 2, 3, 4 and 5 meaning what the command line's documentation says."""
    kinds = (errors.BadInput, errors.ContractUnmet, errors.Missing, errors.DeviceRefused)
    assert [kind.exit_code for kind in kinds] == [2, 3, 4, 5]


def test_an_error_reads_as_three_lines() -> None:
    """What, why and fix, in this order."""
    assert str(errors.BadInput("a", "b", "c")) == "a\nb\nc"


def test_the_nearest_name_is_suggested() -> None:
    """A misspelling gets the name that was meant; something else gets the list."""
    assert errors.nearest("fp23", ["fp32", "int8"]) == "did you mean 'fp32'?"
    assert errors.nearest("zzz", ["int8", "fp32"]) == "choose one of: fp32, int8"


@given(word=st.text(max_size=12), names=st.lists(st.text(min_size=1, max_size=12), min_size=1))
def test_a_suggestion_is_always_one_of_the_names(word: str, names: list[str]) -> None:
    """Whatever is typed, what is suggested exists."""
    said = errors.nearest(word, names)
    assert any(name in said for name in names)
