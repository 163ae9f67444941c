"""Cores and threads of a model: the configuration before the bundle, and the bundle before the default."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from device_agent import config, manifest
from device_agent.affinity import ANYWHERE, Placement
from device_agent.errors import ManifestError, Refused
from device_agent.manifest import Resources
from device_agent.resources import NO_WISHES, engine_settings
from storage_kit import FILES, manifest_for

CORE = max(os.sched_getaffinity(0))
ABSENT = "1023"


@pytest.mark.parametrize(
    ("toml", "wishes", "threads", "cpus"),
    [
        ("threads = 1", NO_WISHES, 1, ()),
        ("threads = 1", Resources(threads=3, cpus=str(CORE)), 3, (CORE,)),
        ("[models.m]\nthreads = 2", Resources(threads=3, cpus=str(CORE)), 2, (CORE,)),
        (f'[models.m]\ncpus = "{CORE}"', Resources(threads=3, cpus=ABSENT), 3, (CORE,)),
    ],
)
def test_the_configuration_comes_before_the_bundle(
    toml: str, wishes: Resources, threads: int, cpus: tuple
) -> None:
    """What the model's own table says holds; the rest is the bundle's, and then the agent's."""
    settings = engine_settings(config.parse(toml, "test"), "m", wishes)
    assert settings.threads == threads
    assert settings.placement == Placement(cpus)


def test_a_bundle_for_a_larger_device_serves_anywhere(caplog: pytest.LogCaptureFixture) -> None:
    """Cores that are not here are passed over with a line in the log, unless the configuration names them."""
    settings = engine_settings(config.Config(), "m", Resources(cpus=ABSENT))
    assert settings.placement == ANYWHERE
    assert ABSENT in caplog.text
    with pytest.raises(Refused, match=ABSENT):
        engine_settings(config.parse(f'[models.m]\ncpus = "{ABSENT}"', "test"), "m", NO_WISHES)


def test_resources_travel_in_the_manifest() -> None:
    """A manifest with resources has the schema that older agents refuse; one without is written as ever."""
    plain = manifest_for(FILES)
    wishes = Resources(threads=2, cpus="0-1", numa_node=0)
    asking = replace(plain, schema=manifest.schema_of(replace(plain, resources=wishes)), resources=wishes)
    assert asking.schema == 3
    assert manifest.loads(manifest.dumps(asking)) == asking
    assert b"resources" not in manifest.dumps(plain)
    with pytest.raises(ManifestError):
        manifest.dumps(replace(asking, schema=2))


@pytest.mark.parametrize("wrong", [Resources(threads=-1), Resources(cpus="1-0"), Resources(numa_node=-1)])
def test_resources_that_mean_nothing_are_refused(wrong: Resources) -> None:
    """A bundle cannot ask for fewer than no threads, or for cores that are no list."""
    with pytest.raises(ManifestError) as raised:
        manifest.dumps(replace(manifest_for(FILES), schema=3, resources=wrong))
    assert "resources." in raised.value.why
