"""The content digest of docs/format.md, read from that page alone, as far as it goes: what it leaves to other code is
not recomputed."""

from __future__ import annotations

import math
import re
from typing import Any

from tests.conformance.independent_documents import Spec, is_text, words

TUNER_NAMES = {
    "one tensor": """adamss_newB beft_bias boft_R boft_s c3a_kernel deft_P deft_R delora_A delora_B delora_lambda
        delora_w_norm fourierft_spectrum frod_lambda_l frod_lambda_s_values gralora_A gralora_B hada_t1 hada_t2
        hada_w1_a hada_w1_b hada_w2_a hada_w2_b hira_A hira_B hira_embedding_A hira_embedding_B hra_u ia3_l lokr_t2
        lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b lora_E lora_diag lora_embedding_A lora_embedding_B
        lora_velora_embed miss_block poly_lora_A poly_lora_B pvera_A pvera_B pvera_lambda_b pvera_lambda_d randlora_A
        randlora_B randlora_gamma randlora_lambda ranknum road_alpha road_theta shira_indices shira_weight
        supertuning_indices supertuning_values tinylora_A tinylora_B tinylora_P trainable_tokens_delta
        trainable_tokens_original unilora_indices_A unilora_indices_B unilora_scales_A unilora_scales_B
        unilora_theta_d vblora_logits_A vblora_logits_B vblora_vector_bank vera_A vera_B vera_lambda_b vera_lambda_d
        waveft_spectrum""",
    "one module": """glora_A glora_B glora_C glora_D glora_E gralora_A_general gralora_B_general lily_A lily_B
        lily_router ln_tuning_layers lora_arrow lora_magnitude_vector lora_monteclora_sampler oft_R oft_embedding_R
        osf_svd_params peanut_A peanut_B poly_router psoft_R supertuning_lora_A supertuning_lora_B""",
    "tensor or module": "lora_A lora_B",
    "a list": "adamss_A adamss_B peanut_decoders peanut_encoders tinylora_v",
    "by module": "frod_V frod_s_indices frod_s_size",
    "renamed": """shadow_backbone shadow_down shadow_head shadow_projection shadow_up shadow_update_gate
        shadow_update_transform""",
    "one adapter": """adaption_gate adaption_prompt internal_xlora_classifier prefix_task_cols prefix_task_rows
        prompt_embeddings vblora_logits_A_topk_indices vblora_logits_A_topk_weights vblora_logits_B_topk_indices
        vblora_logits_B_topk_weights""",
}
TUNER_GROUP = {name: group for group, names in TUNER_NAMES.items() for name in words(names)}
KNOWN_LORA_KEYS = words(
    """alora_invocation_tokens alpha_pattern arrow_config auto_mapping base_model_name_or_path bias corda_config
    ensure_weight_tying eva_config exclude_modules fan_in_fan_out inference_mode init_lora_weights kasa_config
    layer_replication layers_pattern layers_to_transform loftq_config lora_alpha lora_bias lora_dropout lora_ga_config
    megatron_config megatron_core modules_to_save monteclora_config peft_type peft_version qalora_group_size r
    rank_pattern revision runtime_config target_modules target_parameters task_type trainable_token_indices use_bdlora
    use_dora use_qalora use_rslora velora_config"""
)
OPTIONS = words("""alora_invocation_tokens arrow_config kasa_config layer_replication monteclora_config
    trainable_token_indices use_bdlora use_dora use_qalora""")
LAYERS = ("base_layer", "original_module", "token_adapter")


def unwrapped(name: str) -> list[str]:
    inner = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
    segments = [segment for segment in name.split(".") if segment not in inner]
    wrappers = (["base_model", "model"], ["base_model", "lora_model", "model"], ["module"])
    while found := [w for w in wrappers if segments[: len(w)] == w and len(segments) > len(w)]:
        segments = segments[len(found[0]) :]
    return segments


def canonical_name(name: str) -> str:
    segments = unwrapped(name)
    for place, segment in enumerate(segments):
        rest = segments[place + 1 :]
        if segment == "modules_to_save" and rest:
            return ".".join(segments[:place] + (rest[1:] if len(rest) > 1 else rest))
        if segment in TUNER_GROUP:
            return ".".join(segments[: place + 1] + without_adapter(segment, rest))
    return ".".join(segments)


def without_adapter(segment: str, rest: list[str]) -> list[str]:
    group = TUNER_GROUP[segment]
    if segment == "lora_magnitude_vector":
        return [] if len(rest) == 1 or (len(rest) == 2 and rest[1] == "weight") else rest
    if group == "by module":
        return rest[:1] if len(rest) == 2 else rest
    if group == "one tensor":
        return [] if len(rest) == 1 else rest
    if group == "tensor or module":
        return rest if rest in (["weight"], ["bias"]) else rest[1:]
    if group == "one module":
        return rest[1:] if len(rest) > 1 else rest
    if group == "a list":
        return rest[1:] if len(rest) > 1 and rest[1].isdigit() else rest
    if group == "renamed":
        return ["default", *rest[1:]] if len(rest) > 1 else rest
    return rest


def plain_path(segments: list[str]) -> str:
    return ".".join(segment for place, segment in enumerate(segments) if place == 0 or segment not in LAYERS)


def content_document(
    kind: str, components: dict[str, tuple[list[Spec], list[str]]], config: dict[str, Any] | None
) -> dict[str, Any] | None:
    """What the content digest is the sha256 of; None where docs/format.md leaves it to other code."""
    parts = {
        role: sorted({(canonical_name(spec[0]), digest) for spec, digest in zip(specs, digests, strict=True)})
        for role, (specs, digests) in components.items()
        if specs
    }
    document = {"format": 1, "components": {r: [list(p) for p in pairs] for r, pairs in parts.items()}, "config": None}
    if config is None:
        return document
    tuner = config["peft_type"].upper()
    if tuner != "LORA":
        outside = ("base_model_name_or_path", "revision", "task_type", "peft_type")
        rest = {k: v for k, v in config.items() if v is not None and k not in outside and "dropout" not in k}
        return {**document, "config": {"tuner": tuner, "config": rest}}
    # A checkpoint has base weights beside those of its adapter, for which the page has no rules.
    modules = lora_modules(components["adapter"][0], config) if kind == "adapter" else None
    if modules is None:
        return None
    options = {k: config[k] for k in config if (k in OPTIONS or k not in KNOWN_LORA_KEYS) and config[k]}
    if "use_qalora" in options:
        options["qalora_group_size"] = config.get("qalora_group_size")
    init = config.get("init_lora_weights")
    if is_text(init) and init not in ("gaussian", "eva", "orthogonal", "mica", "true", "false"):
        options["init_lora_weights"] = init
    return {**document, "config": {"tuner": tuner, "modules": modules, "options": options}}


def lora_modules(specs: list[Spec], config: dict[str, Any]) -> list[list[Any]] | None:
    if config.get("target_parameters") or config.get("trainable_token_indices") or config.get("use_bdlora"):
        return None
    wrapped: dict[str, dict[str, tuple[int, ...]]] = {}
    copied: dict[str, set[str]] = {}
    saved: set[str] = set()
    for name, _, shape in specs:
        segments = canonical_name(name).split(".")
        place = next((place for place, segment in enumerate(segments) if segment in TUNER_GROUP), None)
        if place is None:
            if any(segment.startswith("lora_") for segment in segments) or "original_module" in segments:
                return None
            module = plain_path(segments).rpartition(".")[0]
            copied.setdefault(module, set()).add(segments[-1])
            if ".modules_to_save." in name:
                saved.add(module)
        elif not segments[place].startswith("lora_") or place == 0 or set(segments[1:place]) & set(LAYERS):
            return None
        else:
            wrapped.setdefault(".".join(segments[:place]), {})[".".join(segments[place:])] = shape
    found: dict[str, list[Any]] = {}
    for module, shapes in wrapped.items():
        a = shapes.get("lora_A.weight") or shapes.get("lora_A")
        b = shapes.get("lora_B.weight") or shapes.get("lora_B")
        if a and copied.get(module, set()) - {"bias"}:
            return None  # base weights
        if "lora_embedding_A" in shapes or "lora_embedding_B" in shapes:
            a, b = shapes.get("lora_embedding_A"), shapes.get("lora_embedding_B")
        if a is None or b is None or len(a) != len(b) or not 2 <= len(a) <= 5 or 0 in a or 0 in b:
            continue
        if len(a) == 2 and a[0] != b[1]:
            continue
        if len(a) > 2 and (a[0] % b[1] or any(size != 1 for size in b[2:])):
            continue
        found[module] = [module, False, a[0], scaling(config, module, a[0])]
    for module, leaves in copied.items():
        named = config.get("modules_to_save") or []
        ends = [".".join(module.split(".")[: n + 1]) for n in range(module.count(".") + 1)]
        whole = leaves != {"bias"} or module in saved or any(end.endswith(tuple(named)) for end in ends)
        if module in found:
            found[module][1] = leaves != {"bias"}
        else:
            found[module] = [module, whole, 0, None]
    return [found[module] for module in sorted(found)]


def scaling(config: dict[str, Any], module: str, rank: int) -> float | None:
    alpha = config.get("lora_alpha")
    for key, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            alpha = value
            break
    if alpha is None:
        return None
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
