"""The table of keys by PEFT version: defaults against the installed PEFT, so that an upgrade says what to add, and what
older versions are said to do, as it was read in their releases."""

from __future__ import annotations

import dataclasses
from typing import Any

import peft
import pytest
from peft import AdaLoraConfig, LoraConfig
from peft.utils import PeftType

from registry.compat import peft_versions
from registry.compat.peft_versions import (
    INITS,
    KEYS,
    TYPES,
    Dropped,
    dropped_keys,
    fused_expert_layout,
    least_peft,
    parse_peft,
    type_known,
)
from registry.core.adapter_config import AdapterConfig, adapter_config
from registry.core.content_digest import PLAIN_INITS
from registry.core.errors import InvalidInput
from registry.core.peft_keys import COMMON_KEYS, CONFIG_KEYS, KNOWN_PEFT

VERSIONS = [f"0.{minor}" for minor in range(2, 22)]


def saved(**options: Any) -> AdapterConfig:
    """The configuration as the installed PEFT would save it."""
    return adapter_config(LoraConfig(r=4, target_modules=["q_proj"], **options).to_dict())


def bare(**keys: Any) -> AdapterConfig:
    return adapter_config({"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], **keys})


def lost(config: AdapterConfig, version: str) -> dict[str, str]:
    return {one.key: one.changes for one in dropped_keys(config, version)}


# ---- against the installed PEFT


@pytest.mark.parametrize("config_class", [LoraConfig, AdaLoraConfig])
def test_defaults_are_those_of_the_installed_peft(config_class: type) -> None:
    for field in dataclasses.fields(config_class):
        if config_class is AdaLoraConfig and field.name in LoraConfig.__dataclass_fields__:
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            made = field.default_factory()
            default = dataclasses.asdict(made) if dataclasses.is_dataclass(made) else made
        assert KEYS[field.name].default == default, f"{field.name}: PEFT {peft.__version__} has {default!r}"
        assert type(KEYS[field.name].default) is type(default), field.name


def test_the_table_has_every_key_and_no_other() -> None:
    assert KEYS.keys() == CONFIG_KEYS["LORA"] | CONFIG_KEYS["ADALORA"] | COMMON_KEYS


def test_the_table_has_every_tuner() -> None:
    assert TYPES.keys() == CONFIG_KEYS.keys() | peft_versions.GONE.keys()
    assert {one.value for one in PeftType} <= TYPES.keys()


def test_an_init_that_changes_the_base_is_not_a_plain_one() -> None:
    for name, (_, changes) in INITS.items():
        assert (changes == "maths") == (name not in PLAIN_INITS), name


# ---- versions


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("0.15", (0, 15)),
        ("0.15.2", (0, 15, 2)),
        (" v0.15.2 ", (0, 15, 2)),
        ("0.18.2.dev0", (0, 18, 2)),
        ("0.18.2.dev0@6ba26b309d2e79740cdc61113147a51a0089f62a", (0, 18, 2)),
        ("0.18.2.dev0@UNKNOWN", (0, 18, 2)),
        ("0.19.0rc1", (0, 19, 0)),
        ("0.19.0.post1+cu12", (0, 19, 0)),
    ],
)
def test_a_version_is_read_as_numbers(text: str, numbers: tuple[int, ...]) -> None:
    assert parse_peft(text) == numbers


@pytest.mark.parametrize(
    "text", ["new", "", "0", "0.", ".15", "0.15.x", "latest 0.15", "0.15\n0.16", "0." + "9" * 5000]
)
def test_what_is_no_version_is_refused_with_the_mend(text: str) -> None:
    with pytest.raises(InvalidInput, match=r"write it like 0\.15") as raised:
        parse_peft(text)
    assert len(str(raised.value)) < 200


def test_versions_compare_as_numbers_and_not_as_text() -> None:
    assert parse_peft("0.9") < parse_peft("0.10") < parse_peft("0.10.1")


# ---- keys


@pytest.mark.parametrize(
    ("key", "value", "brought_by", "changes"),
    [
        ("alpha_pattern", {"q_proj": 2}, "0.6", "maths"),
        ("use_rslora", True, "0.8", "maths"),
        ("use_dora", True, "0.9", "maths"),
        ("layer_replication", [[0, 2], [1, 3]], "0.10", "maths"),
        ("exclude_modules", ["k_proj"], "0.14", "training"),
        ("lora_bias", True, "0.14", "maths"),
        ("trainable_token_indices", [1, 2], "0.15", "maths"),
        ("use_qalora", True, "0.16", "maths"),
        ("target_parameters", ["experts.down_proj"], "0.17", "maths"),
        ("alora_invocation_tokens", [5], "0.18", "maths"),
        ("use_bdlora", {"nblocks": 2}, "0.19", "maths"),
        ("velora_config", {"num_groups": 4}, "0.20", "training"),
        ("kasa_config", {"beta": 1.0}, "0.21", "maths"),
    ],
)
def test_a_key_is_lost_before_the_version_that_brought_it(key: str, value: Any, brought_by: str, changes: str) -> None:
    config = bare(**{key: value})
    for version in VERSIONS:
        found = [one for one in dropped_keys(config, version) if one.key == key]
        if parse_peft(version) >= parse_peft(brought_by):
            assert found == []
        else:
            refuses = (0, 6) <= parse_peft(version) < (0, 14)
            assert found == [Dropped(key, value, brought_by, changes, refuses)]  # type: ignore[arg-type]


def test_the_newest_known_peft_loses_nothing() -> None:
    assert dropped_keys(saved(use_dora=True, init_lora_weights="pissa"), KNOWN_PEFT) == ()


def test_a_value_that_is_the_default_is_no_loss_where_the_key_is_dropped() -> None:
    assert dropped_keys(saved(), "0.14") == ()
    assert dropped_keys(bare(use_rslora=False, layers_pattern="", alpha_pattern={}, eva_config=None), "0.5") == ()


def test_any_key_is_refused_by_the_versions_that_pass_all_keys_on() -> None:
    found = dropped_keys(saved(), "0.12")
    assert {"eva_config", "lora_bias", "peft_version"} <= {one.key for one in found}
    assert all(one.refuses and one.changes == "nothing" for one in found)


def test_a_key_of_no_peft_is_refused_as_well() -> None:
    config = bare(unsloth_extra=None)
    assert dropped_keys(config, "0.12") == (Dropped("unsloth_extra", None, None, "nothing", True),)
    assert dropped_keys(config, "0.14") == ()


def test_a_group_size_without_qalora_is_no_loss() -> None:
    assert lost(bare(qalora_group_size=32), "0.15") == {}
    assert lost(bare(qalora_group_size=32, use_qalora=True), "0.15") == {
        "qalora_group_size": "maths",
        "use_qalora": "maths",
    }


def test_excluded_modules_matter_where_a_lora_does_not_begin_as_zero() -> None:
    assert lost(bare(exclude_modules=["k_proj"], init_lora_weights=False), "0.13")["exclude_modules"] == "maths"


def test_adalora_had_rank_pattern_before_lora() -> None:
    ranks = {"rank_pattern": {"q_proj": [True, False]}}
    assert lost(adapter_config({"peft_type": "ADALORA", **ranks}), "0.5") == {}
    assert lost(bare(rank_pattern={"q_proj": 2}), "0.5") == {"rank_pattern": "maths"}


def test_of_other_tuners_the_common_keys_are_compared() -> None:
    config = adapter_config({"peft_type": "LOHA", "peft_version": "0.21.0", "use_dora": True, "r": 4})
    assert [one.key for one in dropped_keys(config, "0.10")] == ["peft_version", "use_dora"][:1]


# ---- values


@pytest.mark.parametrize("name", sorted(INITS))
def test_an_init_is_unknown_before_its_version(name: str) -> None:
    brought_by, changes = INITS[name]
    config = bare(init_lora_weights=name)
    for version in VERSIONS[1:]:
        found = dropped_keys(config, version)
        if parse_peft(version) >= parse_peft(brought_by):
            assert found == ()
        else:
            refuses = parse_peft(version) >= (0, 7)
            assert found == (Dropped("init_lora_weights", name, brought_by, changes, refuses),)


def test_a_fast_pissa_is_a_pissa() -> None:
    (found,) = dropped_keys(bare(init_lora_weights="pissa_niter_16"), "0.10")
    assert (found.brought_by, found.changes, found.refuses) == ("0.11", "maths", True)


def test_all_linear_was_an_expression_once() -> None:
    config = adapter_config({"peft_type": "LORA", "target_modules": "all-linear"})
    assert lost(config, "0.7") == {"target_modules": "maths"}
    assert lost(config, "0.8") == {}


# ---- types and the least version


@pytest.mark.parametrize(
    ("peft_type", "version", "known"),
    [
        ("LORA", "0.2", True),
        ("OFT", "0.6", False),
        ("OFT", "0.7", True),
        ("VBLORA", "0.12.0", False),
        ("VBLORA", "0.13.2", True),
        ("BONE", "0.13", False),
        ("BONE", "0.18.1", True),
        ("BONE", "0.19", False),
        ("SHADOW", "0.20", False),
        ("MADE_UP", "0.21", False),
    ],
)
def test_a_tuner_is_known_from_its_version_on(peft_type: str, version: str, known: bool) -> None:
    assert type_known(peft_type, version) is known


def test_plain_lora_needs_no_particular_peft() -> None:
    assert least_peft(saved()) is None


@pytest.mark.parametrize(
    ("options", "least"),
    [
        ({"use_dora": True}, "0.9"),
        ({"use_rslora": True, "alpha_pattern": {"q": 2}}, "0.8"),
        ({"layer_replication": [(0, 2)], "use_dora": True}, "0.10"),
        ({"init_lora_weights": "olora"}, "0.12"),
        ({"exclude_modules": ["k_proj"]}, None),
        ({"target_parameters": ["experts.down_proj"]}, "0.17"),
    ],
)
def test_the_least_peft_is_that_of_the_newest_key_that_matters(options: dict[str, Any], least: str | None) -> None:
    config = saved(**options)
    assert least_peft(config) == least
    for version in VERSIONS:
        if least is None or parse_peft(version) >= parse_peft(least):
            assert "maths" not in lost(config, version).values()
        elif version != "0.2":
            assert "maths" in lost(config, version).values()


def test_a_tuner_needs_the_version_that_brought_it() -> None:
    assert least_peft(adapter_config({"peft_type": "VERA", "r": 4})) == "0.11"
    assert least_peft(adapter_config({"peft_type": "MADE_UP"})) is None


# ---- experts


@pytest.mark.parametrize(
    ("version", "layout"),
    [
        ("0.16.0", None),
        ("nonsense", None),
        ("0.17", 0),
        ("0.18.1", 0),
        ("0.18.2.dev0@abc", 0),
        ("0.19", 1),
        ("0.19.0", 1),
        ("0.19.1", 2),
        ("0.21.2", 2),
    ],
)
def test_the_layout_of_experts_changed_twice(version: str, layout: int | None) -> None:
    assert fused_expert_layout(version) == layout
