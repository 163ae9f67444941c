"""The command line. A command parses its options, calls one function, and prints; no logic here.

Results go to standard output, everything else to standard error. Heavy modules are imported inside the
commands, so that ``edgekit --help`` answers at once.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from edgekit import __version__, interrupt
from edgekit.errors import ContractUnmet, DeviceRefused, EdgekitError

_INTERRUPTED = 130

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document on standard output."
)
path_argument = click.Path(path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="edgekit")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.pass_context
def cli(context: click.Context, debug: bool) -> None:
    """Compress a trained model to a contract and bring it to edge devices."""
    context.obj = debug


def main() -> None:
    """Entry point: run a command, turn errors into three lines and an exit code."""
    debug = "--debug" in sys.argv[1:]
    interrupt.listen()
    try:
        code = _run()
    except EdgekitError as error:
        if debug:
            raise
        _print_error(error.what, error.why, error.fix)
        sys.exit(error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        _print_usage_error(error)
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        _print_error("interrupted", "Ctrl-C", "run the same command again: finished stages are reused")
        sys.exit(_INTERRUPTED)
    except Exception as error:  # a mistake of ours, or trouble of the machine's
        if debug:
            raise
        _print_error(
            f"unexpected {type(error).__name__}",
            str(error) or "it has no message",
            "run it again as `edgekit --debug ...`, and report what that shows",
        )
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


def _run() -> Any:
    try:
        return cli.main(standalone_mode=False)
    except Exception:
        interrupt.check()  # the error may be what a library made of Ctrl-C
        raise


def _print_error(what: str, why: str, fix: str) -> None:
    lines = (" ".join(text.split()) for text in (what, why, fix))  # a library's message may have several
    click.echo("error: {}\n  why: {}\n  fix: {}".format(*lines), err=True)


def _print_usage_error(error: click.ClickException) -> None:
    path = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "edgekit"
    _print_error("bad usage", error.format_message(), f"`{path} --help` lists the options")


def _print_json(document: Any) -> None:
    click.echo(json.dumps(document, indent=2, ensure_ascii=False))


@cli.command()
@click.argument("model")
@click.option("--profile", required=True, help="A device profile: a name, or a TOML file.")
@click.option("--calib", required=True, metavar="DATA", help="Calibration data.")
@click.option(
    "--eval", "eval_", metavar="DATA", help="Held-out data; without it, a fifth of --calib is held out."
)
@click.option(
    "--train", metavar="DATA", help="Data for recovery; without it, --calib. Labels are not needed."
)
@click.option("--weights", type=path_argument, help="A .safetensors file, where MODEL is module:factory.")
@click.option("--size", type=float, help="Largest share of the parameters to keep, such as 0.35.")
@click.option("--max-drop", type=float, help="Largest absolute loss of the metric.")
@click.option("--latency", metavar="QUANTILE:MS", help="Bound on the latency at batch 1, such as p95:23ms.")
@click.option("--precision", help="auto, fp32, fp16 or int8.")
@click.option("--recipe", type=path_argument, help="A TOML file with settings of the stages.")
@click.option("--metric", help="top1, cosine, or module:fn.")
@click.option("--seed", type=int, help="For everything random.")
@click.option("--out", type=path_argument, help="Directory for the bundle and the report.")
@click.option(
    "--workdir", type=path_argument, default=Path(".edgekit"), show_default=True, help="Work kept for reuse."
)
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@json_option
def compress(
    model: str,
    profile: str,
    calib: str,
    eval_: str | None,
    train: str | None,
    weights: Path | None,
    size: float | None,
    max_drop: float | None,
    latency: str | None,
    precision: str | None,
    recipe: Path | None,
    metric: str | None,
    seed: int | None,
    out: Path | None,
    workdir: Path,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Prune, recover, quantize and measure MODEL; write a bundle and a report."""
    from edgekit import compress as job

    overrides = {
        "contract.size": size,
        "contract.max_drop": max_drop,
        "contract.latency": latency,
        "precision": precision,
        "metric": metric,
        "seed": seed,
    }
    prepared = job.prepare(
        job.Request(model, profile, calib, weights, eval_, train, recipe, overrides, out, workdir)
    )
    if dry_run:
        return _print_plan(job.dry_run(prepared, workdir), as_json)
    report = _run_with_progress(prepared, workdir)
    _print_report(report, as_json)
    return _exit_code(report)


def _run_with_progress(prepared: Any, workdir: Path) -> Any:
    from rich.console import Console

    from edgekit import compress as job
    from edgekit.terminal import TerminalProgress

    with TerminalProgress(Console(stderr=True)) as progress:
        return job.compress(prepared, workdir, progress)


def _print_plan(steps: list[Any], as_json: bool) -> int:
    if as_json:
        _print_json([{"name": step.name, "key": step.key, "cached": step.cached} for step in steps])
    else:
        for step in steps:
            click.echo(f"{step.name:<18} {'reused' if step.cached else 'to do':<7} {step.key[:12]}")
    return 0


def _print_report(report: Any, as_json: bool) -> None:
    if as_json:
        click.echo(report.model_dump_json(indent=2))
        return
    from rich.console import Console

    from edgekit.terminal import result_table

    Console().print(result_table(report))
    click.echo(f"bundle  {report.bundle.file}\nreport  {Path(report.bundle.path).parent / 'report.html'}")


def _exit_code(report: Any) -> int:
    if report.contract.met:
        return 0
    unmet = ContractUnmet(
        "the contract is not met: " + ", ".join(report.contract.unmet),
        "; ".join(report.contract.why.values()),
        "the best candidate was written; loosen the contract, or give more data for recovery (--train)",
    )
    _print_error(unmet.what, unmet.why, unmet.fix)
    return unmet.exit_code


@cli.group()
def profiles() -> None:
    """Device profiles."""


@profiles.command("list")
@json_option
def profiles_list(as_json: bool) -> None:
    """List the profiles that come with edgekit."""
    from edgekit import profile

    loaded = [profile.load(name) for name in profile.names()]
    if as_json:
        _print_json([{"name": entry.name, "description": entry.description} for entry in loaded])
    else:
        for entry in loaded:
            click.echo(f"{entry.name:<22} {entry.description}")


@profiles.command("show")
@click.argument("name")
@json_option
def profiles_show(name: str, as_json: bool) -> None:
    """Show a profile: a name or a file."""
    from edgekit import profile

    loaded = profile.load(name)
    if as_json:
        _print_json({**loaded.model_dump(mode="json"), "digest": profile.digest(loaded)})
    else:
        click.echo(profile.to_toml(loaded), nl=False)


@profiles.command("validate")
@click.argument("file", type=path_argument)
@json_option
def profiles_validate(file: Path, as_json: bool) -> None:
    """Check a profile file: keys, types and plausibility."""
    from edgekit import profile

    loaded = profile.validate(file)
    if as_json:
        _print_json({"name": loaded.name, "digest": profile.digest(loaded), "valid": True})
    else:
        click.echo(f"{file}: a valid profile, {loaded.name}")


@profiles.command("export")
@click.argument("name")
def profiles_export(name: str) -> None:
    """Print a profile as TOML, to start one of your own from."""
    from edgekit import profile

    click.echo(profile.to_toml(profile.load(name)), nl=False)


@cli.command()
@click.argument("bundle_path", metavar="BUNDLE", type=path_argument)
@json_option
def inspect(bundle_path: Path, as_json: bool) -> None:
    """Describe a bundle and check its files."""
    from edgekit import bundle

    described = bundle.inspect(bundle_path)
    if as_json:
        _print_json(described)
        return
    for key in (
        "name",
        "version",
        "digest",
        "profile",
        "precision",
        "max_batch_size",
        "size_bytes",
        "signed",
    ):
        click.echo(f"{key:<15} {described[key]}")
    for direction in ("inputs", "outputs"):
        for tensor in described[direction]:
            click.echo(f"{direction[:-1]:<15} {tensor['name']} {tensor['dtype']} {list(tensor['shape'])}")


@cli.command()
@click.argument("name", type=path_argument)
def keygen(name: Path) -> None:
    """Make a signing key: NAME.key (keep it secret) and NAME.pub (for devices)."""
    from edgekit import sign as signing

    private, public = signing.keygen(name)
    click.echo(f"{private}\n{public}")


@cli.command()
@click.argument("bundle_path", metavar="BUNDLE", type=path_argument)
@click.option("--key", required=True, type=path_argument, help="The private key, NAME.key.")
def sign(bundle_path: Path, key: Path) -> None:
    """Sign a bundle, in place."""
    from edgekit import sign as signing

    signer = signing.sign(bundle_path, key)
    click.echo(f"{bundle_path}: signed with the key {signer.fingerprint[:16]}")


@cli.command()
@click.argument("bundle_path", metavar="BUNDLE", type=path_argument)
@click.option("--key", required=True, type=path_argument, help="The public key, NAME.pub.")
def verify(bundle_path: Path, key: Path) -> None:
    """Check a bundle's files and signature."""
    from edgekit import sign as signing

    signer = signing.verify(bundle_path, key)
    click.echo(f"{bundle_path}: whole, and signed with the key {signer.fingerprint[:16]}")


@cli.command("rotate-key")
@click.argument("out", type=path_argument)
@click.option("--old", required=True, type=path_argument, help="The private key that devices trust, OLD.key.")
@click.option("--new", required=True, type=path_argument, help="The public key to trust, NEW.pub.")
@click.option("--retire", is_flag=True, help="Let the new key be the only one that signs from then on.")
@click.option("--serial", type=int, help="Rises from document to document; default: the time in seconds.")
def rotate_key(out: Path, old: Path, new: Path, retire: bool, serial: int | None) -> None:
    """Write a document that tells devices to trust a new key; they take it with `edgekit-agent trust`."""
    from edgekit import sign as signing

    rotated = signing.rotate(old, new, out, retire=retire, serial=serial)
    click.echo(f"{out}: serial {rotated.serial}, names the key {rotated.added.fingerprint[:16]}")


ca_file_option = click.option(
    "--ca-file", type=path_argument, help="PEM certificates of the authorities to trust."
)
plain_http_option = click.option(
    "--plain-http", is_flag=True, help="Without TLS, beyond loopback too; credentials are not sent so."
)


@cli.command()
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
        _print_json(asdict(pushed))
    else:
        click.echo(pushed.reference)
    if not pushed.signed:
        click.echo("  not signed: devices refuse it unless they allow that; see `edgekit sign`", err=True)


def _print_transfer(path: str, size_bytes: int, sent: bool) -> None:
    click.echo(f"  {'sent' if sent else 'there':<6} {size_bytes:>12} {path}", err=True)


@cli.command()
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
        _print_json({**asdict(pulled), "directory": str(pulled.directory)})
    else:
        click.echo(f"{pulled.directory}: {pulled.digest[:12]} from {pulled.reference}")


@cli.command("export-triton")
@click.argument("bundle_path", metavar="BUNDLE", type=path_argument)
@click.argument("repository", metavar="DIR", type=path_argument)
@click.option("--labels", metavar="[OUTPUT=]FILE", help="Names of the classes, one a line.")
@json_option
def export_triton(bundle_path: Path, repository: Path, labels: str | None, as_json: bool) -> None:
    """Write a bundle as a model of a Triton repository."""
    from dataclasses import asdict

    from edgekit import export_triton as exporter

    exported = exporter.export(bundle_path, repository, labels)
    if as_json:
        _print_json({**asdict(exported), "directory": str(exported.directory)})
    else:
        click.echo(f"{exported.directory / str(exported.version)}: {exported.name} {exported.digest[:12]}")


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


@cli.command()
@click.argument("bundle_path", metavar="BUNDLE", type=path_argument)
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
@json_option
def deploy(
    bundle_path: Path,
    addresses: tuple[str, ...],
    inventory: Path | None,
    group: str | None,
    waves: str,
    max_failures: int,
    parallel: int,
    retry_failed: bool,
    record: Path | None,
    ssh_config: Path | None,
    as_json: bool,
) -> int:
    """Bring a bundle to devices; each goes on with what it served unless the bundle proves itself there."""
    from dataclasses import asdict

    from edgekit.deploy import job, rollout

    request = job.Request(
        bundle_path,
        addresses,
        inventory,
        group,
        waves,
        max_failures,
        parallel,
        retry_failed,
        record,
        ssh_config,
    )
    result = job.deploy(request, lambda text: click.echo(f"  {text}", err=True))
    if isinstance(result, rollout.Result):
        return _print_rollout(result, as_json)
    if as_json:
        _print_json(asdict(result))
    else:
        click.echo(f"{result.name} {result.digest[:12]} serves at {result.address}")
    return 0


def _print_rollout(result: Any, as_json: bool) -> int:
    if as_json:
        _print_json(result.document())
    else:
        for name, outcome in result.devices.items():
            click.echo(f"{name:<24} {outcome.state if outcome else 'not begun'}")
    if result.interrupted:
        _print_error("interrupted", "Ctrl-C", "run the same command again: it goes on from the record")
        return _INTERRUPTED
    if result.complete:
        return 0
    failed = [f"{o.device} ({o.state}: {o.what}: {o.why})" for o in result.failed]
    _print_error(
        f"the rollout stopped: {len(failed)} of {len(result.devices)} devices failed",
        "; ".join(failed),
        "correct the cause and run it again; --retry-failed tries those that refused the bundle",
    )
    return DeviceRefused.exit_code


@cli.group()
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
        _print_json({"devices": [asdict(device) for device in found]})
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


@cli.command()
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
        _print_json(asdict(result))
    else:
        click.echo(f"{result.rootfs} ({result.distribution}) comes up serving {result.model}")


@cli.command()
@click.option("--seed", type=int, default=0, show_default=True, help="For training and everything after it.")
@click.option("--out", type=path_argument, default=Path("edgekit-demo"), show_default=True)
@json_option
def demo(seed: int, out: Path, as_json: bool) -> int:
    """Train a classifier of scanned digits, compress it, deploy it to a local agent, and show the table."""
    from dataclasses import asdict

    from rich.console import Console

    from edgekit.demo import road
    from edgekit.terminal import TerminalProgress, served_line

    console = Console(stderr=True)
    with TerminalProgress(console) as progress:
        report, served = road.drive(
            seed, out, progress, lambda text: console.print(f"  {text}", highlight=False)
        )
    if as_json:
        _print_json({**report.model_dump(), "served": asdict(served)})
    else:
        _print_report(report, as_json=False)
        click.echo(served_line(served.requests, served.identical, served.p50_ms, served.p99_ms))
    return _exit_code(report)


if __name__ == "__main__":
    main()
