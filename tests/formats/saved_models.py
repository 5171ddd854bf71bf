"""Tiny models of transformers' own classes, saved by `save_pretrained`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from registry.core.layout import TensorSpec

SMALL = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
ENCODER = {**SMALL, "max_position_embeddings": 16}
MOE = {**SMALL, "num_key_value_heads": 1, "head_dim": 8}
VISION = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    # Names as saved.
    "bert": ("BertConfig", "BertModel", ENCODER),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**SMALL, "num_key_value_heads": 1}),
    # One tensor under several live names.
    "tied llama": ("LlamaConfig", "LlamaForCausalLM", {**SMALL, "tie_word_embeddings": True}),
    "bert with a head": ("BertConfig", "BertForMaskedLM", ENCODER),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2},
    ),
    # Renamed.
    "gpt neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", SMALL),
    "clip text": ("CLIPTextConfig", "CLIPTextModelWithProjection", {**ENCODER, "projection_dim": 8}),
    "vit": ("ViTConfig", "ViTModel", {**VISION, "num_hidden_layers": 2}),
    # Stacked and joined.
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**MOE, "num_local_experts": 3}),
    "qwen2 moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {**MOE, "num_experts": 12, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
    ),
    # Split.
    "gte": ("GteConfig", "GteModel", ENCODER),
}


def save_model(name: str, folder: Path, *, shards_of: str = "50GB") -> Path:
    """Saves one of `MODELS` with seeded weights; the folder itself."""
    config_class, model_class, options = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**options))
    model.save_pretrained(folder, max_shard_size=shards_of)
    return folder


def saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of its safetensors files, by saved name."""
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def specs(tensors: dict[str, torch.Tensor]) -> list[TensorSpec]:
    """Names and shapes; the dtype counts for nothing here."""
    return [TensorSpec(name, "F32", tuple(value.shape)) for name, value in tensors.items()]
