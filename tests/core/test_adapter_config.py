from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from enum import StrEnum
from typing import Any

import pytest
import rfc8785
from hypothesis import example, given
from hypothesis import strategies as st

from registry.core import adapter_config as module
from registry.core.adapter_config import (
    AdapterConfig,
    adapter_config,
    alpha_of,
    canonical_config,
    config_findings,
    rank_of,
    read_adapter_config,
    scaling,
)
from registry.core.errors import InvalidConfig


def lora(**keys: Any) -> AdapterConfig:
    return adapter_config({"peft_type": "LORA", "r": 8, "lora_alpha": 16, **keys})


def read(text: str | bytes) -> AdapterConfig:
    return read_adapter_config(text if isinstance(text, bytes) else text.encode(), "walk/adapter_config.json")


# ---------------------------------------------------------------- reading


def test_a_file_of_an_early_peft_is_read_without_guessing() -> None:
    config = read(
        """{"base_model_name_or_path": "decapoda-research/llama-7b-hf", "bias": "none", "enable_lora": null,
        "fan_in_fan_out": false, "inference_mode": true, "lora_alpha": 16, "lora_dropout": 0.05,
        "merge_weights": false, "modules_to_save": null, "peft_type": "LORA", "r": 8,
        "target_modules": ["v_proj", "q_proj"], "task_type": "CAUSAL_LM"}"""
    )
    assert config.peft_version is None
    assert config.target_modules == ("q_proj", "v_proj")
    assert config.base_model == "decapoda-research/llama-7b-hf"
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 16.0, 0.05)
    assert (config.use_rslora, config.use_dora, config.lora_bias) == (False, False, False)
    assert config.init_lora_weights is None
    assert config.rank_pattern == {}
    assert config.document["target_modules"] == ["v_proj", "q_proj"], "the document stays as it was"
    assert {finding.subject: finding.severity for finding in config_findings(config)} == {
        "enable_lora": "info",
        "merge_weights": "info",
    }


def test_what_the_document_does_not_say_is_not_filled_with_defaults() -> None:
    config = read('{"peft_type": "LORA"}')
    assert config.r is config.lora_alpha is config.bias is config.target_modules is None
    assert scaling(config, "q_proj", 8) is None


def test_every_lora_field_is_typed() -> None:
    config = lora(
        target_modules=".*q_proj",
        exclude_modules=["b", "a"],
        modules_to_save=["head", "score"],
        rank_pattern={"z": 4, "a": 2},
        alpha_pattern={"a": 1},
        layers_to_transform=[3, 1],
        layers_pattern="layers",
        layer_replication=[[0, 4], [2, 5]],
        target_parameters=["experts.up", "experts.down"],
        trainable_token_indices={"embed_tokens": [7, 3]},
        init_lora_weights=True,
        revision="main",
    )
    assert config.target_modules == ".*q_proj"
    assert config.exclude_modules == ("a", "b")
    assert config.modules_to_save == ("head", "score")
    assert list(config.rank_pattern) == ["z", "a"]
    assert config.alpha_pattern == {"a": 1.0}
    assert config.layers_to_transform == (1, 3)
    assert config.layers_pattern == ("layers",)
    assert config.layer_replication == ((0, 4), (2, 5))
    assert config.target_parameters == ("experts.down", "experts.up")
    assert config.trainable_token_indices == {"embed_tokens": (7, 3)}
    assert config.init_lora_weights == "true"
    assert lora(layers_to_transform=5).layers_to_transform == (5,)
    assert lora(trainable_token_indices=[7, 3]).trainable_token_indices == (7, 3)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not the JSON"),
        ("{", "not the JSON"),
        ("[]", "expected a JSON object, found a list"),
        ("null", "found null"),
        ('{"peft_type": "LORA", "r": 8, "r": 16}', "'r' stands twice"),
        ('{"peft_type": "LORA", "lora_alpha": NaN}', "NaN is not JSON"),
        ('{"peft_type": "LORA", "lora_alpha": -Infinity}', "-Infinity is not JSON"),
        ('{"peft_type": "LORA", "lora_alpha": 1e999}', "too large"),
        ('{"peft_type": "LORA", "lora_alpha": ' + "9" * 5000 + "}", "not the JSON"),
        ('{"peft_type": "LORA", "note": "\\ud800"}', "surrogate"),
        ('{"peft_type": "LORA", "\\ud800": 1}', "surrogate"),
        (b'\xff\xfe{"peft_type": "LORA"}', "not the JSON"),
        (b'\xef\xbb\xbf{"peft_type": "LORA"}', "not the JSON"),
        (b'{"peft_type": "\xe9"}', "not the JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"peft_type": "LORA", "a": ' + "[" * 40 + "]" * 40 + "}", "nested more than 32 deep"),
        ("{}", "'peft_type' must be text like LORA, found null"),
        ('{"peft_type": 5}', "'peft_type' must be text like LORA, found an integer"),
        ('{"peft_type": ""}', "'peft_type' must be text"),
    ],
)
def test_what_is_no_configuration_is_refused_in_one_line(text: str | bytes, says: str) -> None:
    with pytest.raises(InvalidConfig) as refused:
        read(text)
    message = str(refused.value)
    assert says in message
    assert message.startswith("walk/adapter_config.json: ")
    assert "\n" not in message
    assert len(message) < 300


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("r", "8", "a whole number from 1 to 2147483647, found text: '8'"),
        ("r", 8.0, "a whole number from 1 to 2147483647, found a number: 8.0"),
        ("r", True, "found a flag: True"),
        ("r", 0, "found an integer: 0"),
        ("r", 2**31, "found an integer"),
        ("lora_alpha", "16", "a number, found text"),
        ("lora_alpha", [16], "a number, found a list"),
        ("lora_alpha", 10**400, "a number, found an integer"),
        ("use_rslora", "true", "true or false, found text"),
        ("use_dora", 1, "true or false, found an integer"),
        ("bias", None, None),
        ("bias", 3, "text, found an integer"),
        ("bias", "no\0ne", "text, found text"),
        ("init_lora_weights", 3, "text or a flag, found an integer"),
        ("target_modules", [1], "a list of texts or one text, found a list: [1]"),
        ("target_modules", {"q": 1}, "found an object"),
        ("modules_to_save", "head", "a list of texts, found text: 'head'"),
        ("rank_pattern", {"q": "4"}, "an object of whole numbers from 1 to 2147483647, found an object"),
        ("rank_pattern", [4], "found a list"),
        ("alpha_pattern", {"q": None}, "an object of numbers, found an object"),
        ("layers_to_transform", "1", "a list of whole numbers or one, found text"),
        ("layer_replication", [[1, 2, 3]], "a list of pairs of whole numbers"),
        ("trainable_token_indices", {"emb": 3}, "a list of token numbers"),
        ("target_parameters", "experts.up", "a list of texts, found text"),
        ("peft_version", 0.18, "text, found a number: 0.18"),
        ("base_model_name_or_path", ["x"], "text, found a list"),
        ("task_type", 1, "text, found an integer"),
    ],
)
def test_a_value_of_another_type_names_key_expectation_and_finding(key: str, value: Any, says: str | None) -> None:
    if says is None:
        assert getattr(lora(**{key: value}), key) is None
        return
    with pytest.raises(InvalidConfig) as refused:
        lora(**{key: value})
    assert f"key '{key}' must be" in str(refused.value)
    assert says in str(refused.value)
    assert len(str(refused.value)) < 300


def test_a_configuration_larger_than_the_limit_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 20)
    with pytest.raises(InvalidConfig, match="24 bytes"):
        read('{"peft_type": "LORA"    ')


def test_recursion_errors_never_escape() -> None:
    nested: dict[str, Any] = {"peft_type": "LORA"}
    inner = nested
    for _ in range(sys.getrecursionlimit()):
        inner["a"] = {}
        inner = inner["a"]
    with pytest.raises(InvalidConfig, match="nested more than 32 deep"):
        adapter_config(nested)


@pytest.mark.parametrize(
    "document",
    [
        {"peft_type": "ADALORA", "rank_pattern": {"q.lora_E": [True, False]}, "r": 8},
        {"peft_type": "OFT", "r": 0, "bias": "none"},
        {"peft_type": "GLORA", "r": 4, "bias": 3},
        {"peft_type": "FROM_TOMORROW", "target_modules": {"q": 1}, "modules_to_save": 3},
    ],
)
def test_keys_that_mean_something_else_to_another_tuner_do_not_refuse_it(document: dict[str, Any]) -> None:
    config = adapter_config(document)
    assert config.document == document
    assert config.rank_pattern == {}


def test_the_targets_of_every_known_tuner_are_checked() -> None:
    with pytest.raises(InvalidConfig, match="target_modules"):
        adapter_config({"peft_type": "IA3", "target_modules": 5})


class Kind(StrEnum):
    LORA = "LORA"


def test_a_live_mapping_becomes_json() -> None:
    live = {
        "peft_type": Kind.LORA,
        "r": 8,
        "target_modules": {"v", "q"},
        "layer_replication": [(0, 4)],
        "alpha_pattern": {},
    }
    config = adapter_config(live)
    assert config.document == {
        "peft_type": "LORA",
        "r": 8,
        "target_modules": ["q", "v"],
        "layer_replication": [[0, 4]],
        "alpha_pattern": {},
    }
    assert type(config.document["peft_type"]) is str
    assert config == read(json.dumps(config.document))
    live["alpha_pattern"]["q"] = 3
    assert config.alpha_pattern == {}, "it is a copy"


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (object(), "a object, which JSON cannot"),
        (math.nan, "holds nan"),
        (b"x", "a bytes"),
        ({3: "x"}, "whose keys are not all text"),
        ([math.inf], "holds inf"),
    ],
)
def test_a_live_value_that_json_cannot_hold_is_refused(value: object, says: str) -> None:
    with pytest.raises(InvalidConfig, match=says) as refused:
        lora(megatron_config=value)
    assert "'megatron_config'" in str(refused.value)


# ---------------------------------------------------------------- ranks and scalings


@pytest.mark.parametrize(
    ("options", "path", "rank", "expected"),
    [
        ({}, "a.q", 8, 2.0),
        ({}, "a.q", 4, 4.0),
        ({"use_rslora": True}, "a.q", 4, 8.0),
        ({"alpha_pattern": {"q": 4}}, "a.q", 8, 0.5),
        ({"alpha_pattern": {"q": 4}}, "a.kq", 8, 2.0),
        ({"alpha_pattern": {"^q": 4}}, "a.q", 8, 2.0),
        ({"alpha_pattern": {"a.q": 4, "q": 100}}, "a.q", 8, 0.5),
        ({"alpha_pattern": {"q": 100, "a.q": 4}}, "a.q", 8, 12.5),
        ({"alpha_pattern": {r".*\.(q|k)": 4}}, "b.a.k", 8, 0.5),
        ({"alpha_pattern": {"q(?=x)": 4}}, "a.q", 8, None),
        ({"lora_alpha": None}, "a.q", 8, None),
        ({"lora_alpha": None, "alpha_pattern": {"q": 4}}, "a.q", 8, 0.5),
        ({"lora_alpha": 0}, "a.q", 8, 0.0),
        ({}, "a.q", 0, None),
        ({"peft_type": "LOHA"}, "a.q", 8, None),
    ],
)
def test_scaling_is_alpha_over_rank(options: dict[str, Any], path: str, rank: int, expected: float | None) -> None:
    assert scaling(lora(**options), path, rank) == expected


def test_the_first_key_that_matches_gives_the_rank() -> None:
    config = lora(rank_pattern={r"layers\.\d\.q": 3, "q": 4}, alpha_pattern={"k": 5})
    assert rank_of(config, "layers.0.q") == 3
    assert rank_of(config, "layers.10.q") == 4
    assert rank_of(config, "layers.0.v") == 8
    assert alpha_of(config, "layers.0.k") == 5.0
    assert rank_of(lora(rank_pattern={"(?i)q": 3}), "q") is None


# ---------------------------------------------------------------- the canonical form


def test_the_order_of_sets_and_of_keys_and_what_the_session_adds_do_not_matter() -> None:
    one = lora(target_modules=["q", "v"], modules_to_save=["a", "b"], peft_version="0.21.2", inference_mode=False)
    other = adapter_config(
        {
            "auto_mapping": {"base_model_class": "Mlp"},
            "inference_mode": True,
            "modules_to_save": ["b", "a"],
            "target_modules": ["v", "q", "v"],
            "lora_alpha": 16,
            "r": 8,
            "peft_type": "LORA",
            "peft_version": "0.20.0",
        }
    )
    assert rfc8785.dumps(canonical_config(one)) == rfc8785.dumps(canonical_config(other))


def test_order_is_kept_where_it_means_something() -> None:
    keys = {"trainable_token_indices": [7, 3], "layer_replication": [[2, 4], [0, 1]], "alora_invocation_tokens": [9, 1]}
    canonical = canonical_config(lora(**keys))
    assert {key: canonical[key] for key in keys} == keys


def test_unknown_keys_and_nulls_stay() -> None:
    canonical = canonical_config(lora(new_method={"b": [2, 1]}, megatron_core=None))
    assert canonical["new_method"] == {"b": [2, 1]}
    assert canonical["megatron_core"] is None


def test_integers_that_canonical_json_cannot_write_become_text() -> None:
    canonical = canonical_config(lora(seed=2**64 - 1, seeds=[-(2**53), 2**53 - 1]))
    assert canonical["seed"] == "18446744073709551615"
    assert canonical["seeds"] == ["-9007199254740992", 2**53 - 1]
    rfc8785.dumps(canonical)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@example({"seed": 2.0**53, "seeds": [1e21, 2**70]})
@example({"target_modules": [None, 2**53, 1, 1.0, True, -0.0, 0]})
@given(st.dictionaries(st.sampled_from(["target_modules", "seed", "note", "peft_version"]) | st.text(), JSON))
def test_whatever_is_read_has_a_canonical_form_that_reads_as_itself(document: dict[str, Any]) -> None:
    try:
        config = read_adapter_config(json.dumps({**document, "peft_type": "X"}).encode(), "config")
    except InvalidConfig:
        return
    text = rfc8785.dumps(canonical_config(config))
    assert rfc8785.dumps(canonical_config(read_adapter_config(text, "config"))) == text
    config_findings(config)


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_bytes_are_read_or_refused(raw: bytes) -> None:
    with contextlib.suppress(InvalidConfig):
        read_adapter_config(raw, "config")


# ---------------------------------------------------------------- findings


def codes(config: AdapterConfig) -> dict[str, str]:
    return {f"{finding.code} {finding.subject}": finding.severity for finding in config_findings(config)}


def test_a_plain_configuration_has_no_findings() -> None:
    assert codes(lora(target_modules=["q"], peft_version="0.21.2", corda_config=None)) == {}


def test_an_unknown_type_is_one_error_and_its_keys_are_not_judged() -> None:
    (finding,) = config_findings(adapter_config({"peft_type": "FROM_TOMORROW", "k": 3, "peft_version": "0.30.0"}))
    assert (finding.code, finding.severity, finding.found) == ("C01", "error", "'FROM_TOMORROW'")
    assert "PEFT 0.30.0" in finding.mend


def test_a_retired_type_names_its_successor() -> None:
    (finding,) = config_findings(adapter_config({"peft_type": "BONE"}))
    assert finding.code == "C01"
    assert "MISS" in finding.mend


def test_a_type_in_lower_case_is_one_that_peft_does_not_know() -> None:
    config = adapter_config({"peft_type": "lora", "r": 8})
    assert config.peft_type == "LORA"
    (finding,) = config_findings(config)
    assert finding.code == "C01"
    assert finding.mend.endswith("LORA")


@pytest.mark.parametrize("value", [None, False, 0, 0.0, "", [], {}])
def test_an_unknown_key_that_is_off_is_only_mentioned(value: object) -> None:
    assert codes(lora(use_newmethod=value)) == {"C02 use_newmethod": "info"}


@pytest.mark.parametrize("value", [True, 1, 0.5, "x", [0], {"a": None}])
def test_an_unknown_key_that_is_on_is_an_error(value: object) -> None:
    assert codes(lora(use_newmethod=value)) == {"C02 use_newmethod": "error"}


def test_a_key_of_another_tuner_is_unknown_here() -> None:
    assert codes(lora(vera_dropout=0.5)) == {"C02 vera_dropout": "error"}


def test_a_thousand_unknown_keys_are_twenty_findings_and_a_count() -> None:
    found = config_findings(lora(**{f"new_{number}": 1 for number in range(1000)}))
    assert len(found) == module.MAX_FINDINGS_EACH + 1
    assert found[-1].message.startswith("980 more")
    assert found[-1].severity == "error"


def test_a_pattern_that_is_not_evaluated_is_a_warning() -> None:
    config = lora(rank_pattern={"(?i)q": 3, "v": 2}, alpha_pattern={"(": 3})
    assert codes(config) == {"C11 rank_pattern['(?i)q']": "warning", "C11 alpha_pattern['(']": "warning"}


def test_hostile_patterns_do_not_hold_up_a_push() -> None:
    started = time.process_time()
    config = lora(
        rank_pattern={f"(a|a)*(a+)+{number}": 3 for number in range(3000)},
        alpha_pattern={f"{'(a*)*' * 90}{number}": 3 for number in range(3000)},
    )
    config_findings(config)
    for number in range(1000):
        scaling(config, f"layers.{number}." + "a" * 200, 8)
        rank_of(config, f"layers.{number}." + "a" * 200)
    assert time.process_time() - started < 20
