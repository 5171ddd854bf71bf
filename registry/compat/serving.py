"""What a server must allow to serve an adapter, worked out from its tensors' names and shapes and its configuration;
and the same as command lines for vLLM and SGLang, with what these two do not take."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from registry.compat.case import AdapterSide
from registry.compat.peft_versions import fused_expert_layout, least_peft
from registry.core.adapter_config import AdapterConfig
from registry.core.adapter_names import Target, is_adapter_tensor, target_scaling
from registry.core.content_digest import LORA_OPTIONS, PLAIN_INITS

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` of vLLM allows."""
SGLANG_MODULES = frozenset(
    ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj")
)
"""What `--lora-target-modules` of SGLang allows, besides `all`."""
SGLANG_OTHERS = frozenset(
    (
        *("embed_tokens", "lm_head", "in_proj", "in_proj_qkv", "in_proj_z", "out_proj", "q_a_proj", "q_b_proj"),
        *("kv_a_proj_with_mqa", "kv_b_proj", "fused_qkv_a_proj_with_mqa"),
    )
)
"""Further names that SGLang takes from an adapter's own configuration, in models that have them."""
PATH = "PATH"
"""Stands in a command line for the folder to which the adapter is pulled."""
_EMBEDDINGS = frozenset(("embed_tokens", "lm_head"))
_LAYOUT_OF_SERVERS = 2
_VARIANTS = tuple(one for one in LORA_OPTIONS if one not in ("use_dora", "trainable_token_indices"))
_LORA_DTYPES = {"F16": "float16", "BF16": "bfloat16"}
_NOT_IN_A_FLAG = re.compile(r"[^A-Za-z0-9._-]+")
_MOST_NAMED = 3


@dataclass(frozen=True)
class Server:
    """One server's view of an adapter.

    Attributes:
        name: `vLLM` or `SGLang`.
        flags: words of its command line. The adapter's folder is `PATH`, its name is made from the reference.
        refused: sentences, each naming something of the adapter that this server does not take, or takes and computes
            otherwise; nothing, where it serves the adapter as it is.
    """

    name: str
    flags: tuple[str, ...]
    refused: tuple[str, ...]

    @property
    def serves(self) -> bool:
        return not self.refused


@dataclass(frozen=True)
class Needs:
    """What a server must allow for one adapter.

    Attributes:
        adapter: its reference.
        peft_type: None: it came without a configuration.
        base_model: as the configuration records it: a name, or a path on some machine.
        task_type: as recorded, like `CAUSAL_LM`.
        max_rank: the largest of all modules, rank_pattern counted; of an expert the rank of one. 0 without a LoRA.
        target_modules: last names of the modules with factors, sorted; the whole path of one that has a last name that
            is a number, and of an expert's parameter the last two.
        target_paths: whole paths, sorted, where last names would name other modules as well, as far as the recorded
            form of the base tells; else empty.
        dtypes: safetensors codes of the factors, sorted; mostly one.
        modules_to_save: paths of whole copies, sorted.
        dora: whether there are magnitude vectors.
        lora_bias: whether the factors have biases of their own.
        base_biases: paths of modules whose own bias was trained, sorted.
        embeddings: targets that are embeddings, or called `embed_tokens` or `lm_head`, sorted.
        token_rows: paths of embeddings of which single rows were trained, sorted.
        experts: paths of parameters that hold several experts, sorted.
        least_peft: the oldest PEFT that computes it; None: any since 0.2, or unknown.
        written_by: the PEFT that wrote it, where that is recorded.
        vllm: flags and refusals.
        sglang: likewise.
    """

    adapter: str
    peft_type: str | None
    base_model: str | None
    task_type: str | None
    max_rank: int
    target_modules: tuple[str, ...]
    target_paths: tuple[str, ...]
    dtypes: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    dora: bool
    lora_bias: bool
    base_biases: tuple[str, ...]
    embeddings: tuple[str, ...]
    token_rows: tuple[str, ...]
    experts: tuple[str, ...]
    least_peft: str | None
    written_by: str | None
    vllm: Server
    sglang: Server


def needs(adapter: AdapterSide) -> Needs:
    """What a server must allow to serve an adapter.

    vLLM: `LoRAConfig` and `PEFTHelper` as in its documentation for 0.14 to 0.23 (ranks, `--lora-dtype`, what is
    refused); a file of a newer one also has `--max-lora-trainable-tokens`. `--fully-sharded-loras` is a matter of
    speed and left out. SGLang: docs/advanced_features/server_arguments.md at 004813e1, srt/lora/utils.py at 01235a16
    (names of modules) and lora_manager.py (DoRA, added tokens); that it scales rsLoRA wrongly is
    sgl-project/sglang#40835. Neither server was run.
    """
    config, targets = adapter.config, adapter.targets
    factors = [target for target in targets if target.rank]
    names = tuple(sorted({_last(target) for target in factors}))
    found = _Found(adapter)
    return Needs(
        adapter=adapter.reference,
        peft_type=None if config is None else config.peft_type,
        base_model=None if config is None else config.base_model,
        task_type=None if config is None else config.task_type,
        max_rank=max((target.rank for target in factors), default=0),
        target_modules=names,
        target_paths=_paths(adapter, factors, names),
        dtypes=tuple(sorted({spec.dtype for spec in adapter.layout if is_adapter_tensor(spec.name)})),
        modules_to_save=found.full,
        dora=found.dora,
        lora_bias=found.lora_bias,
        base_biases=found.biases,
        embeddings=found.embeddings,
        token_rows=found.tokens,
        experts=found.experts,
        least_peft=None if config is None else least_peft(config),
        written_by=adapter.written_by,
        vllm=Server("vLLM", tuple(_vllm_flags(adapter, factors)), tuple(_vllm_refused(adapter, found))),
        sglang=Server("SGLang", tuple(_sglang_flags(adapter, factors, names)), tuple(_sglang_refused(adapter, found))),
    )


class _Found:
    """What an adapter has, by kind; paths are sorted."""

    def __init__(self, adapter: AdapterSide) -> None:
        self.factors = [target for target in adapter.targets if target.rank]
        self.kinds = {kind: self._of(kind) for kind in {_kind(one) for one in self.factors}}
        flags = {flag for one in adapter.targets for flag in one.kind.split("+")[1:]}
        self.dora = "dora" in flags
        self.lora_bias = "lora_bias" in flags
        self.tokens = tuple(sorted(one.module for one in adapter.targets if _kind(one) == "token"))
        self.experts = self._of("parameter")
        self.biases = tuple(
            sorted(one.module for one in adapter.targets if _kind(one) == "bias" or "+base_bias" in one.kind)
        )
        # Beside the factors of an embedding PEFT saves the base's own weight, unasked; servers pass over it.
        self.full = tuple(
            sorted(
                one.module
                for one in adapter.targets
                if _kind(one) == "full" or ("+full" in one.kind and not _is_embedding(one))
            )
        )
        self.embeddings = tuple(sorted(one.module for one in self.factors if _is_embedding(one)))

    def _of(self, kind: str) -> tuple[str, ...]:
        return tuple(sorted(one.module for one in self.factors if _kind(one) == kind))


# ---- vLLM


def _vllm_flags(adapter: AdapterSide, factors: list[Target]) -> Iterator[str]:
    yield "--enable-lora"
    rank = _rank_to_allow(adapter, factors)
    allowed = next((one for one in VLLM_RANKS if rank <= one), None)
    if allowed is not None:
        yield from ("--max-lora-rank", str(allowed))
    dtypes = {spec.dtype for spec in adapter.layout if is_adapter_tensor(spec.name)}
    known = _LORA_DTYPES.get(dtypes.pop()) if len(dtypes) == 1 else None
    yield from ("--lora-dtype", known or "auto")
    yield from ("--lora-modules", f"{_name(adapter)}={PATH}")


def _vllm_refused(adapter: AdapterSide, found: _Found) -> Iterator[str]:
    yield from _refused_by_all(adapter, found, "vLLM")
    config = adapter.config
    copies = found.full or (() if config is None else config.modules_to_save)
    if copies:
        yield f"vLLM takes no modules_to_save: {_named(copies)}"
    if found.tokens:
        yield f"vLLM takes no trained rows of an embedding: {_named(found.tokens)}"
    if max((target.rank for target in found.factors), default=0) > VLLM_RANKS[-1]:
        most = max(found.factors, key=lambda target: target.rank)
        yield f"vLLM allows a rank of {VLLM_RANKS[-1]} at most, and {most.module} has {most.rank}"
    if config is not None and _scaled_apart(config, found.factors):
        yield "vLLM scales every module with lora_alpha and r, and drops rank_pattern and alpha_pattern"


# ---- SGLang


def _sglang_flags(adapter: AdapterSide, factors: list[Target], names: tuple[str, ...]) -> Iterator[str]:
    yield "--enable-lora"
    rank = _rank_to_allow(adapter, factors)
    if rank:
        yield from ("--max-lora-rank", str(rank))
    if names and SGLANG_MODULES.issuperset(names):
        yield from ("--lora-target-modules", *names)  # else it takes them from the adapter
    yield from ("--lora-paths", f"{_name(adapter)}={PATH}")


def _sglang_refused(adapter: AdapterSide, found: _Found) -> Iterator[str]:
    yield from _refused_by_all(adapter, found, "SGLang")
    config = adapter.config
    if found.full:
        yield f"SGLang has no place for whole copies of modules: {_named(found.full)}"
    if found.tokens:
        yield f"SGLang takes no trained rows of an embedding: {_named(found.tokens)}"
    if found.experts:
        yield f"SGLang reads target_modules and not target_parameters: {_named(found.experts)}"
    linear = [one for one in found.factors if _kind(one) in ("linear", "embedding")]
    unknown = sorted({_last(one) for one in linear} - SGLANG_MODULES - SGLANG_OTHERS)
    if unknown:
        yield f"SGLang has no LoRA for modules of these names: {_named(tuple(unknown))}"
    if config is None:
        return
    if config.use_rslora:
        yield "SGLang scales rsLoRA with lora_alpha / r, so it adds too little"
    if isinstance(config.target_modules, str) and config.target_modules not in ("all", "all-linear"):
        yield "SGLang takes no expression in target_modules: write the names"
    if _scaled_apart(config, found.factors) or len({one.rank for one in found.factors}) > 1:
        yield "SGLang knows one rank and alpha for an adapter, and not rank_pattern and alpha_pattern"
    if "added_tokens.json" in adapter.files:
        yield "SGLang takes no adapter that adds tokens: it comes with an added_tokens.json"


# ---- both


def _refused_by_all(adapter: AdapterSide, found: _Found, server: str) -> Iterator[str]:
    config = adapter.config
    if config is None:
        yield f"{server} reads adapter_config.json, and there is none"
    elif config.peft_type != "LORA":
        yield f"{server} serves LoRA, and this is {config.peft_type}"
        return
    if not found.factors:
        yield f"{server} finds nothing to serve: there are no LoRA factors"
    if found.dora or (config is not None and config.use_dora):
        yield f"{server} does not take DoRA"
    if found.lora_bias or (config is not None and config.lora_bias):
        yield f"{server} does not take lora_bias"
    if found.biases or (config is not None and config.bias not in (None, "none")):
        yield f"{server} does not take trained biases: {_named(found.biases) or 'bias is not none'}"
    for kind, what in (
        ("conv1d", "convolutions"),
        ("conv2d", "convolutions"),
        ("conv3d", "convolutions"),
        ("attention", "torch's MultiheadAttention"),
    ):
        if kind in found.kinds:
            yield f"{server} has no LoRA for {what}: {_named(found.kinds[kind])}"
    if found.experts and fused_expert_layout(adapter.written_by or "") != _LAYOUT_OF_SERVERS:
        written = adapter.written_by or "an unknown version"
        yield f"{server} reads factors of experts as PEFT 0.19.1 lays them out, and {written} of PEFT wrote these"
    if config is None:
        return
    for key in _VARIANTS:
        if config.document.get(key):
            yield f"{server} passes over {key}, and computes plain LoRA"
    init = config.init_lora_weights
    if init is not None and init not in PLAIN_INITS:
        yield f"{server} serves the base as it is, and init_lora_weights={init[:40]!r} belongs to a changed one"


def _rank_to_allow(adapter: AdapterSide, factors: list[Target]) -> int:
    """The largest of the tensors' ranks and of `r`: both servers compare `r`, whatever the tensors have."""
    recorded = 0 if adapter.config is None else adapter.config.r or 0
    return max(recorded, *(target.rank for target in factors), 0)


def _scaled_apart(config: AdapterConfig, factors: list[Target]) -> bool:
    """Whether a module has another scaling than lora_alpha and r give."""
    if not (config.rank_pattern or config.alpha_pattern):
        return False
    if config.r is None or config.lora_alpha is None:
        return True
    plain = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    scalings = [target_scaling(config, target) for target in factors]
    return any(one is None or not math.isclose(one, plain, rel_tol=1e-9) for one in scalings)


def _paths(adapter: AdapterSide, factors: list[Target], names: tuple[str, ...]) -> tuple[str, ...]:
    if adapter.form is None:
        return ()
    targeted = {target.module for target in factors}
    ends = frozenset(names)
    others = (one.path for one in adapter.form.modules if one.path not in targeted)
    return tuple(sorted(targeted)) if any(path.rpartition(".")[2] in ends for path in others) else ()


def _last(target: Target) -> str:
    segments = target.module.split(".")
    if _kind(target) == "parameter":
        return ".".join(segments[-2:])
    return target.module if segments[-1].isdigit() else segments[-1]


def _kind(target: Target) -> str:
    return target.kind.partition("+")[0]


def _is_embedding(target: Target) -> bool:
    return _kind(target) == "embedding" or _last(target) in _EMBEDDINGS


def _name(adapter: AdapterSide) -> str:
    """A name that both command lines take: the artifact's own, without namespace and number."""
    last = adapter.reference.rpartition("/")[2].partition("@")[0]
    return _NOT_IN_A_FLAG.sub("-", last).strip("-") or "adapter"


def _named(paths: tuple[str, ...]) -> str:
    rest = len(paths) - _MOST_NAMED
    return ", ".join(paths[:_MOST_NAMED]) + (f" and {rest} more" if rest > 0 else "")
