"""``edgekit-agent``: parse, call one function, print.

Commands talk to the running agent over its control socket; where none answers they act on the store.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, List, Mapping, Optional, Sequence

from device_agent import __version__, cli_lines
from device_agent.errors import AgentError, BadInput, Missing

if TYPE_CHECKING:
    from device_agent.config import Config
    from device_agent.repository.repository import RepositorySettings
    from device_agent.server.control_client import Client

EXIT_INTERRUPTED = 130


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(arguments)
    _set_up_logging(options)
    try:
        return int(options.run(options))
    except AgentError as error:
        if options.debug:
            raise
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--config", type=Path, help="configuration file; default /etc/edgekit/agent.toml")
    common.add_argument("--json", action="store_true", help="print one JSON document")
    common.add_argument("--debug", action="store_true", help="show tracebacks and the log")
    parser = argparse.ArgumentParser(prog="edgekit-agent", description="Serve signed edgekit bundles.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, parents=[common])
        command.set_defaults(run=run)
        return command

    serve = add("serve", _serve, "serve the active models until SIGTERM")
    serve.add_argument(
        "--model-repository",
        type=Path,
        metavar="DIR",
        help="also serve a Triton-layout repository of ONNX models",
    )
    serve.add_argument(
        "--model-control-mode",
        choices=("none", "explicit"),
        default="none",
        help="none: every model of the repository serves; explicit: those that clients load",
    )
    serve.add_argument(
        "--load-model",
        action="append",
        default=[],
        metavar="NAME",
        help="in explicit mode, load it at the start",
    )
    install = add("install", _install, "verify a bundle, self-test it and switch to it")
    install.add_argument("bundle", type=Path, help="a bundle's directory or .edgekit file")
    install.add_argument("--no-activate", action="store_true", help="only store it")
    install.add_argument(
        "--allow-downgrade", action="store_true", help="take it though a newer version was committed here"
    )
    add("list", _list, "list the installed versions")
    activate = add("activate", _activate, "serve an installed version")
    activate.add_argument("digest", help="its digest, or at least the first six characters")
    rollback = add("rollback", _rollback, "return to the version that served before")
    rollback.add_argument("name", nargs="?", help="the model; needed where there are several")
    remove = add("remove", _remove, "remove an installed version that is not active")
    remove.add_argument("digest", help="its digest, or at least the first six characters")
    trust = add("trust", _trust, "take a rotation document, or show the keys that count")
    trust.add_argument("document", type=Path, nargs="?", help="what `edgekit rotate-key` wrote")
    add("status", _status, "show what serves, how the last operation ended, and the keys that count")
    add("connect", _connect, "the device's end of `edgekit deploy --to ssh://...`")
    add("measure", _measure, "the device's end of `edgekit compress --measure-on ssh://...`")
    logs = add("logs", _logs, "show what the journal holds of the agent")
    logs.add_argument("--lines", type=int, default=100, help="how many, counted from the end; default 100")
    add("check", _check, "can this device serve?")
    return parser


def _set_up_logging(options: argparse.Namespace) -> None:
    """The agent logs; a command prints its result, or an error of three lines."""
    # cryptography says so at every start on JetPack 5, where no newer Python is to be had.
    warnings.filterwarnings("ignore", message="Python 3.8 is no longer supported")
    import logging

    if options.run is _serve or options.debug:
        from device_agent.systemd.log_format import formatter

        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(formatter(os.environ))
        logging.basicConfig(level=logging.DEBUG if options.debug else logging.INFO, handlers=[handler])
    else:
        logging.getLogger("device_agent").addHandler(logging.NullHandler())


# Commands


def _serve(options: argparse.Namespace) -> int:
    from device_agent import serve

    config = _config(options)
    return int(serve.run(config, _repository(options, config)))


def _repository(options: argparse.Namespace, config: Config) -> Optional[RepositorySettings]:
    if options.model_repository is None:
        if options.load_model or options.model_control_mode != "none":
            raise BadInput(
                "there is no model repository",
                "--load-model and --model-control-mode are about its models",
                "give --model-repository DIR too",
            )
        return None
    from device_agent.repository.repository import RepositorySettings

    return RepositorySettings(
        options.model_repository.absolute(),
        options.model_control_mode,
        tuple(options.load_model),
        config.limits.max_upload_bytes,
    )


def _install(options: argparse.Namespace) -> int:
    choices = {"activate": not options.no_activate, "allow_downgrade": options.allow_downgrade}
    bundle = options.bundle.absolute()

    def hand_over(client: Client) -> Any:
        from device_agent.server import control_client

        return control_client.install(client, bundle, _progress, **choices)

    result = _ask(options, {"op": "install", "bundle": str(bundle), **choices}, hand_over)
    _print(options, result, cli_lines.changed(result))
    return 0


def _activate(options: argparse.Namespace) -> int:
    result = _ask(options, {"op": "activate", "digest": options.digest})
    _print(options, result, cli_lines.changed(result))
    return 0


def _rollback(options: argparse.Namespace) -> int:
    result = _ask(options, {"op": "rollback", "name": options.name or _only_model(options)})
    _print(options, result, cli_lines.changed(result))
    return 0


def _remove(options: argparse.Namespace) -> int:
    result = _ask(options, {"op": "remove", "digest": options.digest})
    _print(options, result, [f"removed {result['name']} {result['digest'][:12]}"])
    return 0


def _trust(options: argparse.Namespace) -> int:
    if options.document is None:
        keys = _ask(options, {"op": "keys"})
        _print(options, keys, cli_lines.key_lines(keys))
        return 0
    from device_agent import rotation

    result = _ask(options, {"op": "trust", "document": rotation.read_text(options.document)})
    lines = [f"trusted: {result['name']} {result['fingerprint'][:16]}"]
    lines += [f"retired: {', '.join(result['retired'])}"] if result["retired"] else []
    _print(options, result, lines)
    return 0


def _list(options: argparse.Namespace) -> int:
    versions = _ask(options, {"op": "list"})
    _print(options, versions, [cli_lines.version_line(version) for version in versions])
    return 0


def _status(options: argparse.Namespace) -> int:
    models = _ask(options, {"op": "status"})
    lines = [line for model in models for line in cli_lines.model_lines(model)]
    if not options.json:
        lines += cli_lines.key_lines(_ask(options, {"op": "keys"}))
    _print(options, models, lines)
    return 0


def _connect(options: argparse.Namespace) -> int:
    from device_agent import connect

    return connect.run(_config(options), sys.stdin.buffer, sys.stdout.buffer)


def _measure(options: argparse.Namespace) -> int:
    from device_agent import measure

    return measure.run(sys.stdin.buffer, sys.stdout.buffer)


def _check(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from device_agent import check

    findings = check.check(_config(options))
    serves = check.can_serve(findings)
    document = {"ok": serves, "findings": [asdict(finding) for finding in findings]}
    _print(options, document, [f"{f.status:8} {f.subject}: {f.detail}" for f in findings])
    return 0 if serves else Missing.exit_code


def _logs(options: argparse.Namespace) -> int:
    from device_agent.systemd import logs

    entries = logs.read(options.lines)
    _print(options, entries, [f"{entry['time']} {entry['message']}" for entry in entries])
    return 0


# Asking the agent


def _config(options: argparse.Namespace) -> Config:
    from device_agent import config

    return config.load(options.config)


def _ask(
    options: argparse.Namespace,
    message: Mapping[str, Any],
    converse: Optional[Callable[[Client], Any]] = None,
) -> Any:
    """Let the running agent do it; do it here if there is none.

    Args:
        options: say which agent.
        message: the request.
        converse: asks a running agent the same in another way.
    """
    config = _config(options)
    client = _client(config)
    if client is None:
        return _act(config, message)
    with client:
        return converse(client) if converse else client.ask(message, _progress)


def _client(config: Config) -> Optional[Client]:
    """The running agent; None if there is none."""
    from device_agent.server.control_client import Client

    try:
        return Client.connect(config.control_socket)
    except (FileNotFoundError, ConnectionRefusedError):
        return None
    except OSError as error:
        raise BadInput(
            f"the agent cannot be asked over {config.control_socket}",
            error.strerror or str(error),
            "run this as root, as the user that the agent runs as, or as a member of its group",
        ) from error


def _act(config: Config, message: Mapping[str, Any]) -> Any:
    """Carry a request out on the store, in this process; an install self-tests here too."""
    from device_agent.offline import lifecycle_of
    from device_agent.server import control

    with lifecycle_of(config) as lifecycle:
        return control.perform(lifecycle, message, _progress)


def _progress(state: str) -> None:
    print(state, file=sys.stderr)


def _only_model(options: argparse.Namespace) -> str:
    names = [model["name"] for model in _ask(options, {"op": "status"})]
    if len(names) != 1:
        raise BadInput(
            "which model shall be rolled back?",
            f"installed: {', '.join(names) or 'none'}",
            "give its name: edgekit-agent rollback NAME",
        )
    return str(names[0])


def _print(options: argparse.Namespace, document: Any, lines: List[str]) -> None:
    print(json.dumps(document, indent=2) if options.json else "\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
