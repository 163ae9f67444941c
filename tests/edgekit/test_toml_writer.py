"""TOML that the standard library reads back equal."""

from __future__ import annotations

import sys
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from edgekit.toml_writer import toml_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_keys = st.from_regex(r"[A-Za-z0-9_-]{1,8}", fullmatch=True)
_texts = st.text(st.characters(exclude_categories=["Cs"]))
_scalars = _texts | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False)
_plain = _scalars | st.lists(_scalars, max_size=3)
_tables = st.recursive(
    st.dictionaries(_keys, _plain, max_size=4),
    lambda inner: st.dictionaries(
        _keys, _plain | inner | st.lists(inner, min_size=1, max_size=2), max_size=4
    ),
    max_leaves=12,
)


@given(_tables)
def test_what_is_written_reads_back_equal(table: dict[str, Any]) -> None:
    """Tables, arrays of tables, strings with any characters and numbers survive writing."""
    assert tomllib.loads(toml_text(table)) == table
