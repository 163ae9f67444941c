"""The package's own names: all are there, and those that are not asked for cost no import."""

from __future__ import annotations

import subprocess
import sys

import pytest

import calibration


@pytest.mark.parametrize("name", calibration.__all__)
def test_every_public_name_is_given(name: str) -> None:
    """Every name in ``__all__`` can be imported, and is a thing and not the module that it comes from."""
    value = getattr(calibration, name)
    assert type(value).__name__ != "module"
    assert name in dir(calibration)


def test_unknown_name_is_an_attribute_error() -> None:
    """A name that the package does not have is refused as in any other module."""
    with pytest.raises(AttributeError, match="no attribute 'calibrated'"):
        calibration.calibrated  # noqa: B018


def test_calibrate_does_not_import_the_methods() -> None:
    """Who only calibrates does not wait for the modules that quantize and search."""
    program = "import sys; from calibration import calibrate; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = found.stdout.split()
    assert "calibration.runner" in loaded
    assert not {"calibration.choice", "calibration.quantizer", "calibration.methods"} & set(loaded)
