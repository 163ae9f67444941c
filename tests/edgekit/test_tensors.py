"""Tensor types and the check of samples against a signature."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from device_agent.manifest import TensorSpec
from device_agent.manifest_checks import DTYPES
from edgekit.errors import BadInput
from edgekit.tensors import Arrays, check_sample, numpy_dtype, protocol_dtype, write_npz


@pytest.mark.parametrize("name", sorted(set(DTYPES) - {"BYTES", "BF16"}))
def test_every_type_of_the_manifest_has_a_numpy_type(name: str) -> None:
    """Names of the protocol and NumPy's types translate both ways; only BYTES and BF16 have none."""
    assert protocol_dtype(numpy_dtype(name)) == name


@pytest.mark.parametrize("name", ["BYTES", "BF16"])
def test_types_without_a_numpy_type_are_a_key_error(name: str) -> None:
    """What NumPy cannot hold is not silently replaced."""
    with pytest.raises(KeyError):
        numpy_dtype(name)


@given(shape=arrays.array_shapes(max_dims=4), free=st.data())
def test_a_sample_fits_its_own_shape_with_any_axis_free(shape: tuple[int, ...], free: st.DataObject) -> None:
    """-1 takes every size; any other size has to be the same, and so has the number of axes."""
    wanted = tuple(free.draw(st.sampled_from([size, -1])) for size in shape)
    sample = {"x": np.zeros(shape, np.float32)}
    check_sample(sample, [TensorSpec("x", "FP32", (-1, *wanted))], "here")
    for wrong in ((-1, *wanted, 1), (-1, *wanted[1:]), *_one_larger(shape)):
        with pytest.raises(BadInput, match="wrong shape"):
            check_sample(sample, [TensorSpec("x", "FP32", wrong)], "here")


def _one_larger(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [(-1, *(size + (axis == at) for axis, size in enumerate(shape))) for at in range(len(shape))]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_values_that_are_not_finite_are_refused(value: float, dtype: Any) -> None:
    """NaN and infinity are named with tensor and sample, with or without a signature."""
    with pytest.raises(BadInput, match="sample 3: 'x' holds NaN or infinity"):
        check_sample({"x": np.array([0, value], dtype)}, None, "sample 3")


def test_arrays_of_any_name_are_written(tmp_path: Path) -> None:
    """A model's input may be called as a parameter of ``numpy.savez``; else the bytes are that function's."""
    odd: Arrays = {"file": np.arange(3), "allow_pickle": np.ones((2, 2), np.float32)}
    write_npz(tmp_path / "odd.npz", odd)
    with np.load(tmp_path / "odd.npz", allow_pickle=False) as stored:
        assert {name: stored[name].tolist() for name in stored} == {k: v.tolist() for k, v in odd.items()}
    plain = {"image": np.zeros((2, 3), np.float32), "mask": np.ones(4, bool)}
    write_npz(tmp_path / "a.npz", plain)
    np.savez(tmp_path / "b.npz", image=plain["image"], mask=plain["mask"])
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
