"""Profiles: strict, sourced, and the same after an export."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit import profile
from edgekit.errors import BadInput

PRECISIONS = list(profile.PRECISIONS)

_texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
_positive = st.floats(min_value=1e-3, max_value=1e18, allow_nan=False)
_counts = st.integers(min_value=1, max_value=2**40)


@st.composite
def profiles(draw: st.DrawFn) -> profile.Profile:
    """Any valid profile."""
    precisions = draw(st.lists(st.sampled_from(PRECISIONS), min_size=1, unique=True))
    runtime = draw(st.sampled_from(["onnxruntime", "tensorrt", "tensorrt_rtx"]))
    return profile.Profile.model_validate(
        {
            "name": draw(st.from_regex(r"[a-z0-9][a-z0-9-]{0,20}", fullmatch=True)),
            "description": draw(_texts),
            "architecture": draw(st.sampled_from(["x86_64", "aarch64"])),
            "highest_opset": draw(st.integers(13, 30)),
            "python": ">=3.8,<3.9",
            "precisions": precisions,
            "accelerator": {
                "kind": draw(st.sampled_from(["cpu", "gpu"])),
                "name": draw(_texts),
                "sm": None if runtime == "onnxruntime" else draw(_counts),
                "cores": draw(_counts),
                "clock_mhz": draw(_positive),
                "ops_per_cycle": draw(st.dictionaries(st.sampled_from(PRECISIONS), _positive)),
                "source": draw(_texts),
            },
            "runtime": {"name": runtime, "versions": "==8.5.2.*"},
            "memory": {
                "size_bytes": draw(_counts),
                "bandwidth_bytes_per_second": draw(_positive),
                "source": draw(_texts),
            },
            "alignment": {precision: draw(_counts) for precision in precisions},
            "peak": {p: {"ops_per_second": draw(_positive), "source": draw(_texts)} for p in precisions},
            "power_modes": draw(
                st.lists(
                    st.fixed_dictionaries({"name": _texts, "watts": st.none() | _positive, "source": _texts}),
                    max_size=3,
                )
            ),
        }
    )


def exported(name: str = "x86-cpu") -> str:
    """A profile that ships, as text to be spoilt."""
    return profile.to_toml(profile.load(name))


def refused(path: Path, text: str) -> list[str]:
    """Load a spoilt profile; the three lines of the error."""
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BadInput) as caught:
        profile.load(path)
    assert caught.value.exit_code == 2
    return str(caught.value).splitlines()


@pytest.mark.parametrize("name", profile.names())
def test_shipped_profiles_are_plausible_and_named_after_their_file(name: str) -> None:
    """Every profile that ships loads by its file's name, and its peaks fit cores x clock."""
    found = profile.validate(name)
    assert found.name == name
    assert set(found.peak) == set(found.accelerator.ops_per_cycle)


def test_the_promised_devices_ship() -> None:
    """The devices of the documentation are there, with the runtime that their JetPack brings."""
    assert set(profile.names()) >= {
        "jetson-nano", "jetson-tx2", "jetson-xavier-nx", "jetson-agx-xavier", "jetson-orin-nano",
        "jetson-orin-nx", "jetson-agx-orin", "jetson-thor", "rtx-a2000", "rtx-4000-ada", "rtx-pro-blackwell",
        "dgx-spark", "t4", "a100", "h100", "amd-mi300", "x86-cpu", "x86-cpu-avx2", "arm64-cpu",
        "raspberry-pi-5",
    }  # fmt: skip
    xavier = profile.load("jetson-agx-xavier")
    assert (xavier.accelerator.sm, xavier.highest_opset, xavier.runtime.versions) == (72, 17, "==8.5.2.*")
    assert profile.load("jetson-agx-orin").accelerator.sm == 87
    assert profile.load("amd-mi300").runtime.executed is None


@pytest.mark.parametrize("base", ["jetson-agx-orin", "jetson-orin-nx", "jetson-orin-nano"])
def test_a_jetpack_changes_the_runtime_and_nothing_of_the_chip(base: str) -> None:
    """One module, four JetPacks: TensorRT, opset and Python differ; figures do not."""
    variants = [profile.load(name) for name in (base, f"{base}-jp5", f"{base}-jp60", f"{base}-jp7")]
    assert (
        len({variant.model_dump_json(include={"accelerator", "peak", "memory"}) for variant in variants}) == 1
    )
    assert [variant.runtime.versions for variant in variants] == [
        "==10.3.*", "==8.5.2.*", "==8.6.2.*", "==11.4.*",
    ]  # fmt: skip


def test_a_profile_of_ones_own_may_extend_one_that_ships(tmp_path: Path) -> None:
    """Only what differs has to be said; everything else is the base's, table by table."""
    path = tmp_path / "mine.toml"
    path.write_text('extends = "jetson-orin-nx"\nname = "mine"\n[memory]\nsize_bytes = 8589934592\n')
    mine, base = profile.load(path), profile.load("jetson-orin-nx")
    assert (mine.name, mine.memory.size_bytes) == ("mine", 8 << 30)
    assert mine.memory.bandwidth_bytes_per_second == base.memory.bandwidth_bytes_per_second
    assert mine.dla == base.dla


@pytest.mark.parametrize(
    ("base", "fix"), [("jetson-orin-n", "jetson-orin-n"), ("raspberry-pi-5", "arm64-cpu")]
)
def test_only_a_whole_profile_that_ships_can_be_extended(tmp_path: Path, base: str, fix: str) -> None:
    """A misspelt base gets a suggestion; a base that extends another one is refused, so there is no chain."""
    lines = refused(tmp_path / "mine.toml", f'extends = "{base}"\nname = "mine"\n')
    assert f"extends '{base}'" in lines[0]
    assert fix in lines[2]


@given(profiles())
def test_an_export_loads_as_the_same_profile(
    tmp_path_factory: pytest.TempPathFactory, made: profile.Profile
) -> None:
    """What ``profiles export`` prints is a file that means exactly the same device."""
    path = tmp_path_factory.getbasetemp() / "export.toml"
    path.write_text(profile.to_toml(made), encoding="utf-8")
    assert profile.load(path) == made
    assert profile.digest(profile.load(path)) == profile.digest(made)


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    """Comments and order do not change a profile's identity; a figure does."""
    original = profile.load("x86-cpu")
    path = tmp_path / "same.toml"
    path.write_text("# a note\n\n" + exported().replace("clock_mhz = 2200.0", "clock_mhz = 2200"), "utf-8")
    assert profile.digest(profile.load(path)) == profile.digest(original)
    path.write_text(exported().replace("clock_mhz = 2200.0", "clock_mhz = 2300.0"), "utf-8")
    assert profile.digest(profile.load(path)) != profile.digest(original)


@pytest.mark.parametrize(
    ("right", "wrong", "dotted", "suggestion"),
    [
        ("architecture =", "architcture =", "architcture", "architecture"),
        ("cores = 2", "coers = 2", "accelerator.coers", "cores"),
        ("[memory]", "[memroy]", "memroy", "memory"),
        ("versions =", "version =", "runtime.version", "versions"),
        ("[peak.int8]", "[peak.int4]", "peak.int4", "int8"),
        ("[alignment]\nfp32", "[alignment]\nfp33", "alignment.fp33", "fp32"),
    ],
)
def test_a_misspelt_key_is_named_with_the_nearest_valid_one(
    tmp_path: Path, right: str, wrong: str, dotted: str, suggestion: str
) -> None:
    """A typing error is reported with file, key and the key that was probably meant."""
    text = exported()
    assert right in text
    path = tmp_path / "mine.toml"
    what, _, fix = refused(path, text.replace(right, wrong, 1))
    assert str(path) in what
    assert f"'{dotted}'" in what
    assert fix == f"did you mean '{suggestion}'?"


@given(st.data())
def test_no_misspelt_key_is_ever_ignored(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whichever key is misspelt and however, the profile is refused."""
    lines = exported("jetson-agx-orin").splitlines()
    index = data.draw(st.sampled_from([i for i, line in enumerate(lines) if " = " in line]))
    key = lines[index].split(" = ")[0]
    letter = data.draw(st.integers(0, len(key) - 1))
    misspelt = key[:letter] + data.draw(st.sampled_from(["", "x", "q_"])) + key[letter + 1 :]
    siblings = [line.split(" = ")[0] for line in lines if " = " in line]
    if misspelt in siblings or not misspelt:
        return
    lines[index] = lines[index].replace(key, misspelt, 1)
    assert refused(tmp_path_factory.getbasetemp() / "misspelt.toml", "\n".join(lines))


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("cores = 2", 'cores = "2"', "accelerator.cores"),
        ("cores = 2", "cores = true", "accelerator.cores"),
        ("cores = 2", "cores = 0", "accelerator.cores"),
        ("highest_opset = 21", "highest_opset = 9", "highest_opset"),
        ('versions = ">=1.19"', 'versions = "1.19 or so"', "runtime.versions"),
        ("clock_mhz = 2200.0", "clock_mhz = nan", "accelerator.clock_mhz"),
        ('kind = "cpu"', 'kind = "npu"', "accelerator.kind"),
        ('source = "computed in fp32', 'source = ""#', "peak.fp16.source"),
        ("int8 = 16\n", "\n", "alignment says nothing about int8"),
        ('name = "onnxruntime"', 'name = "tensorrt"', "accelerator.sm"),
    ],
)
def test_a_wrong_value_is_named(tmp_path: Path, right: str, wrong: str, said: str) -> None:
    """Wrong types, impossible figures and contradictions are refused with the key that holds them."""
    text = exported()
    assert right in text
    assert said in "\n".join(refused(tmp_path / "mine.toml", text.replace(right, wrong, 1)))


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    """A profile that leaves something out is refused with what it leaves out."""
    what, _, _ = refused(tmp_path / "mine.toml", exported().replace("highest_opset = 21\n", ""))
    assert what.endswith("lacks the key 'highest_opset'")


def test_an_implausible_peak_is_refused_by_validate_only(tmp_path: Path) -> None:
    """``profiles validate`` finds a figure that cores x clock cannot reach; loading does not compute."""
    path = tmp_path / "boast.toml"
    path.write_text(exported().replace("ops_per_second = 563200000000.0", "ops_per_second = 5.6e12"), "utf-8")
    assert profile.load(path).peak["int8"].ops_per_second == 5.6e12
    with pytest.raises(BadInput, match=r"peak\.int8\.ops_per_second"):
        profile.validate(path)


def test_an_implausible_bandwidth_is_refused_by_validate(tmp_path: Path) -> None:
    """``profiles validate`` also computes what the memory's bus can carry."""
    path = tmp_path / "wide.toml"
    path.write_text(exported("jetson-agx-orin").replace("= 204800000000.0", "= 408e9"), "utf-8")
    with pytest.raises(BadInput, match="bandwidth_bytes_per_second"):
        profile.validate(path)


def test_an_unknown_name_suggests_the_nearest() -> None:
    """A misspelt ``--profile`` is answered with the name that was probably meant."""
    with pytest.raises(BadInput, match="did you mean 'jetson-agx-orin'"):
        profile.load("jetson-agx-orion")


@pytest.mark.parametrize("content", [b"name = ", b"\xff\xfe\x00", b"[a]\n[a]\n"])
def test_a_file_that_is_not_toml_is_refused(tmp_path: Path, content: bytes) -> None:
    """Anything but TOML ends in a clear error."""
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"broken\.toml"):
        profile.load(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    """A path to nothing is reported as such."""
    with pytest.raises(BadInput, match="cannot be read"):
        profile.load(tmp_path / "none.toml")


def test_the_documentation_names_every_key_and_profile() -> None:
    """docs/profiles.md, to which errors refer, leaves nothing out."""
    page = (Path(__file__).parents[2] / "docs" / "profiles.md").read_text(encoding="utf-8")
    tables = (profile.Accelerator, profile.Runtime, profile.Memory, profile.Dla)
    keys = [key for table in tables for key in table.model_fields]
    for key in ["extends", *profile.Profile.model_fields, *keys, *profile.names()]:
        assert key in page
