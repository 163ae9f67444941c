"""``edgekit doctor``: what this machine can do, and what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from host_testing import Forker, assert_three_lines, edgekit
from packaging.requirements import Requirement

from edgekit.doctor import machine, packages


def found(document: Any) -> dict[str, dict[str, str]]:
    """The findings of a document by subject."""
    return {finding["subject"]: finding for finding in document["findings"]}


def test_a_machine_that_runs_these_tests_is_fit(forked: Forker, tmp_path: Path) -> None:
    """Exit code 0, a line for each subject, and something to do wherever there is a drawback."""
    result = forked.run("doctor", "--json", cwd=tmp_path)
    assert result.code == 0, result.err
    document = result.json()
    assert document["ok"] is True
    findings = found(document)
    assert findings.keys() >= {"python", "int8", "memory", "disk", "packages", "torch", "onnxruntime", "ssh"}
    assert "CPU" in findings["onnxruntime"]["detail"]
    assert all(finding["fix"] for finding in findings.values() if finding["status"] == "warning")
    assert list(tmp_path.iterdir()) == []  # it looks, and leaves nothing


def test_what_only_some_commands_need_is_no_failure(forked: Forker, tmp_path: Path) -> None:
    """Without any program on the PATH it says which commands want them and how to get them; the code is 0."""
    (tmp_path / "config.json").write_text(json.dumps({"credHelpers": {"registry.example": "nowhere"}}))
    environment = {"PATH": str(tmp_path), "DOCKER_CONFIG": str(tmp_path)}
    result = forked.run("doctor", "--json", cwd=tmp_path, env=environment)
    assert result.code == 0, result.err
    findings = found(result.json())
    assert [findings[name]["status"] for name in ("ssh", "dpkg", "git")] == ["absent"] * 3
    assert findings["ssh"]["fix"] == "apt install openssh-client"
    assert findings["registries"]["status"] == "warning"
    assert "docker-credential-nowhere" in findings["registries"]["detail"]


def test_a_library_that_does_not_start_is_missing(tmp_path: Path) -> None:
    """An onnxruntime that is installed and cannot be imported: exit code 4, and its own words."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "onnxruntime.py").write_text("raise ImportError('GLIBC_2.99 not found')\n")
    result = edgekit("doctor", cwd=tmp_path, PYTHONPATH=f"{tmp_path / 'broken'}:{Path(__file__).parents[2]}")
    text = assert_three_lines(result, 4)
    assert "onnxruntime" in text
    assert "GLIBC_2.99 not found" in text
    assert "missing  onnxruntime" in result.out


def test_a_store_that_cannot_be_made_is_missing(forked: Forker, tmp_path: Path) -> None:
    """A file in the place of the working directory: nothing could be kept there."""
    (tmp_path / ".edgekit").write_text("")
    result = forked.run("doctor", cwd=tmp_path)
    assert ".edgekit cannot be written" in assert_three_lines(result, 4)
    assert "missing  disk: " in result.out
    assert "ok       python: " in result.out


def test_packages_are_held_against_their_bounds() -> None:
    """Installed and within bounds: one line. Absent or outside: a line each, and what mends it."""
    met = packages.always([Requirement("numpy>=1"), Requirement("click")])
    assert [(finding.status, finding.subject) for finding in met] == [("ok", "packages")]
    lost, old = packages.always(
        [Requirement("numpy>=1"), Requirement("no-such-distribution>=2"), Requirement("click>=999")]
    )
    assert (lost.status, lost.detail) == ("missing", "no-such-distribution is not installed")
    assert lost.fix == "pip install 'no-such-distribution>=2'"
    assert (old.status, old.subject, old.fix) == ("missing", "click", "pip install 'click>=999'")


def test_requirements_come_from_the_installed_metadata() -> None:
    """What an extra adds is not what is always needed, and the other way round."""
    always = {one.name for one in packages.requirements("edgekit")}
    assert {"torch", "onnxruntime"} <= always
    assert "pytest" not in always
    assert {one.name for one in packages.requirements("edgekit-agent", "grpc")} == {"grpcio"}


@pytest.mark.parametrize(
    ("architecture", "flags", "status", "word"),
    [
        ("x86_64", "avx2 avx512f avx512_vnni", "ok", "avx512_vnni"),
        ("x86_64", "avx2 avx_vnni", "ok", "avx_vnni"),
        ("x86_64", "avx2 avx512f", "warning", "avx512f without VNNI"),
        ("x86_64", "sse2", "warning", "no AVX without VNNI"),
        ("aarch64", "asimd asimddp", "ok", "asimddp"),
        ("aarch64", "asimd", "warning", "without dot-product"),
    ],
)
def test_the_processor_decides_what_int8_is_worth(
    architecture: str, flags: str, status: str, word: str
) -> None:
    """Instructions that add 8-bit products in 32 bits are named; without them the drawback is."""
    finding = machine.int8(architecture, frozenset(flags.split()))
    assert (finding.status, word in finding.detail) == (status, True)
