"""One device from the package to the rollback: systemd, SSH, updates, watchdog, power cuts."""

from __future__ import annotations

import random
import time
from contextlib import suppress
from pathlib import Path

import pytest
from bundles import MODEL, Release, request
from device import Device, DeviceCommandError, MakeDevice
from load import GrpcClient, HttpClient, load

KILLS = 200
CONFIG = "[probation]\nduration_s = 1.0\nmin_requests = 20\n"


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """Signed bundles."""
    return Release(tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def device(make_device: MakeDevice, agent_package: Path, release: Release) -> Device:
    """A device that serves a model which multiplies by two."""
    device = make_device("field")
    device.boot()
    device.install_agent(agent_package)
    device.trust(release.public)
    shorten_waits(device)
    device.configure(CONFIG)
    install(device, release.good(2.0).archive)
    return device


def install(device: Device, archive: Path) -> str:
    """Copy a bundle to root's home, which the service does not see, and install it; what was printed."""
    device.put(archive, f"/root/{archive.parent.name}.edgekit")
    return device.run(f"edgekit-agent install /root/{archive.parent.name}.edgekit").stdout


def shorten_waits(device: Device) -> None:
    """Let systemd come to the rescue after seconds, where the package's unit has half minutes."""
    drop_in = device.path("/etc/systemd/system/edgekit-agent.service.d/quick.conf")
    drop_in.parent.mkdir(parents=True)
    drop_in.write_text("[Service]\nWatchdogSec=3\nTimeoutAbortSec=2\nRestartSec=200ms\n")
    device.run("systemctl daemon-reload")


def factor_of(device: Device) -> float:
    """What the served model multiplies by, once it answers."""
    return device.wait_for_answer(MODEL, request(1.0))[0]


def exposure_of(device: Device) -> float:
    """What `systemd-analyze security` gives the service, of 10."""
    last = device.run("systemd-analyze security --no-pager edgekit-agent").stdout.strip().splitlines()[-1]
    return float(last.split(":")[1].split()[0])


def test_the_package_brings_up_a_healthy_system(device: Device) -> None:
    """After `dpkg -i` the agent runs as its own user, sandboxed, and systemd counts no failed unit."""
    assert device.run("systemctl is-system-running").stdout.strip() == "running"
    assert device.run("systemctl show -p Type -p User --value edgekit-agent").stdout.split() == [
        "notify",
        "edgekit",
    ]
    exposure = exposure_of(device)
    print(f"systemd-analyze security: {exposure}")
    assert exposure <= 2.0
    assert factor_of(device) == 2.0


def test_a_stopped_process_is_restarted_by_the_watchdog(device: Device) -> None:
    """An agent that no longer runs its loop is ended by systemd within its bounds, and serves again."""
    before = device.agent_pid()
    device.run(f"kill -STOP {before}")
    deadline_s = time.monotonic() + 60
    while device.agent_pid() in (0, before):
        assert time.monotonic() < deadline_s, "the watchdog never came"
        time.sleep(0.2)
    assert factor_of(device) == 2.0
    assert "watchdog" in device.run("journalctl -u edgekit-agent --no-pager").stdout.lower()


@pytest.mark.parametrize("kind", ["wrong", "slow"])
def test_a_bad_version_is_rolled_back_and_the_reason_kept(
    device: Device, release: Release, kind: str
) -> None:
    """A version with other outputs, or too slow for its contract, ends in exit 5, and the old one serves."""
    bad = release.wrong(5.0) if kind == "wrong" else release.slow(5.0, latency_ms=1.0)
    with pytest.raises(DeviceCommandError) as caught:
        install(device, bad.archive)
    assert caught.value.returncode == 5
    assert factor_of(device) == 2.0
    assert device.status()["last_operation"]["failure"]["why"]
    assert device.status()["active"] != bad.digest


def test_a_crashing_version_is_rolled_back(device: Device, release: Release) -> None:
    """A version whose engine's process keeps dying on probation ends in exit 5, and the old one serves."""
    isolated = "[models.scale]\nisolate = true\n"
    device.configure(CONFIG.replace("1.0", "20.0") + isolated)
    assert factor_of(device) == 2.0
    device.put(release.good(7.0).archive, "/srv/crashing.edgekit")
    device.run(
        "(edgekit-agent install /srv/crashing.edgekit > /srv/out 2>&1; echo $? > /srv/code) >/dev/null 2>&1 &"
    )
    deadline_s = time.monotonic() + 60
    while not device.run("cat /srv/code", check=False).stdout.strip():
        said = device.run("cat /srv/out", check=False).stdout
        assert time.monotonic() < deadline_s, said
        if "probation" in said:
            device.run(f"pkill -KILL -P {device.agent_pid()}", check=False)
        time.sleep(0.2)
    assert device.path("/srv/code").read_text().strip() == "5", device.path("/srv/out").read_text()
    assert "process" in device.status()["last_operation"]["failure"]["why"]
    device.configure(CONFIG)
    assert factor_of(device) == 2.0


def test_a_leaking_version_is_rolled_back(device: Device, release: Release) -> None:
    """A version whose memory grows on and on while clients use it ends in exit 5, and the old one serves."""
    device.configure(CONFIG.replace("1.0", "8.0") + f"max_memory_growth_bytes = {16 * 1024 * 1024}\n")
    assert factor_of(device) == 2.0
    device.run("rm -f /srv/code /srv/out")
    device.put(release.leaking(8.0).archive, "/srv/leaking.edgekit")
    device.run(
        "(edgekit-agent install /srv/leaking.edgekit > /srv/out 2>&1; echo $? > /srv/code) >/dev/null 2>&1 &"
    )
    elements = 1_000_000
    deadline_s = time.monotonic() + 60
    while not device.run("cat /srv/code", check=False).stdout.strip():
        assert time.monotonic() < deadline_s
        elements += 2_000_000
        device.infer(MODEL, request(float(min(elements, 100_000_000))))
    assert device.path("/srv/code").read_text().strip() == "5", device.path("/srv/out").read_text()
    assert "its process grew" in device.status()["last_operation"]["failure"]["why"]
    device.configure(CONFIG)
    assert factor_of(device) == 2.0


def test_a_reboot_in_probation_costs_neither_version(device: Device, release: Release) -> None:
    """After a reboot in the middle of a probation the device serves one of the two and ends it."""
    good = release.good(3.0)
    device.configure(CONFIG.replace("1.0", "8.0"))
    device.put(good.archive, "/srv/three.edgekit")
    device.run("nohup edgekit-agent install /srv/three.edgekit > /root/install.log 2>&1 & sleep 3")
    device.reboot()
    assert factor_of(device) in (2.0, 3.0)
    deadline_s = time.monotonic() + 60
    while (status := device.status())["active"] not in status["committed"]:
        assert time.monotonic() < deadline_s, status
        time.sleep(0.5)
    device.configure(CONFIG)
    install(device, good.archive)
    assert factor_of(device) == 3.0


def test_random_kills_of_an_update_leave_the_old_or_the_new_version(device: Device, release: Release) -> None:
    """SIGKILL at 200 random moments of an update: the device always serves one of the two, and updates on."""
    bundles = {factor: release.good(factor).archive for factor in (4.0, 6.0)}
    device.configure("[probation]\nduration_s = 0.3\nmin_requests = 5\n")
    for factor, archive in bundles.items():
        device.put(archive, f"/srv/{factor}.edgekit")
        device.run(f"edgekit-agent install /srv/{factor}.edgekit")
    draw = random.Random(5)
    served = {4.0: 0, 6.0: 0}
    for _ in range(KILLS):
        factor = draw.choice([4.0, 6.0])
        device.run(
            f"(edgekit-agent install /srv/{factor}.edgekit > /dev/null 2>&1 &) ; "
            f"sleep {draw.uniform(0.0, 1.2):.3f}; "
            "pid=$(systemctl show --property=MainPID --value edgekit-agent); [ $pid = 0 ] || kill -KILL $pid"
        )
        found = factor_of(device)
        assert found in served
        served[found] += 1
    print(f"{KILLS} kills: served {served}")
    device.run("edgekit-agent install /srv/4.0.edgekit")
    assert factor_of(device) == 4.0


def test_power_cuts_leave_the_old_or_the_new_version(device: Device, release: Release) -> None:
    """When the power goes in the middle of an update, the next boot serves one of the two."""
    draw = random.Random(6)
    for factor in (2.0, 3.0, 4.0):
        archive = release.good(factor).archive
        device.put(archive, "/srv/cut.edgekit")
        device.run("(edgekit-agent install /srv/cut.edgekit > /dev/null 2>&1 &) ; true")
        time.sleep(draw.uniform(0.1, 1.0))
        device.cut_power()
        device.boot()
        assert factor_of(device) in (2.0, 3.0, 4.0)
    install(device, release.good(2.0).archive)
    assert factor_of(device) == 2.0


def test_grpc_is_switched_on_with_its_socket(device: Device) -> None:
    """What docs/systemd.md says is enough, while clients ask over HTTP too, and outlasts a reboot."""
    with load(lambda: HttpClient(device.http_port, MODEL, request(1.0))) as outcome:
        device.run(
            "systemctl enable edgekit-agent-grpc.socket"
            " && systemctl restart edgekit-agent.service edgekit-agent-grpc.socket"
        )
    assert outcome.failures == {}
    device.reboot()
    factor_of(device)
    client = GrpcClient(device.grpc_port, MODEL, request(1.0))
    assert client.ask() == ""
    client.close()


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_an_upgrade_of_the_agent_under_load_loses_no_request(
    device: Device, agent_package: Path, protocol: str
) -> None:
    """While `dpkg -i` replaces the running agent, every request of four busy clients is answered."""
    device.put(agent_package, "/root/agent.deb")
    factor_of(device)
    before = device.agent_pid()
    kind, port = {"http": (HttpClient, device.http_port), "grpc": (GrpcClient, device.grpc_port)}[protocol]
    with load(lambda: kind(port, MODEL, request(1.0))) as outcome:
        time.sleep(1.0)
        device.run("dpkg --install /root/agent.deb")
        time.sleep(1.0)
    assert device.agent_pid() != before
    print(f"{protocol}: {outcome.answered} answered, the longest took {outcome.longest_s:.2f} s")
    assert outcome.failures == {}
    assert outcome.answered > 100


def test_the_unit_for_gpus_is_sound(device: Device) -> None:
    """With `gpu.conf` systemd finds nothing to complain of, and the agent serves; there is no GPU here."""
    device.run(
        "mkdir -p /etc/systemd/system/edgekit-agent.service.d"
        " && cp /usr/share/edgekit-agent/gpu.conf /etc/systemd/system/edgekit-agent.service.d/"
        " && systemctl daemon-reload && systemctl restart edgekit-agent"
    )
    assert device.run("systemd-analyze verify --man=no edgekit-agent.service").stderr == ""
    exposure = exposure_of(device)
    print(f"systemd-analyze security with gpu.conf: {exposure} (not executed with a GPU)")
    assert exposure <= 2.1
    factor_of(device)
    device.run(
        "rm /etc/systemd/system/edgekit-agent.service.d/gpu.conf"
        " && systemctl daemon-reload && systemctl restart edgekit-agent"
    )
    assert exposure_of(device) <= 2.0


def test_the_log_is_in_the_journal(device: Device) -> None:
    """`edgekit-agent logs` shows what the agent said, with its levels."""
    with suppress(DeviceCommandError):
        install(device, Path(__file__))
    assert "listening" in device.run("edgekit-agent logs").stdout
