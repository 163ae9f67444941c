"""What the processor under a measurement means for INT8."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgekit import profile
from edgekit.measure import processor


@pytest.fixture
def with_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An x86 machine whose ``/proc/cpuinfo`` is this file."""
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(processor, "_CPUINFO", cpuinfo)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    return cpuinfo


def test_slow_int8_is_explained_by_the_processor(with_flags: Path) -> None:
    """Who measures INT8 for a device with VNNI on a machine without is told so, and which profile suits."""
    with_flags.write_text("model name\t: older\nflags\t\t: fpu sse2 avx2\n")
    said = processor.unlike(profile.load("x86-cpu"))
    assert said is not None
    assert "no VNNI" in said
    assert "x86-cpu-avx2" in said
    assert processor.unlike(profile.load("x86-cpu-avx2")) is None
    assert processor.unlike(profile.load("arm64-cpu")) is None


@pytest.mark.parametrize("flag", ["avx512_vnni", "avx_vnni"])
def test_a_processor_with_vnni_needs_no_excuse(with_flags: Path, flag: str) -> None:
    """Where the processor has what the profile counts on, slow INT8 is INT8's own fault."""
    with_flags.write_text(f"flags\t\t: fpu sse2 avx2 {flag}\n")
    assert not processor.lacks_vnni()
    assert processor.unlike(profile.load("x86-cpu")) is None


def test_what_is_not_known_is_not_said(with_flags: Path) -> None:
    """Nothing is claimed of a processor whose instructions nobody lists."""
    assert not processor.lacks_vnni()
