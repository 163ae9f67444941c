"""The commands that bring bundles to devices: registries, deployment, fleets, provisioning.

Like every command of ``cli.py`` they parse, call one function and print.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgekit.console import INTERRUPTED, json_option, path_argument, print_error, print_json
from edgekit.errors import DeviceRefused

ca_file_option = click.option(
    "--ca-file", type=path_argument, help="PEM certificates of the authorities to trust."
)
plain_http_option = click.option(
    "--plain-http", is_flag=True, help="Without TLS, beyond loopback too; credentials are not sent so."
)


@click.command()
@click.argument("bundle_path", metavar="BUNDLE", type=path_argument)
@click.argument("reference", metavar="oci://HOST/NAME:TAG")
@ca_file_option
@plain_http_option
@json_option
def push(bundle_path: Path, reference: str, ca_file: Path | None, plain_http: bool, as_json: bool) -> None:
    """Push a bundle to an OCI registry; files that are there already are not sent."""
    from dataclasses import asdict

    from device_agent.oci.transport import Security
    from edgekit import registry

    pushed = registry.push(bundle_path, reference, Security(str(ca_file or ""), plain_http), _print_transfer)
    if as_json:
        print_json(asdict(pushed))
    else:
        click.echo(pushed.reference)
    if not pushed.signed:
        click.echo("  not signed: devices refuse it unless they allow that; see `edgekit sign`", err=True)


def _print_transfer(path: str, size_bytes: int, sent: bool) -> None:
    click.echo(f"  {'sent' if sent else 'there':<6} {size_bytes:>12} {path}", err=True)


@click.command()
@click.argument("reference", metavar="oci://HOST/NAME:TAG")
@click.argument("directory", metavar="DIR", type=path_argument)
@click.option("--key", type=path_argument, help="A public key that must have signed it, NAME.pub.")
@ca_file_option
@plain_http_option
@json_option
def pull(
    reference: str, directory: Path, key: Path | None, ca_file: Path | None, plain_http: bool, as_json: bool
) -> None:
    """Pull a bundle from an OCI registry into DIR/NAME; an interrupted pull goes on where it ended."""
    from dataclasses import asdict

    from device_agent.oci.transport import Security
    from edgekit import registry

    pulled = registry.pull(reference, directory, Security(str(ca_file or ""), plain_http), key)
    if as_json:
        print_json({**asdict(pulled), "directory": str(pulled.directory)})
    else:
        click.echo(f"{pulled.directory}: {pulled.digest[:12]} from {pulled.reference}")


inventory_option = click.option(
    "--inventory", type=path_argument, help="The fleet: TOML, or an Ansible inventory in INI form."
)
group_option = click.option("--group", help="Only this group, or this device, of the inventory.")
parallel_option = click.option(
    "--parallel", type=click.IntRange(1, 256), default=8, show_default=True, help="Devices at the same time."
)
ssh_config_option = click.option(
    "--ssh-config", type=path_argument, help="In the place of the ssh configuration of this user."
)


@click.command()
@click.argument("bundle", type=path_argument)
@click.option(
    "--to",
    "addresses",
    multiple=True,
    metavar="ADDRESS",
    help="ssh://[user@]host[:port], several times; local (the default); or unix:///path/control.sock.",
)
@inventory_option
@group_option
@click.option("--waves", default="100%", show_default=True, help="How far to go at each step: 1,10%,100%.")
@click.option(
    "--max-failures",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Begin no device more once more than so many failed.",
)
@parallel_option
@click.option("--retry-failed", is_flag=True, help="Try devices again that failed in an earlier run.")
@click.option("--record", type=path_argument, help="The rollout's record; default under .edgekit/rollouts.")
@ssh_config_option
@json_option  # the rest are the fields of job.Request
def deploy(as_json: bool, **settings: Any) -> int:
    """Bring a bundle to devices; each goes on with what it served unless the bundle proves itself there."""
    from dataclasses import asdict

    from edgekit.deploy import job, rollout

    result = job.deploy(job.Request(**settings), lambda text: click.echo(f"  {text}", err=True))
    if isinstance(result, rollout.Result):
        return _print_rollout(result, as_json)
    if as_json:
        print_json(asdict(result))
    else:
        click.echo(f"{result.name} {result.digest[:12]} serves at {result.address}")
    return 0


def _print_rollout(result: Any, as_json: bool) -> int:
    if as_json:
        print_json(result.document())
    else:
        for name, outcome in result.devices.items():
            click.echo(f"{name:<24} {outcome.state if outcome else 'not begun'}")
    if result.interrupted:
        print_error("interrupted", "Ctrl-C", "run the same command again: it goes on from the record")
        return INTERRUPTED
    if result.complete:
        return 0
    failed = [f"{o.device} ({o.state}: {o.what}: {o.why})" for o in result.failed]
    print_error(
        f"the rollout stopped: {len(failed)} of {len(result.devices)} devices failed",
        "; ".join(failed),
        "correct the cause and run it again; --retry-failed tries those that refused the bundle",
    )
    return DeviceRefused.exit_code


@click.group()
def fleet() -> None:
    """Many devices."""


@fleet.command("status")
@click.option("--to", "addresses", multiple=True, metavar="ADDRESS", help="ssh://[user@]host[:port].")
@inventory_option
@group_option
@parallel_option
@ssh_config_option
@json_option
def fleet_status(
    addresses: tuple[str, ...],
    inventory: Path | None,
    group: str | None,
    parallel: int,
    ssh_config: Path | None,
    as_json: bool,
) -> int:
    """Show what every device serves; exit code 5 if one is out of reach or serves less than it should."""
    from dataclasses import asdict

    from edgekit.deploy import fleet as asking
    from edgekit.deploy import job, ssh

    devices = job.devices(addresses, inventory, group)
    options = ssh.SshOptions(ssh_config, batch=ssh.batch_needed(len(devices)))
    found = asking.status(devices, options, parallel)
    if as_json:
        print_json({"devices": [asdict(device) for device in found]})
    else:
        for device in found:
            _print_device(device)
    return 0 if all(device.healthy for device in found) else DeviceRefused.exit_code


def _print_device(device: Any) -> None:
    if not device.reachable:
        click.echo(f"{device.device:<24} unreachable: {device.error}")
        return
    click.echo(f"{device.device:<24} agent {device.agent} {device.architecture}")
    for model in device.models:
        digest = (model["digest"] or "-")[:12]
        serving = "serves" if model["serving"] else "does not serve"
        click.echo(f"  {model['name']} {model['version']} {digest} {serving}, last: {model['state']}")
        if model["failure"]:
            click.echo(f"    {model['failure']['what']}: {model['failure']['why']}")


@click.command()
@click.option("--rootfs", required=True, type=path_argument, help="Root of a Debian or Ubuntu tree.")
@click.option("--bundle", required=True, type=path_argument, help="What the device shall serve.")
@click.option("--key", "keys", required=True, multiple=True, type=path_argument, help="A key to trust.")
@click.option(
    "--agent", type=path_argument, help="The agent's Debian package; without it, the fitting one in dist/."
)
@click.option(
    "--config", type=path_argument, help="The agent's configuration; without it, the package's own."
)
@json_option
def provision(
    rootfs: Path, bundle: Path, keys: tuple[Path, ...], agent: Path | None, config: Path | None, as_json: bool
) -> None:
    """Put the agent, its keys and a bundle into a root file system before it is flashed."""
    from dataclasses import asdict

    from edgekit.deploy import provision as job

    package = agent if agent is not None else job.find_package(Path("dist"), rootfs)
    result = job.provision(
        rootfs, bundle, keys, package, config, lambda step: click.echo(f"  {step}", err=True)
    )
    if as_json:
        print_json(asdict(result))
    else:
        click.echo(f"{result.rootfs} ({result.distribution}) comes up serving {result.model}")


#: Registered by ``cli.py``.
COMMANDS = (push, pull, deploy, fleet, provision)
