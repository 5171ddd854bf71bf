"""What a server must allow for an adapter, from real adapters' names and shapes; the flags word by word, and a sentence
for each thing that vLLM or SGLang does not take."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from registry.compat.case import AdapterSide
from registry.compat.serving import SGLANG_MODULES, VLLM_RANKS, Needs, needs
from registry.core.adapter_config import adapter_config, read_adapter_config
from registry.core.adapter_names import targets_of
from registry.core.layout import Layout, TensorSpec, layout_of
from registry.core.model_form import ModelForm, Module
from tests.compatibility import models
from tests.compatibility.adapters import CONFIG, WEIGHTS, adapt, quietly, save

_QV = ["q_proj", "v_proj"]
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": _QV, "task_type": "CAUSAL_LM"}),
    "ranks": ("llama", {"target_modules": [*_QV, "up_proj"], "rank_pattern": {"up_proj": 24}}),
    "same_scaling": (
        "llama",
        {"target_modules": _QV, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 4}},
    ),
    "rslora": ("llama", {"target_modules": _QV, "use_rslora": True}),
    "dora": ("llama", {"target_modules": _QV, "use_dora": True}),
    "head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "copy": ("llama", {"target_modules": _QV, "modules_to_save": ["lm_head"]}),
    "tokens": ("llama", {"target_modules": _QV, "trainable_token_indices": [1, 2]}),
    "expression": ("llama", {"target_modules": r".*\.q_proj"}),
    "pissa": ("llama", {"target_modules": _QV, "init_lora_weights": "pissa"}),
    "alora": ("llama", {"target_modules": _QV, "alora_invocation_tokens": [3], "task_type": "CAUSAL_LM"}),
    "experts": ("mixtral", {"target_modules": [], "target_parameters": ["experts.down_proj"]}),
    "bert": ("bert", {"target_modules": ["query"]}),
    "biases": ("bert", {"target_modules": ["query"], "bias": "lora_only"}),
    "lora_bias": ("bert", {"target_modules": ["query"], "lora_bias": True}),
    "convs": ("bench", {"target_modules": ["conv2", "mha"]}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@cache
def _side(folder: Path, name: str) -> AdapterSide:
    model, options = ADAPTERS[name]
    place = save(quietly(lambda: adapt(models.fresh(model), **options)), folder / name)
    config = read_adapter_config((place / CONFIG).read_bytes(), name)
    layout = _layout(place / WEIGHTS)
    targets, read = targets_of(layout, config)
    return AdapterSide(f"team/{name}@3", layout, config, targets, read, written_by=config.peft_version)


def _layout(path: Path) -> Layout:
    with safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return layout_of(TensorSpec(one, part.get_dtype(), tuple(part.get_shape())) for one, part in slices.items())


def _of(folder: Path, name: str) -> Needs:
    return needs(_side(folder, name))


def _with_dtype(side: AdapterSide, dtype: str) -> AdapterSide:
    return replace(side, layout=layout_of(replace(one, dtype=dtype) for one in side.layout))


# ---- what is needed


def test_a_plain_adapter_needs_its_rank_and_its_modules(folder: Path) -> None:
    found = _of(folder, "plain")
    assert (found.max_rank, found.target_modules, found.dtypes) == (4, ("q_proj", "v_proj"), ("F32",))
    assert (found.peft_type, found.task_type, found.least_peft) == ("LORA", "CAUSAL_LM", None)
    assert found.written_by is not None
    assert found.modules_to_save == found.base_biases == found.embeddings == found.experts == found.token_rows == ()
    assert not found.dora
    assert not found.lora_bias


def test_rank_pattern_counts_for_the_largest_rank(folder: Path) -> None:
    assert _of(folder, "ranks").max_rank == 24


@pytest.mark.parametrize(
    ("name", "field", "expected"),
    [
        ("dora", "dora", True),
        ("dora", "least_peft", "0.9"),
        ("rslora", "least_peft", "0.8"),
        ("lora_bias", "lora_bias", True),
        ("copy", "modules_to_save", ("lm_head",)),
        ("tokens", "token_rows", ("model.embed_tokens",)),
        ("head", "embeddings", ("lm_head",)),
        ("embedding", "embeddings", ("model.embed_tokens",)),
        ("experts", "least_peft", "0.17"),
        ("experts", "target_modules", ("experts.down_proj",)),
        ("experts", "max_rank", 4),
    ],
)
def test_what_is_more_than_factors_is_said(folder: Path, name: str, field: str, expected: object) -> None:
    assert getattr(_of(folder, name), field) == expected


def test_trained_biases_are_named_by_their_modules(folder: Path) -> None:
    assert _of(folder, "biases").base_biases == tuple(
        f"encoder.layer.{number}.attention.self.query" for number in range(2)
    )


def test_experts_are_named_by_their_parameters(folder: Path) -> None:
    assert all(one.endswith("experts.down_proj") for one in _of(folder, "experts").experts)
    assert len(_of(folder, "experts").experts) == 2


def test_whole_paths_are_given_where_last_names_would_name_more(folder: Path) -> None:
    side = _side(folder, "plain")
    modules = [Module(one.module, "linear") for one in side.targets]
    assert needs(replace(side, form=_form(modules))).target_paths == ()
    more = _form([*modules, Module("vision.layers.0.q_proj", "linear")])
    assert needs(replace(side, form=more)).target_paths == tuple(sorted(one.module for one in side.targets))


def _form(modules: list[Module]) -> ModelForm:
    return ModelForm(tuple(modules))


def test_an_adapter_without_a_configuration_is_described_by_its_tensors(folder: Path) -> None:
    side = replace(_side(folder, "plain"), config=None)
    found = needs(side)
    assert (found.max_rank, found.target_modules, found.peft_type) == (4, ("q_proj", "v_proj"), None)
    assert found.vllm.refused == ("vLLM reads adapter_config.json, and there is none",)


# ---- flags


def test_the_flags_of_vllm_are_words_of_a_command_line(folder: Path) -> None:
    assert _of(folder, "plain").vllm.flags == (
        *("--enable-lora", "--max-lora-rank", "8", "--lora-dtype", "auto", "--lora-modules", "plain=PATH"),
    )


def test_the_flags_of_sglang_are_words_of_a_command_line(folder: Path) -> None:
    assert _of(folder, "plain").sglang.flags == (
        *("--enable-lora", "--max-lora-rank", "4", "--lora-target-modules", "q_proj", "v_proj"),
        *("--lora-paths", "plain=PATH"),
    )


def test_sglang_takes_names_that_are_no_choice_of_its_flag_from_the_adapter(folder: Path) -> None:
    found = _of(folder, "head").sglang
    assert "--lora-target-modules" not in found.flags
    assert found.serves


@pytest.mark.parametrize(("rank", "allowed"), [(1, "8"), (8, "8"), (9, "16"), (200, "256"), (300, "320"), (512, "512")])
def test_vllm_gets_the_next_rank_that_it_allows(folder: Path, rank: int, allowed: str) -> None:
    side = _ranked(folder, rank)
    words = needs(side).vllm.flags
    assert words[words.index("--max-lora-rank") + 1] == allowed
    assert int(allowed) in VLLM_RANKS


def _ranked(folder: Path, rank: int) -> AdapterSide:
    side = _side(folder, "plain")
    return replace(side, targets=tuple(replace(one, rank=rank) for one in side.targets))


@pytest.mark.parametrize(("dtype", "word"), [("F16", "float16"), ("BF16", "bfloat16"), ("F32", "auto")])
def test_vllm_is_told_a_dtype_that_it_allows(folder: Path, dtype: str, word: str) -> None:
    words = needs(_with_dtype(_side(folder, "plain"), dtype)).vllm.flags
    assert words[words.index("--lora-dtype") + 1] == word


@pytest.mark.parametrize(
    ("reference", "name"),
    [("team/walk-perturb@12", "walk-perturb"), ("a/b", "b"), ("an adapter = odd", "an-adapter-odd"), ("@", "adapter")],
)
def test_a_name_in_a_flag_holds_nothing_that_splits_it(folder: Path, reference: str, name: str) -> None:
    assert f"{name}=PATH" in needs(replace(_side(folder, "plain"), reference=reference)).vllm.flags


# ---- refusals


@pytest.mark.parametrize("name", ["plain", "head", "embedding"])
def test_plain_factors_are_served_by_both(folder: Path, name: str) -> None:
    found = _of(folder, name)
    assert (found.vllm.refused, found.sglang.refused) == ((), ())


@pytest.mark.parametrize(
    ("name", "server", "part"),
    [
        ("dora", "vllm", "does not take DoRA"),
        ("dora", "sglang", "does not take DoRA"),
        ("copy", "vllm", "no modules_to_save: lm_head"),
        ("copy", "sglang", "no place for whole copies of modules: lm_head"),
        ("tokens", "vllm", "no trained rows of an embedding: model.embed_tokens"),
        ("tokens", "sglang", "no trained rows of an embedding: model.embed_tokens"),
        ("lora_bias", "vllm", "lora_bias"),
        ("lora_bias", "sglang", "lora_bias"),
        ("biases", "vllm", "trained biases: encoder.layer.0"),
        ("biases", "sglang", "trained biases: encoder.layer.0"),
        ("ranks", "vllm", "drops rank_pattern and alpha_pattern"),
        ("ranks", "sglang", "one rank and alpha"),
        ("same_scaling", "sglang", "one rank and alpha"),
        ("rslora", "sglang", "adds too little"),
        ("expression", "sglang", "no expression in target_modules"),
        ("pissa", "vllm", "belongs to a changed one"),
        ("pissa", "sglang", "belongs to a changed one"),
        ("alora", "vllm", "passes over alora_invocation_tokens"),
        ("experts", "sglang", "not target_parameters"),
        ("bert", "sglang", "no LoRA for modules of these names: query"),
        ("convs", "vllm", "no LoRA for convolutions: conv2"),
        ("convs", "sglang", "no LoRA for torch's MultiheadAttention: mha"),
    ],
)
def test_what_a_server_does_not_take_is_a_sentence(folder: Path, name: str, server: str, part: str) -> None:
    found = getattr(_of(folder, name), server)
    assert any(part in sentence for sentence in found.refused), found.refused
    assert all(sentence.startswith(found.name) for sentence in found.refused)
    assert not found.serves


@pytest.mark.parametrize("name", ["rslora", "same_scaling", "expression", "bert"])
def test_vllm_serves_what_sglang_does_not(folder: Path, name: str) -> None:
    assert _of(folder, name).vllm.refused == ()


def test_a_rank_above_the_limit_is_refused_with_its_module(folder: Path) -> None:
    found = needs(_ranked(folder, 513))
    assert found.vllm.refused == ("vLLM allows a rank of 512 at most, and model.layers.0.self_attn.q_proj has 513",)
    assert "--max-lora-rank" not in found.vllm.flags
    assert found.sglang.serves


@pytest.mark.parametrize(
    ("written_by", "served"), [("0.18.1", False), ("0.19.0", False), ("0.19.1", True), (None, False)]
)
def test_experts_are_served_in_the_layout_of_today(folder: Path, written_by: str | None, served: bool) -> None:
    assert needs(replace(_side(folder, "experts"), written_by=written_by)).vllm.serves is served


def test_added_tokens_are_refused_by_sglang(folder: Path) -> None:
    found = needs(replace(_side(folder, "plain"), files={"added_tokens.json": "0" * 64}))
    assert not found.sglang.serves
    assert found.vllm.serves


def test_another_tuner_is_served_by_neither() -> None:
    config = adapter_config({"peft_type": "LOHA", "r": 4})
    found = needs(AdapterSide("a/b@1", layout_of([]), config, ()))
    assert found.vllm.refused == ("vLLM serves LoRA, and this is LOHA",)
    assert found.max_rank == 0


def test_the_names_of_sglang_are_those_that_peft_targets_in_a_llama() -> None:
    names = {
        path.rpartition(".")[2]
        for path, one in models.fresh("llama").named_modules()
        if isinstance(one, torch.nn.Linear)
    }
    assert names - {"lm_head"} <= SGLANG_MODULES
