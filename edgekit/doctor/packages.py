"""Installed distributions against what edgekit's own metadata asks for, so that no list is kept here."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata

from packaging.requirements import Requirement
from packaging.version import Version

from edgekit.doctor.finding import Finding

_HOST, _AGENT = "edgekit", "edgekit-agent"
#: Extras of the distributions -> what needs them.
_EXTRAS = {
    (_HOST, "train"): "edgekit train, lora, distill and merge",
    (_HOST, "study"): "edgekit compress --study",
    (_AGENT, "grpc"): "serving over gRPC",
}


def look() -> list[Finding]:
    """A line for what is always needed, or one for each distribution that is not there; one an extra."""
    try:
        needed = {str(one): one for name in (_HOST, _AGENT) for one in requirements(name)}
        extras = [extra(name, key, use) for (name, key), use in _EXTRAS.items()]
    except metadata.PackageNotFoundError as error:
        return [
            Finding("packages", "missing", f"{error.name} is not installed as a package", "run `make setup`")
        ]
    return [*always(list(needed.values())), *extras]


def requirements(distribution: str, extra: str = "") -> list[Requirement]:
    """What a distribution needs here: always, or what one of its extras adds.

    Raises:
        PackageNotFoundError: it is not installed.
    """
    known = [Requirement(text) for text in metadata.requires(distribution) or ()]
    needed = [one for one in known if _applies(one, "")]
    return [one for one in known if _applies(one, extra) and one not in needed] if extra else needed


def always(needed: Sequence[Requirement]) -> list[Finding]:
    """One line if every requirement is met, else one for each that is not."""
    wrong = {one: problem for one in needed if (problem := _problem(one))}
    if not wrong:
        return [Finding("packages", "ok", f"all {len(needed)} that are needed, in versions that fit")]
    return [Finding(one.name, "missing", problem, _install(one)) for one, problem in wrong.items()]


def extra(distribution: str, key: str, use: str) -> Finding:
    """One line for an extra of a distribution; ``use`` says what it is for."""
    subject = f"{distribution}[{key}]"
    problems = [problem for one in requirements(distribution, key) if (problem := _problem(one))]
    if not problems:
        return Finding(subject, "ok", use)
    return Finding(subject, "absent", f"for {use}: {'; '.join(problems)}", f"pip install '{subject}'")


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _problem(requirement: Requirement) -> str:
    """Why a requirement is not met; empty: it is."""
    try:
        found = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return f"{requirement.name} is not installed"
    if requirement.specifier.contains(Version(found), prereleases=True):
        return ""
    return f"{requirement.name} {found} is installed, and {requirement.specifier} is needed"


def _install(requirement: Requirement) -> str:
    return f"pip install '{requirement.name}{requirement.specifier}'"
