from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from device_agent import config
from device_agent.errors import BadInput


def test_every_setting_has_a_default(tmp_path: Path) -> None:
    """An empty file gives the documented defaults, all of them on loopback."""
    path = tmp_path / "agent.toml"
    path.write_text("")
    loaded = config.load(path)
    assert loaded == config.Config()
    assert (loaded.http.host, loaded.http.port) == ("127.0.0.1", 8000)
    assert (loaded.metrics.host, loaded.metrics.port) == ("127.0.0.1", 8002)


def test_the_documented_defaults_are_the_defaults() -> None:
    """The configuration in docs/serving.md, used as it is, changes nothing."""
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    block = text.partition("These are the defaults:\n")[2].partition("\nSettings of one model")[0]
    documented = textwrap.dedent(block)
    assert "concurrent_runs" in documented
    assert config.parse(documented, "docs/serving.md") == config.Config()


def test_a_file_overrides_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    """Keys of a table replace single defaults; the rest of the table stays."""
    path = tmp_path / "agent.toml"
    path.write_text(
        'state_dir = "/data/models"\nthreads = 2\nallow_unsigned = true\n'
        "[limits]\nmax_queue_size = 7\nidle_timeout_s = 3\n[batching]\nmax_queue_delay_microseconds = 500\n"
    )
    loaded = config.load(path)
    assert loaded.state_dir == Path("/data/models")
    assert (loaded.threads, loaded.allow_unsigned) == (2, True)
    assert (loaded.limits.max_queue_size, loaded.limits.idle_timeout_s) == (7, 3.0)
    assert loaded.limits.max_body_bytes == config.Limits().max_body_bytes
    assert loaded.batching.max_queue_delay_microseconds == 500


def test_a_model_has_settings_of_its_own() -> None:
    """A table [models.NAME] changes that model; every other one has the defaults."""
    loaded = config.parse("[models.detector]\nthreads = 2\ncpus = '0-1'\nisolate = true", "agent.toml")
    assert loaded.of_model("detector") == config.ModelConfig(threads=2, cpus="0-1", isolate=True)
    assert loaded.of_model("other") == config.ModelConfig()


def test_a_model_is_batched_as_triton_users_write_it() -> None:
    """Triton's fields are read in the table of a model, with a policy for each priority level."""
    loaded = config.parse(
        "[models.detector]\nslo_ms = 50\nweight = 2\n"
        "[models.detector.batching]\npreferred_batch_size = [4, 8]\nmax_queue_delay_microseconds = 100\n"
        "priority_levels = 2\ndefault_priority_level = 2\n"
        "[models.detector.batching.default_queue_policy]\nmax_queue_size = 3\n"
        "[models.detector.batching.priority_queue_policy.1]\ntimeout_action = 'DELAY'\n",
        "agent.toml",
    )
    model = loaded.of_model("detector")
    assert (model.slo_ms, model.weight) == (50.0, 2.0)
    assert model.batching is not None
    assert model.batching.preferred_batch_size == (4, 8)
    assert [model.batching.level(asked) for asked in (0, 1, 2, 3)] == [2, 1, 2, 2]
    assert model.batching.policy(2).max_queue_size == 3
    assert model.batching.policy(1).timeout_action == "DELAY"
    assert loaded.of_model("other").batching is None


@pytest.mark.parametrize(
    ("text", "why", "fix"),
    [
        ("[http]\nunix_mode = 0o1000", "'http.unix_mode' is 512", "0o660"),
        ("[models.a]\nweight = 0", "'models.a.weight' is 0", "above zero"),
        ("[models.a]\nslo_ms = -1", "'models.a.slo_ms' is -1", "zero or more"),
        ("[batching]\npreferred_batch_size = 4", "'batching.preferred_batch_size' is 4", "a list"),
        ("[batching]\npreferred_batch_size = [0]", "'batching.preferred_batch_size'", "above zero"),
        ("[batching]\npriority_levels = 2", "'batching.default_priority_level'", "from 1 to priority_levels"),
        ("[batching.priority_queue_policy.x]", "'batching.priority_queue_policy.x'", "a whole number"),
        (
            "[batching.default_queue_policy]\ntimeout_action = 'WAIT'",
            "'batching.default_queue_policy.timeout_action'",
            "'REJECT' or 'DELAY'",
        ),
        ("models = 1", "'models' is 1", "a table"),
        ("[models]\ndetector = 1", "'models.detector' is 1", "a table"),
        ("[models.detector]\ncpu = '0'", "'models.detector.cpu' is unknown", "'models.detector.cpus'"),
        ("[models.detector]\ncpus = '1-0'", "'1-0' is not an ascending range", '"0-1,4"'),
        ("[models.detector]\nthreads = -2", "'models.detector.threads' is -2", "-1 or more"),
        ("[models.detector]\nrun_timeout_s = 0", "run_timeout_s' is 0", "above zero"),
        ("thread = 2", "'thread' is unknown", "'threads'"),
        ("[limits]\nmax_que_size = 2", "'limits.max_que_size' is unknown", "'limits.max_queue_size'"),
        ("[http]\nhots = '127.0.0.1'", "'http.hots' is unknown", "'http.host'"),
        ("threads = 'two'", "'threads' is 'two'", "a whole number"),
        ("threads = true", "'threads' is True", "a whole number"),
        ("threads = -1", "'threads' is -1", "zero or more"),
        ("allow_unsigned = 1", "'allow_unsigned' is 1", "true or false"),
        ("http = 8000", "'http' is 8000", "a table"),
        ("[http]\nport = 70000", "'http.port' is 70000", "from 0 to 65535"),
        ("[limits]\nmax_body_bytes = 0", "'limits.max_body_bytes' is 0", "above zero"),
        ("[limits]\nidle_timeout_s = inf", "'limits.idle_timeout_s' is inf", "above zero"),
        ("[http]\nhost = '0.0.0.0'", "without TLS", "127.0.0.1"),
        ("[metrics]\nhost = '192.168.1.5'", "'metrics.host'", "127.0.0.1"),
        ("[http]\nhost = 'example.org'", "'http.host'", "127.0.0.1"),
        ("threads = two\n", "line 1", "correct the line"),
    ],
)
def test_a_mistake_names_the_file_the_key_and_what_to_do(
    tmp_path: Path, text: str, why: str, fix: str
) -> None:
    """A wrong configuration is refused with exit code 2, never half-used."""
    path = tmp_path / "agent.toml"
    path.write_text(text)
    with pytest.raises(BadInput) as caught:
        config.load(path)
    assert str(path) in caught.value.what
    assert why in caught.value.why
    assert fix in caught.value.fix
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_in_every_form_is_accepted(host: str) -> None:
    """Loopback may be written as IPv4, IPv6 or by name."""
    assert config.parse(f"[http]\nhost = '{host}'", "agent.toml").http.host == host


def test_a_file_that_was_asked_for_must_exist(tmp_path: Path) -> None:
    """Naming a missing file is an error, not a silent default."""
    with pytest.raises(BadInput, match="cannot be read"):
        config.load(tmp_path / "none.toml")


def test_a_file_must_be_text(tmp_path: Path) -> None:
    """A file that is not UTF-8 is refused by name."""
    path = tmp_path / "agent.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(BadInput, match="not UTF-8"):
        config.load(path)
