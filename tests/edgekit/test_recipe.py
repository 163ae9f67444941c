"""The recipe: every part may be left out, nothing may be misspelt, and the command line wins."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.errors import BadInput
from edgekit.recipe import Recipe, Recover, load_recipe


def _load(tmp_path: Path, text: str, **overrides: object) -> Recipe:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return load_recipe(path, {key.replace("__", "."): value for key, value in overrides.items()})


def test_an_empty_recipe_is_a_whole_recipe(tmp_path: Path) -> None:
    """A file without a line means the same as no file: the defaults."""
    assert _load(tmp_path, "") == load_recipe(None, {}) == Recipe()


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    """An option replaces the file's value; an option that was not given does not."""
    recipe = _load(
        tmp_path, "seed = 3\n[contract]\nsize = 0.5\nmax_drop = 0.1\n", contract__size=0.2, seed=None
    )
    assert (recipe.seed, recipe.contract.size, recipe.contract.max_drop) == (3, 0.2, 0.1)


@given(
    quantile=st.sampled_from(["p50", "p95", "p99"]),
    ms=st.decimals(min_value="0.001", max_value="99999", places=3),
)
def test_latency_bounds_read_as_they_are_written(quantile: str, ms: object) -> None:
    """``p95:23ms`` means what it says, for every quantile and number."""
    bound = load_recipe(None, {"contract.latency": f"{quantile}:{ms}ms"}).contract.latency
    assert bound is not None
    assert (bound.quantile, bound.ms) == (quantile, float(ms))  # type: ignore[arg-type]


@given(recipe=st.builds(dict, size=st.floats(0.01, 1), max_drop=st.floats(0, 1)))
def test_a_recipe_survives_being_written_as_json(recipe: dict[str, float]) -> None:
    """Plain JSON of a recipe gives the same recipe again; artifacts' keys rest on that."""
    loaded = load_recipe(None, {f"contract.{key}": value for key, value in recipe.items()})
    assert Recipe.model_validate(loaded.model_dump(mode="json")) == loaded


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sead = 1", "did you mean 'seed'"),
        ("[contract]\nsizee = 0.5", "did you mean 'size'"),
        ("[quantise]\n", "did you mean 'quantize'"),
        ("[contract.latency]\nquantile = 'p95'\nms = 3\nmss = 1", "did you mean 'ms'"),
        ("[contract]\nsize = 1.5", "contract.size is wrong"),
        ("[contract]\nsize = 0", "contract.size is wrong"),
        ("[contract]\nmax_drop = -0.1", "contract.max_drop is wrong"),
        ("[contract]\nmax_drop = inf", "contract.max_drop is wrong"),
        ("[contract]\nsize = nan", "contract.size is wrong"),
        ("[contract]\nlatency = 'p90:1ms'", "p95:23ms"),
        ("[contract]\nlatency = 'p95:1s'", "p95:23ms"),
        ("[contract]\nlatency = 3", "contract.latency is wrong"),
        ("contract = 3", "contract is wrong"),
        ("[recover]\nlearning_rate = inf", "recover.learning_rate is wrong"),
        ("[recover]\nbatch_size = 1", "recover.batch_size is wrong"),
        ("[measure]\nruns = 1", "measure.runs is wrong"),
        ("[release]\nname = 'a/b'", "release.name is wrong"),
        ("[release]\nname = '../etc'", "release.name is wrong"),
        ("precision = 'int4'", "precision is wrong"),
        ("x = [", "is not TOML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, words: str) -> None:
    """A wrong key, type or number is named with its place and, where there is one, the nearest valid key."""
    with pytest.raises(BadInput) as caught:
        _load(tmp_path, text)
    assert words in str(caught.value)
    assert "recipe.toml" in caught.value.what


def test_a_wrong_section_is_an_error_under_an_option_too(tmp_path: Path) -> None:
    """``contract = 3`` in the file and ``--size`` on the command line: the file's mistake is named."""
    with pytest.raises(BadInput, match="contract is wrong"):
        _load(tmp_path, "contract = 3", contract__size=0.5)


def test_a_recipe_that_is_not_text_is_refused(tmp_path: Path) -> None:
    """A binary file instead of TOML is named as what it is."""
    (tmp_path / "recipe.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="is not TOML"):
        load_recipe(tmp_path / "recipe.toml", {})


@given(
    st.integers(0, 50),
    st.integers(1, 16),
    st.integers(0, 5),
    st.none() | st.floats(1, 1e6),
)
def test_parts_of_a_recovery_are_all_of_it(
    epochs: int, steps: int, rounded: int, budget_s: float | None
) -> None:
    """Epochs and time are shared out evenly and to the last; training through rounding comes at the end."""
    whole = Recover(epochs=epochs, quantization_aware_epochs=rounded, budget_s=budget_s)
    parts = [whole.part(number, steps) for number in range(1, steps + 1)]
    assert sum(part.epochs for part in parts) == epochs
    assert max(part.epochs for part in parts) - min(part.epochs for part in parts) <= 1
    assert [part.quantization_aware_epochs for part in parts] == [0] * (steps - 1) + [rounded]
    if budget_s is not None:
        assert sum(part.budget_s or 0.0 for part in parts) == pytest.approx(budget_s)
    assert all(part.learning_rate == whole.learning_rate for part in parts)
