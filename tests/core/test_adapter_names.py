from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.core.adapter_config import MAX_FINDINGS_EACH, AdapterConfig, adapter_config
from registry.core.adapter_names import (
    Target,
    base_name,
    canonical_name,
    is_adapter_tensor,
    target_scaling,
    targets_of,
)
from registry.core.layout import Layout, TensorSpec
from registry.core.peft_keys import CONTAINERS


def layout(**shapes: tuple[int, ...]) -> Layout:
    """Keyword names with `__` for a dot, under PEFT's prefix."""
    return Layout(
        tuple(TensorSpec("base_model.model." + name.replace("__", "."), "F32", shape) for name, shape in shapes.items())
    )


def pair(module: str, rank: int = 4, inside: int = 6, out: int = 8) -> dict[str, tuple[int, ...]]:
    return {f"{module}__lora_A__weight": (rank, inside), f"{module}__lora_B__weight": (out, rank)}


def lora(**keys: Any) -> AdapterConfig:
    return adapter_config({"peft_type": "LORA", "r": 4, "lora_alpha": 8, **keys})


def codes(found: Layout, config: AdapterConfig | None) -> list[str]:
    return [f"{finding.code} {finding.severity} {finding.subject}" for finding in targets_of(found, config)[1]]


# ---------------------------------------------------------------- single names


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("base_model.model.x.q.lora_A.default.weight", "x.q.lora_A.weight"),
        ("base_model.model.x.q.lora_A.weight", "x.q.lora_A.weight"),
        ("x.q.lora_A.weight", "x.q.lora_A.weight"),
        ("base_model.model.base_model.model.x.q.lora_A.weight", "x.q.lora_A.weight"),
        ("_orig_mod.base_model.model.x.q.lora_A.weight", "x.q.lora_A.weight"),
        ("base_model.model._orig_mod.x.q.lora_A.weight", "x.q.lora_A.weight"),
        ("module._orig_mod.module.base_model.model.x.q.lora_B.walk.bias", "x.q.lora_B.bias"),
        ("_fsdp_wrapped_module.base_model.model.x._checkpoint_wrapped_module.q.lora_A.weight", "x.q.lora_A.weight"),
        ("base_model.model.model.q.lora_A.0.weight", "model.q.lora_A.weight"),
        ("base_model.model.e.lora_embedding_A.default", "e.lora_embedding_A"),
        ("base_model.model.e.lora_embedding_A.weight", "e.lora_embedding_A"),
        ("q.lora_magnitude_vector.default.weight", "q.lora_magnitude_vector"),
        ("q.lora_magnitude_vector.default", "q.lora_magnitude_vector"),
        ("q.lora_magnitude_vector.weight", "q.lora_magnitude_vector"),
        ("q.lora_magnitude_vector", "q.lora_magnitude_vector"),
        ("base_model.model.head.modules_to_save.default.0.weight", "head.0.weight"),
        ("base_model.model.head.modules_to_save.weight", "head.weight"),
        ("base_model.model.e.token_adapter.trainable_tokens_delta.default", "e.token_adapter.trainable_tokens_delta"),
        ("base_model.model.experts.base_layer.lora_A.default.weight", "experts.base_layer.lora_A.weight"),
        ("base_model.model.q.lora_E.default", "q.lora_E"),
        ("base_model.model.q.lora_A.default", "q.lora_A"),
        ("base_model.vera_A.default", "base_model.vera_A"),
        ("base_model.frod_V.a_b.default", "base_model.frod_V.a_b"),
        ("base_model.frod_V.a_b", "base_model.frod_V.a_b"),
        ("q.peanut_encoders.default.0.weight", "q.peanut_encoders.0.weight"),
        ("q.peanut_encoders.0.weight", "q.peanut_encoders.0.weight"),
        ("base_model.shadow_backbone.walk.norm.weight", "base_model.shadow_backbone.default.norm.weight"),
        ("x.q.weight", "x.q.weight"),
        ("module", "module"),
        ("base_model.model", "base_model.model"),
        ("", ""),
    ],
)
def test_wrappers_and_adapter_names_are_taken_out(name: str, canonical: str) -> None:
    assert canonical_name(name) == canonical
    assert canonical_name(canonical) == canonical


@pytest.mark.parametrize(
    ("name", "adapter", "canonical"),
    [
        ("q.lora_A.walk.weight", "walk", "q.lora_A.weight"),
        ("q.lora_A.walk.weight", "run", "q.lora_A.walk.weight"),
        ("q.lora_A.weight.weight", "weight", "q.lora_A.weight"),
        ("q.lora_A.weight", "weight", "q.lora_A.weight"),
        ("e.lora_embedding_A.walk", "run", "e.lora_embedding_A.walk"),
        ("q.lora_magnitude_vector.walk.weight", "run", "q.lora_magnitude_vector.walk.weight"),
        ("head.modules_to_save.walk.weight", "run", "head.modules_to_save.walk.weight"),
        ("head.modules_to_save.walk.weight", "walk", "head.weight"),
        ("base_model.frod_V.a.walk", "walk", "base_model.frod_V.a"),
        ("default.lora_A.default.weight", "default", "default.lora_A.weight"),
    ],
)
def test_only_the_named_adapter_is_taken_out(name: str, adapter: str, canonical: str) -> None:
    assert canonical_name(name, adapter) == canonical


WRAPPERS = ("base_model", "model", "module", "_orig_mod", "base_layer", "modules_to_save", "original_module")
PARTS = ("lora_A", "lora_embedding_B", "lora_magnitude_vector", "vera_A", "frod_V", "tinylora_v")
SEGMENTS = st.sampled_from((*WRAPPERS, *PARTS, "q", "weight", "bias", "default", "0"))


@given(st.lists(SEGMENTS, min_size=1, max_size=8).map(".".join))
def test_any_name_has_a_canonical_form_that_is_not_longer(name: str) -> None:
    assert len(canonical_name(name)) <= len(name)
    assert len(base_name(name)) <= len(name)
    assert isinstance(is_adapter_tensor(name), bool)


@pytest.mark.parametrize("container", sorted(CONTAINERS))
def test_every_tuner_part_is_an_adapter_tensor(container: str) -> None:
    assert is_adapter_tensor(f"base_model.model.q.{container}.default.weight")
    assert is_adapter_tensor(f"q.{container}")


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.q.base_layer.weight",
        "base_model.model.head.original_module.weight",
        "base_model.model.e.token_adapter.base_layer.weight",
        "lora_model.base_model.model.q.base_layer.weight",
        "road_encoder.0.weight",
        "poly_head.weight",
        "shadow_map.weight",
        "prompt_encoder.mask_embed.conv1.weight",
        "sam.prompt_encoder.shared_embedding.positional_embedding",
        "q.weight",
        "",
    ],
)
def test_a_tensor_of_a_base_is_no_adapter_tensor(name: str) -> None:
    assert not is_adapter_tensor(name)


@pytest.mark.parametrize(
    "name",
    [
        "prompt_embeddings",
        "prompt_encoder.default.embedding.weight",
        "base_model.model.head.modules_to_save.default.weight",
        "base_model.model.e.token_adapter.trainable_tokens_delta",
    ],
)
def test_prompts_copies_and_tokens_are_adapter_tensors(name: str) -> None:
    assert is_adapter_tensor(name)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("base_model.model.q.base_layer.weight", "q.weight"),
        ("module.base_model.model.head.original_module.0.bias", "head.0.bias"),
        ("base_model.model.e.token_adapter.base_layer.weight", "e.weight"),
        ("base_model.model.mha.base_layer.out_proj.base_layer.weight", "mha.out_proj.weight"),
        ("base_model.model.experts.base_layer.base_layer.up", "experts.up"),
        ("base_model.model.layers._orig_mod.0.q.weight", "layers.0.q.weight"),
        ("base_layer.0.weight", "base_layer.0.weight"),
        ("base_model.model.base_layer.0.base_layer.weight", "base_layer.0.weight"),
        ("q.weight", "q.weight"),
    ],
)
def test_the_base_has_its_own_names(name: str, plain: str) -> None:
    assert base_name(name) == plain


# ---------------------------------------------------------------- targets


def test_a_pair_is_a_linear_target() -> None:
    targets, findings = targets_of(layout(**pair("b__q"), **pair("a__q", 2, 3, 5)), None)
    assert targets == (Target("a.q", 2, 3, 5, "linear"), Target("b.q", 4, 6, 8, "linear"))
    assert findings == ()


def test_other_tuners_are_not_taken_apart() -> None:
    assert targets_of(layout(**pair("q")), adapter_config({"peft_type": "ADALORA"})) == ((), ())


@pytest.mark.parametrize("gone", ["lora_A", "lora_B"])
def test_half_a_pair_is_named(gone: str) -> None:
    parts = {name: shape for name, shape in pair("q").items() if gone not in name}
    targets, (finding,) = targets_of(layout(**parts, **pair("v")), lora())
    assert [target.module for target in targets] == ["v"]
    assert (finding.code, finding.severity, finding.subject) == ("C06", "error", "q")
    assert finding.expected.startswith(gone)


def test_a_magnitude_vector_alone_is_named() -> None:
    assert codes(layout(q__lora_magnitude_vector=(8,)), lora(use_dora=True)) == ["C06 error q"]


@pytest.mark.parametrize(
    "parts",
    [
        {"q__lora_A__weight": (4, 6), "q__lora_B__weight": (8, 3)},
        {"q__lora_A__weight": (4, 6, 3), "q__lora_B__weight": (8, 3, 1)},
        {"q__lora_A__weight": (4, 6, 3), "q__lora_B__weight": (8, 4, 2)},
        {"q__lora_embedding_A": (4, 6), "q__lora_embedding_B": (8, 3)},
    ],
)
def test_a_and_b_of_two_ranks_are_no_target(parts: dict[str, tuple[int, ...]]) -> None:
    assert targets_of(layout(**parts), lora())[0] == ()
    assert codes(layout(**parts), lora()) == ["C09 error q"]


@pytest.mark.parametrize(
    "parts",
    [
        {"q__lora_A__weight": (24,), "q__lora_B__weight": (32,)},
        {"q__lora_A__weight": (), "q__lora_B__weight": ()},
        {"q__lora_A__weight": (4, 6), "q__lora_B__weight": (0, 4)},
        {"q__lora_A__weight": (4, 6), "q__lora_B__weight": (8, 4, 1)},
        {"q__lora_A__weight": (4, 6, 1, 1, 1, 1), "q__lora_B__weight": (8, 4, 1, 1, 1, 1)},
        {"q__lora_A__weight": (2**40, 6), "q__lora_B__weight": (8, 2**40)},
        {"q__lora_embedding_A": (4,), "q__lora_embedding_B": (8, 4)},
    ],
)
def test_what_are_no_factors_is_named(parts: dict[str, tuple[int, ...]]) -> None:
    targets, (finding,) = targets_of(layout(**parts), lora())
    assert targets == ()
    assert (finding.code, finding.severity, finding.subject) == ("C08", "error", "q")
    assert str(list(parts[next(iter(parts))])) in finding.found


def test_a_rank_that_the_configuration_does_not_say_is_an_error_and_still_a_target() -> None:
    found = layout(**pair("q", 4), **pair("v", 2), **pair("k", 3))
    config = lora(rank_pattern={"v": 2, "k": 5})
    targets, (finding,) = targets_of(found, config)
    assert {target.module: target.rank for target in targets} == {"q": 4, "v": 2, "k": 3}
    assert (finding.code, finding.severity, finding.subject) == ("C09", "error", "k")
    assert (finding.expected, finding.found) == ("5", "3")


def test_a_rank_that_cannot_be_known_is_not_compared() -> None:
    assert codes(layout(**pair("q", 3)), lora(rank_pattern={"(?i)q": 5})) == []
    assert codes(layout(**pair("q", 3)), adapter_config({"peft_type": "LORA"})) == []


def test_dora_flag_and_magnitude_vectors_have_to_agree() -> None:
    with_vector = layout(**pair("q"), q__lora_magnitude_vector=(8,))
    assert codes(with_vector, lora(use_dora=True)) == []
    assert codes(with_vector, lora()) == ["C12 error q"]
    assert codes(layout(**pair("q")), lora(use_dora=True)) == ["C12 error q"]
    assert codes(with_vector, None) == []
    assert targets_of(with_vector, None)[0] == (Target("q", 4, 6, 8, "linear+dora"),)


def test_a_magnitude_vector_has_the_size_of_the_output() -> None:
    assert codes(layout(**pair("q"), q__lora_magnitude_vector=(6,)), lora(use_dora=True)) == ["C08 error q"]


def test_lora_bias_and_its_tensors_have_to_agree() -> None:
    biased = layout(**pair("q"), q__lora_B__bias=(8,))
    assert codes(biased, lora(lora_bias=True)) == []
    assert codes(biased, lora()) == ["C05 error q"], "PEFT would drop it"
    assert codes(layout(**pair("q")), lora(lora_bias=True)) == ["C06 error q"]


@pytest.mark.parametrize("name", ["q__lora_C__weight", "q__lora_up__weight", "q__vera_lambda_b", "prompt_embeddings"])
def test_a_tensor_of_no_known_kind_is_named(name: str) -> None:
    targets, (finding,) = targets_of(layout(**pair("q"), **{name: (4,)}), lora())
    assert targets == (Target("q", 4, 6, 8, "linear"),)
    assert (finding.code, finding.severity) == ("C05", "error")
    assert finding.subject == "base_model.model." + name.replace("__", ".")


def test_an_unexplained_copy_is_a_target_and_a_warning() -> None:
    found = layout(**pair("q"), ln__weight=(8,), head__weight=(2, 8), lm_head__weight=(9, 8))
    targets, findings = targets_of(found, lora(modules_to_save=["head"]))
    assert [(target.module, target.kind, target.in_features, target.out_features) for target in targets] == [
        ("head", "full", 8, 2),
        ("lm_head", "full", 8, 9),
        ("ln", "full", None, 8),
        ("q", "linear", 6, 8),
    ]
    assert [(one.code, one.severity, one.subject) for one in findings] == [
        ("C05", "warning", "base_model.model.ln.weight")
    ]


def test_modules_to_save_match_the_ends_of_names_as_in_peft() -> None:
    found = layout(**pair("q"), my_head__0__weight=(2, 8))
    assert codes(found, lora(modules_to_save=["head"])) == []
    assert codes(found, lora(modules_to_save=["hea"])) != []


def test_the_base_in_a_whole_model_is_no_target() -> None:
    found = Layout(
        tuple(
            TensorSpec(name, "F32", shape)
            for name, shape in {
                "base_model.model.q.base_layer.weight": (8, 6),
                "base_model.model.q.base_layer.bias": (8,),
                "base_model.model.q.lora_A.default.weight": (4, 6),
                "base_model.model.q.lora_B.default.weight": (8, 4),
                "base_model.model.ln.weight": (8,),
                "base_model.model.head.original_module.weight": (2, 8),
                "base_model.model.head.modules_to_save.default.weight": (2, 8),
            }.items()
        )
    )
    targets, findings = targets_of(found, lora(modules_to_save=["head"]))
    assert [(target.module, target.kind) for target in targets] == [("head", "full"), ("q", "linear")]
    assert findings == ()


def test_two_adapters_in_one_state_dict_are_named() -> None:
    names = [f"q.lora_{part}.{adapter}.weight" for adapter in ("one", "two") for part in "AB"]
    found = Layout(tuple(TensorSpec(name, "F32", (4, 4)) for name in names))
    targets, findings = targets_of(found, lora())
    assert targets == (Target("q", 4, 4, 4, "linear"),)
    assert [(one.code, one.subject) for one in findings] == [("C23", names[2]), ("C23", names[3])]


def test_parameters_are_told_from_linears_by_the_configuration() -> None:
    found = layout(**pair("experts", 12, 6, 8))
    assert targets_of(found, lora())[0][0].kind == "linear"
    named = lora(target_parameters=["experts.up"], alpha_pattern={"up": 2})
    (target,), findings = targets_of(found, named)
    assert target == Target("experts.up", 4, 6, 8, "parameter")
    assert findings == ()
    assert target_scaling(named, target) == 0.5
    (wrong,) = targets_of(layout(**pair("experts", 10, 6, 8)), named)[1]
    assert (wrong.code, wrong.subject) == ("C09", "experts.up")


def test_nested_parameters_have_a_scaling_only_where_all_candidates_agree() -> None:
    found = layout(**pair("experts", 12, 6, 8), **pair("experts__base_layer", 12, 8, 6))
    names = ["experts.up", "experts.down"]
    for patterns, expected in (({}, 2.0), ({"up": 4}, None), ({"up": 4, "down": 4}, 1.0)):
        config = lora(target_parameters=names, alpha_pattern=patterns)
        targets, findings = targets_of(found, config)
        assert [target.module for target in targets] == ["experts", "experts.base_layer"]
        assert [target_scaling(config, target) for target in targets] == [expected, expected]
        assert findings == ()


def test_findings_are_capped_and_counted() -> None:
    found = layout(**{f"m{number}__lora_A__weight": (4, 4) for number in range(100)})
    findings = targets_of(found, lora())[1]
    assert len(findings) == MAX_FINDINGS_EACH + 1
    assert findings[-1].message.startswith("80 more")
    assert findings[-1].severity == "error"


def test_forty_thousand_tensors_take_seconds() -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for number in range(20_000):
        shapes |= pair(f"layers__{number}__q")
    found = layout(**shapes)
    started = time.process_time()
    targets, findings = targets_of(found, lora(rank_pattern={r".*layers\.1\d\.q": 8}))
    assert len(targets) == 20_000
    assert len(findings) == 10
    assert time.process_time() - started < 20
