"""Digests of a live model's weights, held against those that a push keeps."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from registry.core.digest import tensor_hasher
from registry.formats.live import flat_bytes, tensor_spec
from registry.formats.live_form import live_form
from registry.formats.live_weights import live_weights


def llama(**more: Any) -> nn.Module:
    torch.manual_seed(0)
    config = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, **more}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=2, **config))


def digest_of(tensor: torch.Tensor) -> str:
    spec = tensor_spec("it", tensor)
    hasher = tensor_hasher(spec.dtype, spec.shape)
    hasher.update(flat_bytes(tensor).numpy().data)
    return str(hasher.hexdigest())


def test_every_tensor_has_the_digest_of_its_bytes() -> None:
    model = llama()
    found = live_weights(model, None)
    assert found.digests == {name: digest_of(value) for name, value in model.state_dict().items()}
    assert set(found.dtypes.values()) == {"F32"}
    assert found.reference == "LlamaForCausalLM"


def test_rounded_digests_are_those_of_the_model_cast_to_bfloat16() -> None:
    wide, narrow = live_weights(llama(), None), live_weights(llama().to(torch.bfloat16), None)
    assert wide.digests != narrow.digests
    assert wide.rounded == narrow.digests == narrow.rounded


def test_half_floats_and_integers_have_no_rounded_digest() -> None:
    model = nn.Linear(2, 2, dtype=torch.float16)
    model.register_buffer("count", torch.arange(3))
    found = live_weights(model, None)
    assert found.dtypes == {"weight": "F16", "bias": "F16", "count": "I64"}
    assert found.rounded == {}


def test_only_named_modules_are_read() -> None:
    found = live_weights(llama(), {"model.layers.0.self_attn.q_proj", "model.layers.1"})
    assert list(found.digests) == ["model.layers.0.self_attn.q_proj.weight"]
    assert live_weights(llama(), set()).digests == {}


def test_an_adapter_changes_no_name_and_no_digest() -> None:
    plain = live_weights(llama(), None)
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(llama(), config)
    found = live_weights(nn.DataParallel(model), None)
    assert found == plain
    assert live_weights(model, {"model.layers.1.self_attn.q_proj"}).digests.items() <= plain.digests.items()


def test_meta_and_packed_tensors_are_left_out() -> None:
    with torch.device("meta"):
        assert live_weights(llama(), None).digests == {}
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"), nn.LazyLinear(2))
    assert list(live_weights(mixed, None).digests) == ["0.bias", "0.weight"]


def test_tied_weights_have_one_digest_under_both_names() -> None:
    digests = live_weights(llama(tie_word_embeddings=True), None).digests
    assert digests["lm_head.weight"] == digests["model.embed_tokens.weight"]


def test_transposed_weights_are_read_row_by_row() -> None:
    model = nn.Linear(3, 4)
    model.weight = nn.Parameter(torch.arange(12.0).reshape(3, 4).T)
    assert live_weights(model, None).digests["weight"] == digest_of(model.weight.detach().contiguous())


def test_names_are_those_of_the_form() -> None:
    model = llama()
    rows = live_form(model).modules
    assert set(live_weights(model, None).digests) == {f"{row.path}.{p.name}" for row in rows for p in row.parameters}
