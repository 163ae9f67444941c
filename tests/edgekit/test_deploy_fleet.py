"""Addresses, inventories and waves."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.deploy import inventory, record, ssh, waves
from edgekit.errors import BadInput

INI = """\
# a comment
bastion ansible_host=10.0.0.1
[lab]
gate-[01:03] ansible_user=edge
[field]
pole ansible_port=2222 ansible_user="own"
[fleet:children]
lab
field
[fleet:vars]
ansible_user=fleet
ansible_ssh_private_key_file=/keys/fleet
[all:vars]
ansible_user=nobody
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ssh://host", ssh.SshAddress("host")),
        ("ssh://User@Host.Example:2222", ssh.SshAddress("Host.Example", "User", 2222)),
        ("ssh://edge@[fe80::1]:22", ssh.SshAddress("fe80::1", "edge", 22)),
    ],
)
def test_an_address_is_read_as_it_is_written(text: str, expected: ssh.SshAddress) -> None:
    """Names keep their case, in which a Host of the ssh configuration may be written."""
    assert ssh.parse(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize(
    "text",
    [
        "ssh://",
        "ssh://-oProxyCommand=touch",
        "ssh://-lroot@host",
        "ssh://user:secret@host",
        "ssh://host/path",
        "ssh://host:99999",
        "ssh://ho st",
        "http://host",
        "host",
    ],
)
def test_an_address_that_ssh_could_misread_is_refused(text: str) -> None:
    """Nothing that begins like an option, holds a password, or is no address reaches ssh."""
    with pytest.raises(BadInput, match="cannot deploy to"):
        ssh.parse(text)


def test_ssh_is_given_a_fixed_command() -> None:
    """The remote command is always the same, and the user's configuration is what decides the rest."""
    argv = ssh.command(ssh.SshAddress("gate", "edge", 2222), ssh.SshOptions(Path("/c"), batch=True))
    assert argv[-4:] == ["--", "gate", "edgekit-agent", "connect"]
    assert [argv[argv.index(option) + 1] for option in ("-F", "-p", "-l")] == ["/c", "2222", "edge"]
    assert "BatchMode=yes" in argv
    assert "BatchMode=yes" not in ssh.command(ssh.SshAddress("gate"), ssh.SshOptions(batch=False))


def test_an_ansible_inventory_is_understood(tmp_path: Path) -> None:
    """Ranges, groups of groups and variables count as they do in Ansible: the nearest one wins."""
    (tmp_path / "hosts").write_text(INI)
    devices = {device.name: device for device in inventory.load(tmp_path / "hosts")}
    assert list(devices) == ["bastion", "gate-01", "gate-02", "gate-03", "pole"]
    assert devices["bastion"].address == ssh.SshAddress("10.0.0.1", "nobody")
    assert devices["gate-02"].address == ssh.SshAddress("gate-02", "edge", 0, "/keys/fleet")
    assert devices["pole"].address == ssh.SshAddress("pole", "own", 2222, "/keys/fleet")
    assert [d.name for d in inventory.load(tmp_path / "hosts", "fleet")] == [*list(devices)[1:]]
    assert [d.name for d in inventory.load(tmp_path / "hosts", "pole")] == ["pole"]


def test_an_inventory_of_our_own_is_understood(tmp_path: Path) -> None:
    """A device is reached by its name unless the file says otherwise."""
    (tmp_path / "i.toml").write_text(
        'user = "edge"\n[devices.a]\n[devices.b]\n'
        'host = "10.0.0.2"\nport = 22\nuser = "root"\ngroups = ["lab"]\n'
    )
    first, second = inventory.load(tmp_path / "i.toml")
    assert first.address == ssh.SshAddress("a", "edge")
    assert second.address == ssh.SshAddress("10.0.0.2", "root", 22)
    assert inventory.load(tmp_path / "i.toml", "lab") == (second,)


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("i.toml", "[devices", "malformed"),
        ("i.toml", "[device.a]", "did you mean 'devices'"),
        ("i.toml", "[devices.a]\nprot = 1", "did you mean 'port'"),
        ("i.toml", '[devices.a]\nport = "x"', "is no int"),
        ("i.toml", "", "names no device"),
        ("i.toml", '[devices.a]\nhost = "-x"', "not a name of a host"),
        ("i.toml", '[devices.a]\nhost = "x"\n[devices.b]\nhost = "x"', "twice"),
        ("hosts", "[a:parents]\nb", "neither vars nor children"),
        ("hosts", "a[1:b]", "is no range"),
        ("hosts", "a ansible_port=x", "is not a port"),
        ("hosts", 'a "', "line 1"),
    ],
)
def test_an_inventory_with_a_mistake_says_where(tmp_path: Path, name: str, text: str, reason: str) -> None:
    """A typing mistake never silently leaves a device out."""
    (tmp_path / name).write_text(text)
    with pytest.raises(BadInput) as caught:
        inventory.load(tmp_path / name)
    assert reason in str(caught.value)


def test_a_group_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """A misspelt group updates nobody, and a missing file is said to be missing."""
    (tmp_path / "hosts").write_text(INI)
    with pytest.raises(BadInput, match="nothing to reach"):
        inventory.load(tmp_path / "hosts", "laab")
    with pytest.raises(BadInput, match="cannot be read"):
        inventory.load(tmp_path / "none")


@pytest.mark.parametrize(
    ("text", "devices", "expected"),
    [
        ("1,10%,100%", 100, [1, 9, 90]),
        ("1,10%,100%", 5, [1, 4]),
        ("1,10%,100%", 1, [1]),
        ("100%", 7, [7]),
        ("2,3", 10, [2, 1]),
        ("0.5%", 1000, [5]),
    ],
)
def test_waves_say_how_many_have_the_version_at_their_end(
    text: str, devices: int, expected: list[int]
) -> None:
    """Steps are cumulative, a share is rounded up, and a step that adds nobody is no wave."""
    assert waves.sizes(text, devices) == expected


@given(
    st.lists(st.integers(1, 50).map(str) | st.integers(1, 100).map("{}%".format), min_size=1),
    st.integers(1, 300),
)
def test_waves_never_hold_more_than_the_fleet(steps: list[str], devices: int) -> None:
    """Every wave has a device, none is in two; with 100% at the end all have their turn."""
    sizes = waves.sizes(",".join(steps), devices)
    assert all(size > 0 for size in sizes)
    assert sum(sizes) <= devices
    assert sum(waves.sizes(",".join([*steps, "100%"]), devices)) == devices


@pytest.mark.parametrize("text", ["", "0", "-1", "101%", "x", "1,,2", "1.5", "nan%"])
def test_malformed_waves_are_refused(text: str) -> None:
    """A step is a whole number of devices or a share up to 100%."""
    with pytest.raises(BadInput, match="--waves"):
        waves.sizes(text, 10)


def test_a_rollout_runs_once_at_a_time(tmp_path: Path) -> None:
    """Two commands never work on the same record; a damaged one is refused, not overwritten."""
    path = tmp_path / "r" / "record.json"
    device = inventory.Device("a", ssh.SshAddress("a"))
    with record.opened(path, "0" * 64) as opened:
        opened.set(device, record.Outcome("a", record.COMMITTED))
        with pytest.raises(BadInput, match="under way"), record.opened(path, "0" * 64):
            pass
    with record.opened(path, "0" * 64) as opened:
        assert opened.of(device).state == record.COMMITTED
    path.write_text("{")
    with pytest.raises(BadInput, match="cannot be read"), record.opened(path, "0" * 64):
        pass
    assert path.read_text() == "{"
