"""The command line. A command parses its options, calls one function, and prints; no logic here.

Results go to standard output, everything else to standard error. Heavy modules are imported inside the
commands, so that ``edgekit --help`` answers at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from edgekit import (
    __version__,
    bench_command,
    check_command,
    device_commands,
    doctor_command,
    interrupt,
    train_commands,
    tuning_commands,
)
from edgekit.console import INTERRUPTED, json_option, path_argument, print_error, print_json
from edgekit.errors import ContractUnmet, EdgekitError


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
        print_error(error.what, error.why, error.fix)
        sys.exit(error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        _print_usage_error(error)
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        print_error("interrupted", "Ctrl-C", "run the same command again: finished stages are reused")
        sys.exit(INTERRUPTED)
    except Exception as error:  # a mistake of ours, or trouble of the machine's
        if debug:
            raise
        print_error(
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


def _print_usage_error(error: click.ClickException) -> None:
    path = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "edgekit"
    print_error("bad usage", error.format_message(), f"`{path} --help` lists the options")


#: Options of ``compress`` that are settings of the recipe.
_RECIPE_OPTIONS = (
    "contract.size", "contract.max_drop", "contract.latency", "precision", "metric", "seed",
)  # fmt: skip


@cli.command()
@click.argument("model")
@click.option(
    "--profile",
    required=True,
    multiple=True,
    help="A device profile: a name, or a TOML file. Again, or with commas, for more devices in one bundle.",
)
@click.option("--calib", required=True, metavar="DATA", help="Calibration data.")
@click.option("--eval", metavar="DATA", help="Held-out data; without it, a fifth of --calib is held out.")
@click.option(
    "--train", metavar="DATA", help="Data for recovery; without it, --calib. Labels are not needed."
)
@click.option("--weights", type=path_argument, help="A .safetensors file, where MODEL is module:factory.")
@click.option("--size", type=float, help="Largest share of the parameters to keep, such as 0.35.")
@click.option("--max-drop", type=float, help="Largest absolute loss of the metric.")
@click.option("--latency", metavar="QUANTILE:MS", help="Bound on the latency at batch 1, such as p95:23ms.")
@click.option("--precision", help="auto, fp32, fp16 or int8.")
@click.option("--recipe", type=path_argument, help="A TOML file with settings of the stages.")
@click.option("--metric", help="top1, f1, map, cosine, sqnr, or module:fn.")
@click.option("--seed", type=int, help="For everything random.")
@click.option("--out", type=path_argument, help="Directory for the bundle and the report.")
@click.option(
    "--workdir", type=path_argument, default=Path(".edgekit"), show_default=True, help="Work kept for reuse."
)
@click.option("--measure-on", metavar="ssh://HOST", help="Measure latencies on a device that has the agent.")
@click.option(
    "--study",
    metavar="URL",
    help="Join a search with others: a file, or a database such as postgresql+pg8000://USER@HOST/NAME.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@json_option
def compress(as_json: bool, dry_run: bool, profile: tuple[str, ...], **settings: Any) -> int:
    """Prune, recover, quantize and measure MODEL; write a bundle and a report."""
    from edgekit import compress as job

    overrides = {key: settings.pop(key.rpartition(".")[2]) for key in _RECIPE_OPTIONS}
    workdir = settings["workdir"]
    prepared = job.prepare(
        job.Request(profile=tuple(",".join(profile).split(",")), overrides=overrides, **settings)
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
        print_json([{"name": step.name, "key": step.key, "cached": step.cached} for step in steps])
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
    print_error(unmet.what, unmet.why, unmet.fix)
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
        print_json([{"name": entry.name, "description": entry.description} for entry in loaded])
    else:
        for entry in loaded:
            click.echo(f"{entry.name:<26} {entry.description}")


@profiles.command("show")
@click.argument("name")
@json_option
def profiles_show(name: str, as_json: bool) -> None:
    """Show a profile: a name or a file."""
    from edgekit import profile

    loaded = profile.load(name)
    if as_json:
        print_json({**loaded.model_dump(mode="json"), "digest": profile.digest(loaded)})
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
        print_json({"name": loaded.name, "digest": profile.digest(loaded), "valid": True})
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
        print_json(described)
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
        print_json({**asdict(exported), "directory": str(exported.directory)})
    else:
        click.echo(f"{exported.directory / str(exported.version)}: {exported.name} {exported.digest[:12]}")


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
        print_json({**report.model_dump(), "served": asdict(served)})
    else:
        _print_report(report, as_json=False)
        click.echo(served_line(served.requests, served.identical, served.p50_ms, served.p99_ms))
    return _exit_code(report)


for command in (
    *device_commands.COMMANDS,
    *train_commands.COMMANDS,
    *tuning_commands.COMMANDS,
    *check_command.COMMANDS,
    *doctor_command.COMMANDS,
    *bench_command.COMMANDS,
):
    cli.add_command(command)

if __name__ == "__main__":
    main()
