"""What the commands of ``edgekit-agent`` print for people: lines made of what ``--json`` prints."""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, Optional


def changed(result: Mapping[str, Any]) -> List[str]:
    """How an operation ended."""
    signer = f"signed by {result['signer']}" if result["signer"] else "not signed"
    line = f"{result['state']} {result['name']} {result['version']} {result['digest'][:12]} ({signer})"
    return [line, result["pause"]] if result["pause"] else [line]


def version_line(version: Mapping[str, Any]) -> str:
    """An installed version."""
    marks = [mark for mark in ("active", "fallback", "committed") if version[mark]]
    number = "damaged" if version["version"] is None else version["version"]
    return f"{version['name']} {number} {version['digest'][:12]} {' '.join(marks)}".rstrip()


def model_lines(model: Mapping[str, Any]) -> List[str]:
    """What serves, what is installed, what is followed, and the last operation."""
    serving = model["serving"]
    lines = [f"{model['name']}: " + (f"serves {serving[:12]}" if serving else model["pause"] or "not served")]
    lines += [_engine_line(model["engine"])] if model["engine"] else []
    lines += [f"  {version_line(version)}" for version in model["versions"]]
    if model["follow"] is not None:
        from device_agent.follow import report

        lines.append(report.line(model["follow"]))
    last: Optional[Dict[str, Any]] = model["last_operation"]
    if last is not None:
        failure = last["failure"]
        outcome = (
            f"failed after {last['state']}: {failure['what']}: {failure['why']}" if failure else last["state"]
        )
        lines.append(f"  last: {last['operation']} {last['digest'][:12]}: {outcome}")
        if last.get("shadow") is not None:
            from device_agent.probation import report as shadow_report

            lines.append(shadow_report.line(last["shadow"]))
    return lines


def key_lines(keys: List[Mapping[str, Any]]) -> List[str]:
    """The keys that count."""
    names = {key["fingerprint"]: key["name"] for key in keys}
    return [
        f"key {key['name']} {key['fingerprint'][:16]}"
        + (f" named by {names.get(key['added_by'], key['added_by'][:16])}" if key["added_by"] else "")
        + (" retired" if key["retired"] else "")
        for key in keys
    ] or ["no trusted keys"]


def _engine_line(engine: Mapping[str, Any]) -> str:
    """What runs where; a thread outside the cores that were asked for is pointed out."""
    cores = sorted({thread["cpus"] for thread in engine["threads"]})
    parts = [f"{engine['runtime']} in process {engine['process']}"]
    parts += [f"{len(engine['threads'])} threads on cores {' and '.join(cores)}"] if cores else []
    parts += [f"not confined to {engine['asked']['cpus']}"] if engine["placed"] is False else []
    parts += [f"memory {engine['memory_policy']}"] if engine["memory_policy"] else []
    parts += (
        [f"restarted {engine['restarts']} times ({engine['last_failure']})"] if engine["restarts"] else []
    )
    return "  engine: " + ", ".join(parts)
