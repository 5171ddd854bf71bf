"""Some two hundred adapters that fit their models: every option of PEFT's LoRA that changes what is saved, on every
family of models, in three dtypes. None of them may raise an alarm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from tests.compatibility.adapters import adapt, seed_of
from tests.compatibility.models import fresh

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Pair:
    """One adapter and its model.

    Attributes:
        model: name of an example in `models`.
        name: what is special about it.
        options: of PEFT's LoraConfig.
    """

    model: str
    name: str
    options: Mapping[str, Any]
    dtype: str = "fp32"

    @property
    def slug(self) -> str:
        return f"{self.model}-{self.name}-{self.dtype}".lower().replace("_", "-").replace(" ", "-")

    def make(self) -> PeftModel:
        """A trained adapter on a fresh model."""
        return adapt(fresh(self.model, DTYPES[self.dtype]), seed=seed_of(self.slug), **self.options)


# Targets that every variant below is tried on, and of each model a few more.
MAIN: dict[str, dict[str, Any]] = {
    "bert": {"target_modules": ["query", "value"]},
    "classifier": {"target_modules": ["query", "value"], "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"},
    "gpt2": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"},
    "llama": {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"},
    "mixtral": {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"},
    "unet": {"target_modules": ["to_q", "to_k", "to_v", "to_out.0"]},
    "noise_net": {"target_modules": ["q_proj", "v_proj"]},
    "bench": {"target_modules": ["lin", "wide"]},
    "towers": {"target_modules": ["q_proj", "v_proj", "up_proj"]},
}
FIRST = {  # an end of a path that matches some of the main targets
    "bert": "query", "classifier": "query", "gpt2": "c_attn", "llama": "q_proj", "mixtral": "q_proj",
    "unet": "to_q", "noise_net": "q_proj", "bench": "lin", "towers": "q_proj",
}  # fmt: skip
BIASED = {"bert", "classifier", "gpt2", "noise_net", "towers"}
"""Models whose main targets all have a bias."""
STACKED = {"bert", "classifier", "gpt2", "llama", "mixtral", "towers"}
"""Models whose main targets stand in numbered layers."""

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank 1": {"r": 1, "lora_alpha": 1},
    "rank 16": {"r": 16, "lora_alpha": 32},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "rslora dora": {"use_rslora": True, "use_dora": True},
    "gaussian": {"init_lora_weights": "gaussian", "lora_dropout": 0.1},
}


def good_pairs() -> Iterator[Pair]:
    """All pairs, each once."""
    seen: set[str] = set()
    for pair in _all():
        assert pair.slug not in seen, pair.slug
        seen.add(pair.slug)
        yield pair


def _all() -> Iterator[Pair]:
    for model, main in MAIN.items():
        for name, options in VARIANTS.items():
            yield Pair(model, name, main | options)
        yield Pair(model, "rank pattern", main | {"rank_pattern": {FIRST[model]: 2}})
        yield Pair(model, "alpha pattern", main | {"alpha_pattern": {FIRST[model]: 3}})
        yield Pair(model, "both patterns", main | _patterns(FIRST[model]))
        yield Pair(model, "both patterns dora", main | _patterns(FIRST[model]) | {"use_dora": True})
        yield Pair(model, "one target", main | {"target_modules": [FIRST[model]]})
        yield Pair(model, "all linear", {k: v for k, v in main.items() if k != "target_modules"} | _ALL_LINEAR)
        yield Pair(model, "plain", main, "bf16")
        yield Pair(model, "dora", main | {"use_dora": True}, "bf16")
        yield Pair(model, "plain", main, "fp16")
        if model in BIASED:
            yield Pair(model, "lora bias", main | {"lora_bias": True})
            yield Pair(model, "bias lora only", main | {"bias": "lora_only"})
            yield Pair(model, "bias all", main | {"bias": "all"})
        if model in STACKED:
            yield Pair(model, "second layer", main | {"layers_to_transform": [1]})
            yield Pair(model, "excluded", main | {"exclude_modules": rf".*\.0\..*{FIRST[model]}"})
    for model, pairs in _SPECIAL.items():
        for name, options in pairs.items():
            yield Pair(model, name, options)


def _patterns(first: str) -> dict[str, Any]:
    return {"rank_pattern": {first: 6}, "alpha_pattern": {f".*{first}": 5}, "r": 3}


_ALL_LINEAR = {"target_modules": "all-linear"}
_BERT = {"target_modules": ["query", "value"]}
_LLAMA = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
_SPECIAL: dict[str, dict[str, dict[str, Any]]] = {
    "bert": {
        "regex": {"target_modules": r"encoder\.layer\.\d+\.attention\.self\.(query|key)"},
        "four lists": {"target_modules": ["query", "key", "value", "attention.output.dense"]},
        "full paths": {"target_modules": ["encoder.layer.0.attention.self.query", "encoder.layer.1.output.dense"]},
        "embedding": {"target_modules": ["word_embeddings"]},
        "embedding and linear": {"target_modules": ["word_embeddings", "query"]},
        "layers pattern": _BERT | {"layers_to_transform": [0], "layers_pattern": "layer"},
        "excluded list": {"target_modules": ["query", "dense"], "exclude_modules": ["pooler.dense"]},
        "saved pooler": _BERT | {"modules_to_save": ["pooler"]},
        "saved norms": _BERT | {"modules_to_save": ["LayerNorm"]},
        "tokens": _BERT | {"trainable_token_indices": {"word_embeddings": [1, 3, 5]}},
        "feature task": _BERT | {"task_type": "FEATURE_EXTRACTION"},
        "olora": _BERT | {"init_lora_weights": False},
    },
    "classifier": {
        "regex": MAIN["classifier"] | {"target_modules": r".*\.(query|key)"},
        "embedding": MAIN["classifier"] | {"target_modules": ["word_embeddings", "query"]},
        "no task": {"target_modules": ["query"]},
        "pooler and head": MAIN["classifier"] | {"modules_to_save": ["classifier", "pooler"]},
        "task alone": {"target_modules": ["query"], "task_type": "SEQ_CLS"},
    },
    "gpt2": {
        "regex": MAIN["gpt2"] | {"target_modules": r".*\.attn\.c_attn"},
        "mlp": MAIN["gpt2"] | {"target_modules": ["c_fc"]},
        "mlp projection": MAIN["gpt2"] | {"target_modules": ["mlp.c_proj"]},
        "flag unset": MAIN["gpt2"] | {"fan_in_fan_out": False},
        "positions": {"target_modules": ["wpe"]},
    },
    "llama": {
        "regex": _LLAMA | {"target_modules": r".*self_attn\.(q|k)_proj"},
        "seven": _LLAMA
        | {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]},
        "embedding": _LLAMA | {"target_modules": ["embed_tokens"]},
        "head": _LLAMA | {"target_modules": ["lm_head", "q_proj"]},
        "saved embedding": _LLAMA | {"modules_to_save": ["embed_tokens", "lm_head"]},
        "tokens": _LLAMA | {"trainable_token_indices": [0, 3, 9]},
        "tokens by name": _LLAMA | {"trainable_token_indices": {"embed_tokens": [2, 4]}},
        "lora bias without bias": _LLAMA | {"lora_bias": True},
        "no task": {"target_modules": ["q_proj"]},
        "excluded list": _LLAMA | {"exclude_modules": ["layers.0.self_attn.q_proj"]},
        "replicated": _LLAMA | {"layer_replication": [[0, 2], [1, 2]]},
    },
    "mixtral": {
        "experts": {"target_modules": [], "target_parameters": _EXPERTS[:1]},
        "experts down": {"target_modules": [], "target_parameters": _EXPERTS[1:]},
        "both experts": {"target_modules": [], "target_parameters": _EXPERTS},
        "experts and attention": _LLAMA | {"target_parameters": _EXPERTS[:1]},
        "experts and attention both": _LLAMA | {"target_parameters": _EXPERTS},
        "experts rslora": {"target_modules": [], "target_parameters": _EXPERTS, "use_rslora": True},
        "experts rank 1": {"target_modules": [], "target_parameters": _EXPERTS[:1], "r": 1},
        "router": {"target_modules": [], "target_parameters": ["mlp.gate.weight"]},
        "experts rank pattern": _LLAMA | {"target_parameters": _EXPERTS[:1], "rank_pattern": {"q_proj": 2}},
    },
    "unet": {
        "convolutions": {"target_modules": ["conv1", "conv2"]},
        "convolutions and attention": {"target_modules": ["conv1", "to_q"]},
        "convolution dora": {"target_modules": ["conv1"], "use_dora": True},
        "convolution rslora": {"target_modules": ["conv2"], "use_rslora": True},
        "time": {"target_modules": ["time_emb_proj", "linear_1"]},
        "conv in": {"target_modules": ["conv_in", "conv_out"]},
        "regex": {"target_modules": r".*attn2\.to_(k|v)"},
        "shortcut": {"target_modules": ["conv_shortcut"]},
        "projections": {"target_modules": ["proj_in", "proj_out", "ff.net.0.proj"]},
    },
    "noise_net": {
        "regex": {"target_modules": r"decoder\.blocks\.\d+\.cross_attn\.(q|v)_proj"},
        "attention and mlp": {"target_modules": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]},
        "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["head"]},
        "saved norm": {"target_modules": ["q_proj"], "modules_to_save": ["ln_f"]},
        "decoder": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "blocks"},
        "inputs": {"target_modules": ["cond_obs_emb", "input_emb"]},
    },
    "bench": {
        "conv1d": {"target_modules": ["conv1"]},
        "conv2d": {"target_modules": ["conv2"]},
        "conv2d dora": {"target_modules": ["conv2"], "use_dora": True},
        "conv1d dora": {"target_modules": ["conv1"], "use_dora": True},
        "grouped": {"target_modules": ["grouped"], "r": 4},
        "convolutions": {"target_modules": ["conv1", "conv2", "grouped"]},
        "attention": {"target_modules": ["mha"]},
        "attention and linear": {"target_modules": ["mha", "lin"]},
        "saved norm": {"target_modules": ["lin"], "modules_to_save": ["norm"]},
        "conv lora bias": {"target_modules": ["conv1", "conv2", "lin"], "lora_bias": True},
    },
    "untied_bench": {
        "embedding": {"target_modules": ["emb"]},
        "embedding dora": {"target_modules": ["emb"], "use_dora": True},
        "embedding rslora": {"target_modules": ["emb"], "use_rslora": True},
        "everything": {"target_modules": ["emb", "lin", "wide", "conv1", "conv2", "mha", "head"]},
        "everything ranked": {
            "target_modules": ["emb", "lin", "conv2", "head"],
            "rank_pattern": {"emb": 2, "conv2": 8},
        },
        "tokens": {"target_modules": ["lin"], "trainable_token_indices": {"emb": [1, 2]}},
        "saved embedding": {"target_modules": ["lin"], "modules_to_save": ["emb"]},
    },
}
