"""Can this device serve? What ``edgekit-agent check`` looks at, one function each."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import List

from device_agent.config import Config
from device_agent.errors import BadInput
from device_agent.keyring import KeyRing
from device_agent.keys import key_files, load_public_key
from device_agent.signature import Trust
from device_agent.trust_store import TrustStore

_MIN_PYTHON = (3, 8)
_MIN_CERTIFICATE_DAYS = 30
_MIN_FREE_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class Finding:
    """One answer.

    Attributes:
        subject: what was looked at.
        status: ``ok``; ``warning``: it serves, with a drawback; ``missing``: it cannot serve.
        detail: what was found.
    """

    subject: str
    status: str
    detail: str


def check(config: Config) -> List[Finding]:
    """Look at everything that serving needs; changes nothing and raises nothing."""
    return [
        _python(),
        *(
            _package(name)
            for name in ("numpy", "onnxruntime", "httptools", "cryptography", "prometheus_client")
        ),
        _state_dir(config.state_dir),
        _memory(),
        _keys(config),
        *([_tls(config)] if config.tls.enabled else []),
    ]


def can_serve(findings: List[Finding]) -> bool:
    """Whether nothing that serving needs is missing."""
    return all(finding.status != "missing" for finding in findings)


def _python() -> Finding:
    status = "ok" if sys.version_info >= _MIN_PYTHON else "missing"
    return Finding("python", status, f"{platform.python_version()} on {platform.machine()}")


def _package(name: str) -> Finding:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        return Finding(name, "missing", str(error))
    return Finding(name, "ok", str(getattr(module, "__version__", "version unknown")))


def _state_dir(state_dir: Path) -> Finding:
    existing = next(path for path in (state_dir, *state_dir.parents) if path.exists())
    free_bytes = shutil.disk_usage(str(existing)).free
    detail = f"{state_dir}: {free_bytes} bytes free"
    if not os.access(str(existing), os.W_OK | os.X_OK):
        return Finding("state_dir", "missing", f"{detail}, not writable by this user")
    return Finding("state_dir", "ok" if free_bytes >= _MIN_FREE_BYTES else "warning", detail)


def _memory() -> Finding:
    available_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    status = "ok" if available_bytes >= _MIN_FREE_BYTES else "warning"
    return Finding("memory", status, f"{available_bytes} bytes free")


def _keys(config: Config) -> Finding:
    broken = [path.name for path in key_files(config.keys_dir) if not _is_usable(path)]
    ring = Trust(config.keys_dir, rotations=TrustStore(config.state_dir / "trust").rotations).keyring()
    detail = f"{config.keys_dir}: trusted keys: {', '.join(_names(ring)) or 'none'}"
    if broken:
        detail += f"; unusable: {', '.join(broken)}"
    if config.allow_unsigned:
        return Finding("keys", "warning", f"{detail}; unsigned bundles are let in")
    return Finding("keys", "ok" if ring.usable() and not broken else "warning", detail)


def _is_usable(path: Path) -> bool:
    try:
        load_public_key(path)
    except BadInput:
        return False
    return True


def _names(ring: KeyRing) -> List[str]:
    return [f"{key.public.name} (retired)" if key.retired else key.public.name for key in ring.keys.values()]


def _tls(config: Config) -> Finding:
    from cryptography import x509

    from device_agent.server.access import Access

    try:
        _, certificate, _ = Access(config.tls).pem()
    except BadInput as error:
        return Finding("tls", "missing", f"{error.what}: {error.why}")
    ends = x509.load_pem_x509_certificate(certificate).not_valid_after_utc
    left_days = (ends - datetime.now(timezone.utc)).days
    status = "ok" if left_days >= _MIN_CERTIFICATE_DAYS else "warning"
    return Finding("tls", status, f"{config.tls.certificate} is valid until {ends:%Y-%m-%d}")
