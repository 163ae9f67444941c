"""Bundles, keys and doubles for the tests of trust, store and life cycle."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, Optional

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from device_agent import archive, keys, rotation, signature
from device_agent.bounded import Timeout
from device_agent.errors import Refused
from device_agent.manifest import (
    MANIFEST_NAME,
    SIGNATURE_NAME,
    Contract,
    FileEntry,
    Golden,
    Manifest,
    TensorSpec,
    Tolerance,
    dumps,
)
from device_agent.swap_plan import NOTHING_TO_STOP

FILES = {
    "model.onnx": b"weights" * 500,
    "golden/inputs.npz": b"inputs",
    "golden/outputs.npz": b"outputs",
    "engines/empty": b"",
}


def manifest_for(files: Dict[str, bytes], **changes: Any) -> Manifest:
    """A valid manifest that lists ``files``."""
    manifest = Manifest(
        schema=1,
        name="demo",
        version=1,
        profile="x86-cpu",
        architecture="x86_64",
        graph="model.onnx",
        precision="fp32",
        inputs=(TensorSpec("x", "FP32", (-1, 8)),),
        outputs=(TensorSpec("y", "FP32", (-1, 4)),),
        max_batch_size=8,
        files=tuple(
            FileEntry(path, hashlib.sha256(data).hexdigest(), len(data)) for path, data in files.items()
        ),
        engines=(),
        golden=Golden("golden/inputs.npz", "golden/outputs.npz", {"y": Tolerance(1e-4, 1e-4)}),
        contract=Contract(),
    )
    return replace(manifest, **changes)


def make_bundle(directory: Path, extra: Optional[Dict[str, bytes]] = None, **changes: Any) -> archive.Head:
    """Write an unsigned bundle directory whose files are not a real model."""
    files = {**FILES, **(extra or {})}
    for path, data in files.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(data)
    (directory / MANIFEST_NAME).write_bytes(dumps(manifest_for(files, **changes)))
    return archive.read_head(directory)


def make_key(keys_dir: Optional[Path], name: str = "release", curve: Any = None) -> Any:
    """Make a private key and, if a directory is given, trust it there."""
    key = ec.generate_private_key(curve or ec.SECP256R1())
    if keys_dir is not None:
        keys_dir.mkdir(exist_ok=True)
        (keys_dir / f"{name}.pub").write_bytes(
            key.public_key().public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            )
        )
    return key


def sign_bundle(directory: Path, key: Any) -> archive.Head:
    """Sign a bundle directory in place."""
    head = archive.read_head(directory)
    (directory / SIGNATURE_NAME).write_bytes(signature.sign(head.manifest, head.digest, key))
    return archive.read_head(directory)


def signed_bundle(directory: Path, key: Any, **changes: Any) -> archive.Head:
    """Write a signed bundle directory."""
    make_bundle(directory, **changes)
    return sign_bundle(directory, key)


@dataclass
class FakeWatch:
    """Stands in for a probation: it holds, or it does not."""

    unhealthy: bool
    late: bool
    seen_s: float = 0.0

    async def run(self) -> None:
        """Say so."""
        if self.late:
            raise Timeout("it could not prove itself", "it took too long (timeout)", "install it again")
        if self.unhealthy:
            raise Refused("it did not hold in its probation", "all requests failed", "build it again")

    def describe(self) -> Dict[str, Any]:
        """Nothing is known."""
        return {}


@dataclass
class FakeModels:
    """Stands in for ``device_agent.models.Models``: loads nothing, refuses what it is told to.

    Attributes:
        broken: digests whose self-test fails.
        unhealthy: digests that do not hold on probation.
        late: whether probations come to no end in their time.
        late_shadow: whether work on copies of live requests comes to no end in its time.
        serving: digest by model name.
        events: what was called, in order.
    """

    broken: List[str] = field(default_factory=list)
    unhealthy: List[str] = field(default_factory=list)
    late: bool = False
    late_shadow: bool = False
    serving: Dict[str, Any] = field(default_factory=dict)
    events: List[str] = field(default_factory=list)

    @property
    def builds(self) -> Any:
        """No engine is built here."""
        return SimpleNamespace(build=lambda *arguments: False, report=lambda name: None)

    def prepare(self, directory: Path, manifest: Manifest, digest: str) -> Any:
        """Check the files; pass or refuse."""
        self.events.append(f"prepare {digest[:8]}")
        archive.check_files(directory, manifest)
        if digest in self.broken:
            raise Refused("the golden outputs are not reproduced", "an output is off", "build it again")
        return SimpleNamespace(manifest=manifest, digest=digest)

    def watch(self, loaded: Any, old: Any, **options: Any) -> Any:
        """A probation that ends at once."""
        return FakeWatch(loaded.digest in self.unhealthy, self.late)

    def shadow(self, loaded: Any, old: Any, **options: Any) -> Any:
        """None is asked for, unless it is to come to no end."""
        return FakeWatch(unhealthy=False, late=True) if self.late_shadow else None

    def discard(self, loaded: Any) -> None:
        """Free what came too late."""
        self.events.append(f"discard {loaded.digest[:8]}")

    def require_memory(self, manifest: Manifest) -> None:
        """There is enough."""

    def plan_swap(self, manifest: Manifest) -> Any:
        """Both versions fit."""
        return NOTHING_TO_STOP

    def describe_engine(self, name: str) -> Any:
        """There is no engine."""
        return None

    def pause_of(self, name: str) -> Any:
        """No pause is planned."""
        return None

    def switch(self, loaded: Any) -> Any:
        """Serve it, and return what served."""
        self.events.append(f"switch {loaded.digest[:8]}")
        old = self.serving.get(loaded.manifest.name)
        self.serving[loaded.manifest.name] = loaded
        return old

    def unload(self, name: str) -> Any:
        """Serve it no more."""
        self.events.append(f"unload {name}")
        return self.serving.pop(name, None)

    async def retire(self, loaded: Any) -> None:
        """Free it."""
        self.events.append(f"retire {loaded.digest[:8]}")

    def get(self, name: str) -> Any:
        """What serves."""
        return self.serving.get(name)


def public_of(key: Any, name: str) -> keys.PublicKey:
    """The public half of a private key."""
    return keys.public_key(name, key.public_key())


def rotation_to(new: Any, signer: Any, serial: int, name: str = "next", retire: bool = False) -> bytes:
    """A rotation document that names the key ``new``."""
    return rotation.make(public_of(new, name), serial, retire, signer)
