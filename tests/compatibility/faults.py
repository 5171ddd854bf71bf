"""For each condition of docs/compatibility.md at least one adapter or model with exactly that fault. What PEFT does
with it stands in matrix.json, which test_matrix.py writes, and compares on every run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.compatibility import models
from tests.compatibility.adapters import adapt, drop, edit_config, rename
from tests.compatibility.breaking import (
    PREFIX,
    all_transposed,
    edit_first,
    ia3,
    kohya,
    loads_second,
    merges_eight_bits,
    onto_norm,
    plain_algebra,
    renamed_copy,
    stray,
    transposed,
    two_in_one_file,
    with_nan,
    written_by_18,
    zero_b,
)
from tests.compatibility.fault import Fault, loads_beside, merges, swaps

Breaks = Callable[[Path], object]
Make = Callable[[], nn.Module]

_Q: dict[str, Any] = {"target_modules": ["q_proj"]}
_QV: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
_LLAMA = _QV | {"task_type": "CAUSAL_LM"}
_BERT: dict[str, Any] = {"target_modules": ["query", "value"]}
_HEAD = _BERT | {"modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}
_TIED: dict[str, Any] = {"target_modules": ["lm_head"], "task_type": "CAUSAL_LM"}
_EMB: dict[str, Any] = {"target_modules": ["embed_tokens"], "task_type": "CAUSAL_LM"}
_DOWN: dict[str, Any] = {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}
_TO: dict[str, Any] = {"target_modules": ["to_q", "to_v"]}
_GROUPED: dict[str, Any] = {"target_modules": ["grouped"]}
_DORA = {"use_dora": True}
_PISSA = {"init_lora_weights": "pissa"}
_BIAS = _QV | {"bias": "lora_only"}
_COPY = {"modules_to_save": ["head"]}
_SAVED = {"modules_to_save": ["embed_tokens"]}
_TWICE = {"layer_replication": [[0, 2], [1, 2]]}
_HAM = {"tokenizer.json": '{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"ham": 0}}}'}
_EGGS = {"tokenizer.json": '{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"eggs": 0}}}'}


def _set(**changes: Any) -> Breaks:
    return lambda folder: edit_config(folder, **changes)


def _drop(part: str) -> Breaks:
    return lambda folder: drop(folder, part)


def _rename(old: str, new: str) -> Breaks:
    return lambda folder: rename(folder, old, new)


def _first(part: str, change: Callable[[Tensor], Tensor]) -> Breaks:
    return lambda folder: edit_first(folder, part, change)


def _other(name: str) -> Make:
    """The same model with other weights."""
    return partial(models.build, models.EXAMPLES[name].build, 9)


def _sized(name: str, **changes: Any) -> Make:
    """A model of other sizes or arguments, with as much of the example's weights as goes in."""

    def make() -> nn.Module:
        model = models.build(models.EXAMPLES[name].build, 0, **changes)
        theirs = model.state_dict()
        ours = models.fresh(name).state_dict().items()
        fitting = {key: value for key, value in ours if key in theirs and theirs[key].shape == value.shape}
        model.load_state_dict(fitting, strict=False)
        return model

    return make


def _square_mixtral() -> nn.Module:
    """Where the two dimensions of an expert's matrix are equal, no shape shows their order."""
    return models.build(models.mixtral, intermediate_size=models.WIDTH)


def _body() -> nn.Module:
    return models.build(models.llama_body)


class _Named(nn.Module):
    """A model whose layer is called `weight`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Linear(models.WIDTH, models.WIDTH)
        self.lora_head = nn.Linear(models.WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.lora_head(self.weight(x))
        return out


def _named() -> nn.Module:
    return models.build(_Named)


def _eight() -> nn.Module:
    """The projections in float8, as some checkpoints hold them."""
    model = models.fresh("llama")
    for path, module in model.named_modules():
        if path.endswith(("q_proj", "v_proj")):
            module.to(torch.float8_e4m3fn)
    return model


def _with_biases() -> nn.Module:
    return adapt(models.fresh("towers"), **_BIAS)


FAULTS: tuple[Fault, ...] = (
    Fault("C01", "a misspelt tuner", "towers", "error", _QV, breaks=_set(peft_type="LOAR")),
    Fault("C01", "a retired tuner", "towers", "error", _QV, breaks=_set(peft_type="BONE")),
    Fault("C02", "a key of a later PEFT", "towers", "error", _QV, breaks=_set(use_tora=True)),
    Fault("C02", "DoRA in PEFT 0.8", "towers", "error", _QV | _DORA, peft="0.8.2"),
    Fault("C02", "rsLoRA in PEFT 0.7", "llama", "error", _LLAMA | {"use_rslora": True}, peft="0.7.1"),
    Fault(
        "C03", "experts as PEFT 0.18 laid them out", "mixtral", "error", _DOWN, _square_mixtral, breaks=written_by_18
    ),
    Fault("C03", "experts of an unknown PEFT", "mixtral", "undecided", _DOWN, breaks=_set(peft_version=...)),
    Fault("C04", "a base with other weights", "towers", "error", _QV, asked=_other("towers")),
    Fault("C04", "a BERT with other weights", "bert", "error", _BERT, asked=_other("bert")),
    Fault("C05", "a base with fewer layers", "towers", "error", _Q, asked=_sized("towers", depth=2)),
    Fault("C05", "a tensor for a module that is not there", "towers", "error", _QV, breaks=stray),
    Fault("C06", "every second layer left out", "towers", "error", _QV, breaks=_drop("blocks.1.")),
    Fault("C06", "a B left out", "bert", "error", _BERT, breaks=_drop("layer.0.attention.self.query.lora_B")),
    Fault(
        "C06", "a layer left out, beside another", "towers", "error", _QV, breaks=_drop("blocks.1."), does=loads_beside
    ),
    Fault("C07", "Llama's names in GPT-2", "gpt2", "error", _LLAMA, _sized("llama"), asked=_sized("gpt2")),
    Fault("C08", "a base half as wide", "towers", "error", _QV, asked=_sized("towers", width=16)),
    Fault("C08", "transposed A and B", "llama", "error", _LLAMA, breaks=all_transposed),
    Fault("C09", "a transposed A", "llama", "error", _LLAMA, breaks=_first("lora_A", transposed)),
    Fault("C09", "another r in the configuration", "towers", "error", _QV, breaks=_set(r=16)),
    Fault("C09", "another rank_pattern", "bert", "error", _BERT, breaks=_set(rank_pattern={"query": 2})),
    Fault("C10", "alpha edited", "towers", "undecided", _QV, breaks=_set(lora_alpha=16), before=True),
    Fault("C10", "rsLoRA edited", "llama", "undecided", _LLAMA, breaks=_set(use_rslora=True), before=True),
    Fault("C11", "a misspelt alpha_pattern", "towers", "warning", _QV, breaks=_set(alpha_pattern={"q_prj": 3})),
    Fault("C11", "a misspelt rank_pattern", "bert", "warning", _BERT, breaks=_set(rank_pattern={"qeury": 2})),
    Fault("C12", "DoRA's flag taken away", "towers", "error", _QV | _DORA, breaks=_set(use_dora=False)),
    Fault("C12", "DoRA's flag added", "towers", "error", _QV, breaks=_set(use_dora=True)),
    Fault("C13", "a head of three into two", "classifier", "error", _HEAD, asked=_sized("classifier", num_labels=2)),
    Fault("C13", "a saved module that is not there", "towers", "error", _QV, breaks=_set(modules_to_save=["scorer"])),
    Fault("C13", "a copy of a module that is not there", "towers", "error", _QV | _COPY, breaks=renamed_copy),
    Fault(
        "C14", "added tokens, saved", "llama", "error", _LLAMA | _SAVED, _sized("llama", vocab_size=44), _sized("llama")
    ),
    Fault("C14", "added tokens, LoRA", "llama", "error", _EMB, _sized("llama", vocab_size=44), _sized("llama")),
    Fault("C15", "another tokenizer", "bert", "warning", _BERT, files=(_HAM, _EGGS), only="version"),
    Fault("C16", "a tied head, merged", "gpt2", "error", _TIED, purpose="merge", does=merges),
    Fault("C16", "a tied head", "gpt2", "warning", _TIED),
    Fault("C17", "a NaN in a B", "towers", "error", _QV, breaks=_first("lora_B", with_nan)),
    Fault("C18", "out_proj of torch's attention", "bench", "error", {"target_modules": ["mha.out_proj"]}),
    Fault("C18", "a grouped convolution, merged", "untied_bench", "warning", _GROUPED, purpose="merge", does=merges),
    Fault("C18", "factors for a LayerNorm", "towers", "error", _QV, breaks=onto_norm),
    Fault("C19", "no bias to merge into", "llama", "error", _LLAMA | {"lora_bias": True}, purpose="merge", does=merges),
    Fault("C20", "a body for a task", "llama", "error", _QV, _body, breaks=_set(task_type="CAUSAL_LM"), only="live"),
    Fault("C21", "merged into float8", "llama", "error", _LLAMA, asked=_eight, purpose="merge", does=merges_eight_bits),
    Fault("C22", "PiSSA, merged elsewhere", "towers", "error", _QV | _PISSA, purpose="merge", does=plain_algebra),
    Fault("C22", "PiSSA, into a slot", "towers", "error", _QV | _PISSA, purpose="hotswap", does=swaps),
    Fault("C23", "two adapters in one file", "towers", "error", _QV, made=two_in_one_file),
    Fault("C23", "a module that is called weight", "towers", "warning", {"target_modules": ["weight"]}, _named),
    Fault("C23", "a module called lora_head", "towers", "warning", {"target_modules": ["lora_head"]}, _named),
    Fault(
        "C24", "a second one with biases", "towers", "error", _BIAS, asked=_with_biases, does=loads_second, only="live"
    ),
    Fault("C25", "replicated layers, merged", "llama", "error", _LLAMA | _TWICE, purpose="merge", does=merges),
    Fault("C26", "no base_model.model.", "towers", "error", _QV, breaks=_rename(PREFIX, "")),
    Fault("C26", "names of a diffusion model", "unet", "error", _TO, breaks=_rename(PREFIX, "diffusion_model.")),
    Fault("C26", "kohya's names", "unet", "error", _TO, breaks=kohya),
    Fault("C26", "names of a release", "llama", "error", _LLAMA, breaks=_rename(".model.layers", ".model.text.layers")),
    Fault("C26", "the prefix of a head", "bert", "error", _BERT, breaks=_rename(PREFIX, f"{PREFIX}transformer.")),
    Fault("C27", "an adapter before its first step", "towers", "warning", _QV, breaks=zero_b),
    Fault("C27", "alpha 0", "bert", "warning", _BERT, breaks=_set(lora_alpha=0)),
    Fault("C28", "DoRA into a compiled slot", "towers", "error", _QV | _DORA, purpose="hotswap", does=swaps),
    Fault("C29", "another number of heads", "noise_net", "error", _QV, asked=_sized("noise_net", n_head=8)),
    Fault("C29", "a causal mask", "noise_net", "error", _QV, asked=_sized("noise_net", causal_cross_attn=True)),
    Fault("C31", "another tuner", "towers", "undecided", made=ia3),
    Fault("C33", "dropout on experts", "mixtral", "error", _DOWN, breaks=_set(lora_dropout=0.1)),
)
