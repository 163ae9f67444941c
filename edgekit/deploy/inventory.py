"""Which devices there are: a TOML file of ours, or an Ansible inventory in INI form.

    user = "edge"                 # for every device that names none
    [devices.gate-1]
    host = "10.0.0.5"             # without it, the device's name
    port = 22
    user = "root"
    identity = "~/.ssh/fleet"
    groups = ["lab"]

Of an Ansible inventory, hosts, ranges, groups, children and the variables ``ansible_host``, ``ansible_port``,
``ansible_user`` and ``ansible_ssh_private_key_file`` are read; everything else about the connection belongs
into the ssh configuration.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgekit.deploy.ssh import SshAddress, checked, parse
from edgekit.errors import BadInput, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ALL = "all"

_DEVICE_KEYS: dict[str, type] = {"host": str, "port": int, "user": str, "identity": str, "groups": list}
_RANGE = re.compile(r"\[([0-9]+|[A-Za-z]):([0-9]+|[A-Za-z])\]")
_MAX_RANGE = 10_000


@dataclass(frozen=True)
class Device:
    """A device of a fleet: its name, how ssh reaches it, and the groups that it is in."""

    name: str
    address: SshAddress
    groups: tuple[str, ...] = ()


def of_addresses(addresses: tuple[str, ...]) -> tuple[Device, ...]:
    """The devices that ``--to`` names.

    Raises:
        BadInput: an address is malformed or named twice.
    """
    parsed = [parse(address) for address in addresses]
    return _distinct(tuple(Device(str(address), address) for address in parsed), "--to")


def load(path: Path, group: str | None = None) -> tuple[Device, ...]:
    """Read an inventory, in the order of the file.

    Args:
        path: ``.toml`` is ours; anything else is Ansible's INI form.
        group: only this group, or the one device of this name; None: all.

    Raises:
        BadInput: it is missing, malformed, empty, or has no such group.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"the inventory {path} cannot be read",
            getattr(error, "strerror", None) or str(error),
            "give --inventory an existing file: see docs/deploy.md",
        ) from error
    devices = _from_toml(text, path) if path.suffix == ".toml" else _from_ini(text, path)
    chosen = tuple(d for d in devices if group in (None, ALL, d.name, *d.groups))
    if not chosen:
        groups = {name for device in devices for name in (*device.groups, device.name)}
        why = f"there is no group or device {group!r}" if devices else "it names no device"
        raise BadInput(
            f"nothing to reach in {path}", why, nearest(group, groups) if group and groups else "add devices"
        )
    return _distinct(chosen, str(path))


def _distinct(devices: tuple[Device, ...], source: str) -> tuple[Device, ...]:
    seen: set[str] = set()
    for device in devices:
        if str(device.address) in seen:
            raise BadInput(
                f"{source} names {device.address} twice",
                "a device would be updated twice at the same time",
                "name each device once",
            )
        seen.add(str(device.address))
    return devices


# TOML


def _from_toml(text: str, path: Path) -> tuple[Device, ...]:
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _malformed(path, str(error)) from error
    for key in raw:
        if key not in ("user", "devices"):
            raise _malformed(path, f"{key!r} is unknown", nearest(key, ("user", "devices")))
    user, entries = raw.get("user", ""), raw.get("devices", {})
    if not isinstance(user, str) or not isinstance(entries, dict):
        raise _malformed(path, "'user' is not a text, or 'devices' no table")
    return tuple(_device_of(name, entry, user, path) for name, entry in entries.items())


def _device_of(name: str, entry: Any, user: str, path: Path) -> Device:
    if not isinstance(entry, dict):
        raise _malformed(path, f"'devices.{name}' is no table")
    for key, value in entry.items():
        if key not in _DEVICE_KEYS:
            raise _malformed(path, f"'devices.{name}.{key}' is unknown", nearest(key, _DEVICE_KEYS))
        if type(value) is not _DEVICE_KEYS[key]:
            raise _malformed(path, f"'devices.{name}.{key}' is no {_DEVICE_KEYS[key].__name__}")
    address = SshAddress(
        entry.get("host", name), entry.get("user", user), entry.get("port", 0), _home(entry.get("identity"))
    )
    return Device(name, checked(address), tuple(str(group) for group in entry.get("groups", [])))


# Ansible's INI form


@dataclass
class _Ini:
    """What the sections say, before groups and variables are resolved."""

    hosts: dict[str, dict[str, str]] = field(default_factory=dict)
    groups: dict[str, list[str]] = field(default_factory=dict)
    children: dict[str, list[str]] = field(default_factory=dict)
    variables: dict[str, dict[str, str]] = field(default_factory=dict)

    def members(self, group: str, above: tuple[str, ...] = ()) -> set[str]:
        """The hosts of a group and of the groups below it."""
        found = set(self.hosts) if group == ALL else set(self.groups.get(group, ()))
        for child in self.children.get(group, ()):
            if child not in above:
                found |= self.members(child, (*above, group))
        return found


def _from_ini(text: str, path: Path) -> tuple[Device, ...]:
    ini = _Ini()
    section, kind = "ungrouped", ""
    for number, line in enumerate(text.splitlines(), 1):
        try:
            words = [] if line.strip().startswith(";") else shlex.split(line, comments=True)
        except ValueError as error:
            raise _malformed(path, f"line {number}: {error}") from error
        if words and words[0].startswith("[") and words[0].endswith("]"):
            section, _, kind = words[0][1:-1].partition(":")
            if kind not in ("", "vars", "children"):
                raise _malformed(path, f"line {number}: ':{kind}' is neither vars nor children")
        elif words:
            _add_line(ini, section, kind, words, f"{path}, line {number}")
    names = {*ini.groups, *ini.children, *ini.variables} - {ALL, "ungrouped"}
    members = {group: ini.members(group) for group in (ALL, *sorted(names, key=lambda g: -_size(ini, g)))}
    return tuple(_host(host, own, ini, members) for host, own in ini.hosts.items())


def _size(ini: _Ini, group: str) -> int:
    return len(ini.members(group))


def _add_line(ini: _Ini, section: str, kind: str, words: list[str], where: str) -> None:
    if kind == "children":
        ini.children.setdefault(section, []).append(words[0])
    elif kind == "vars":
        key, _, value = " ".join(words).partition("=")
        ini.variables.setdefault(section, {})[key.strip()] = value.strip()
    else:
        own = dict(word.partition("=")[::2] for word in words[1:])
        for name in _expanded(words[0], where):
            ini.hosts.setdefault(name, {}).update(own)
            ini.groups.setdefault(section, []).append(name)


def _host(name: str, own: Mapping[str, str], ini: _Ini, members: Mapping[str, set[str]]) -> Device:
    """Resolve a host's variables: those of smaller groups count more, its own most."""
    groups = [group for group, hosts in members.items() if name in hosts]
    variables: dict[str, str] = {}
    for group in groups:
        variables.update(ini.variables.get(group, {}))
    variables.update(own)
    port = variables.get("ansible_port", "0")
    address = SshAddress(
        variables.get("ansible_host", name),
        variables.get("ansible_user", ""),
        int(port) if port.isdigit() else -1,
        _home(variables.get("ansible_ssh_private_key_file")),
    )
    return Device(name, checked(address), tuple(group for group in groups if group != ALL))


def _expanded(pattern: str, where: str) -> Iterator[str]:
    """The names that a pattern such as ``gate-[01:20]`` stands for."""
    found = _RANGE.search(pattern)
    if found is None:
        yield pattern
        return
    first, last = found[1], found[2]
    if first.isdigit() != last.isdigit():
        raise BadInput(f"{where} is malformed", f"{found[0]} is no range", "write [1:9] or [a:f]")
    numbers = range(int(first), int(last) + 1) if first.isdigit() else range(ord(first), ord(last) + 1)
    if not 0 < len(numbers) <= _MAX_RANGE:
        raise BadInput(f"{where} is malformed", f"{found[0]} is empty or too long", "write [1:9] or [a:f]")
    for number in numbers:
        part = str(number).zfill(len(first)) if first.isdigit() else chr(number)
        yield from _expanded(pattern[: found.start()] + part + pattern[found.end() :], where)


def _home(path: str | None) -> str:
    return "" if path is None else str(Path(path).expanduser())


def _malformed(path: Path, why: str, fix: str = "see docs/deploy.md for the form") -> BadInput:
    return BadInput(f"the inventory {path} is malformed", why, fix)
