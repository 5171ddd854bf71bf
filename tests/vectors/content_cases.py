"""Content digests: what does not change them and what does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from registry.core.adapter_config import adapter_config, canonical_config
from registry.core.adapter_names import targets_of
from registry.core.content_digest import content_digest
from registry.core.layout import Layout, TensorSpec
from tests.vectors.tensor_bytes import hexes

FILE_NAMES = (
    "base_model.model.b.k.lora_A.weight",
    "base_model.model.b.k.lora_B.weight",
    "base_model.model.b.q.lora_A.weight",
    "base_model.model.b.q.lora_B.weight",
    "base_model.model.head.weight",
)
LIVE_NAMES = (
    "module.base_model.model.head.modules_to_save.walk.weight",
    "module.base_model.model.b.q.lora_B.walk.weight",
    "module.base_model.model.b.q.lora_A.walk.weight",
    "module._orig_mod.base_model.model.b.k.lora_B.walk.weight",
    "base_model.model.b.k.lora_A.walk.weight",
)
SHAPES = {"k.lora_A": [4, 6], "k.lora_B": [8, 4], "q.lora_A": [4, 6], "q.lora_B": [8, 4], "head": [2, 8]}
FOLDER_CONFIG = {
    "alpha_pattern": {},
    "auto_mapping": {"base_model_class": "Walker", "parent_library": "walk"},
    "base_model_name_or_path": "someone/walker",
    "bias": "none",
    "inference_mode": True,
    "init_lora_weights": True,
    "lora_alpha": 8,
    "lora_dropout": 0.1,
    "modules_to_save": ["head"],
    "peft_type": "LORA",
    "peft_version": "0.18.0",
    "r": 4,
    "rank_pattern": {},
    "target_modules": ["q", "k"],
    "use_dora": False,
    "use_rslora": False,
}
LIVE_CONFIG = {
    **{key: value for key, value in FOLDER_CONFIG.items() if key not in ("peft_version", "auto_mapping")},
    "inference_mode": False,
    "base_model_name_or_path": None,
    "lora_dropout": 0.0,
    "target_modules": ["b.k", "b.q"],
}


def content_vectors() -> list[dict[str, Any]]:
    def tensors(names: Sequence[str], *without: str) -> list[list[Any]]:
        rows = []
        for name in names:
            part = next(part for part in SHAPES if f".{part}." in name)
            if part not in without:
                rows.append([name, "F32", SHAPES[part], hexes(part)])
        return rows

    def embedding() -> list[list[Any]]:
        return [
            ["base_model.model.tokens.lora_embedding_A", "BF16", [2, 100], hexes("eA")],
            ["base_model.model.tokens.lora_embedding_B", "BF16", [16, 2], hexes("eB")],
            ["base_model.model.conv.lora_A.weight", "F16", [2, 3, 5, 5], hexes("cA")],
            ["base_model.model.conv.lora_B.weight", "F16", [7, 2, 1, 1], hexes("cB")],
        ]

    folder, live = {"adapter": tensors(FILE_NAMES)}, {"adapter": tensors(LIVE_NAMES)}
    headless = {"adapter": tensors(FILE_NAMES, "head")}
    weight, bias = ["F32", [8, 6], hexes("w")], ["F32", [8], hexes("v")]
    base = [["b.q.weight", *weight], ["b.q.bias", *bias]]
    wrapped = [["module.b.q.bias", *bias], ["module._orig_mod.b.q.weight", *weight]]
    ia3 = {
        "peft_type": "IA3",
        "peft_version": "0.18.0",
        "target_modules": ["q"],
        "feedforward_modules": [],
        "fan_in_fan_out": False,
        "init_ia3_weights": True,
        "task_type": None,
    }

    def config(*without: str, **keys: Any) -> dict[str, Any]:
        return {key: value for key, value in {**FOLDER_CONFIG, **keys}.items() if key not in without}

    cases: list[tuple[str, str, Mapping[str, list[list[Any]]], dict[str, Any] | None]] = [
        ("a folder", "one adapter", folder, config()),
        ("the same adapter live, wrapped, under the name walk", "one adapter", live, LIVE_CONFIG),
        ("alpha as a float", "one adapter", folder, config(lora_alpha=8.0)),
        ("alpha from a pattern", "one adapter", folder, config(lora_alpha=1, alpha_pattern={".*[kq]": 8})),
        ("another alpha", "scaling 4", folder, config(lora_alpha=16)),
        ("rsLoRA that comes to the same", "scaling 4", folder, config(use_rslora=True)),
        ("rsLoRA", "", folder, config(lora_alpha=3, use_rslora=True)),
        ("alpha of one module", "", folder, config(alpha_pattern={"k": 16})),
        ("the first pattern counts", "", folder, config(alpha_pattern={"b.k": 4, "k": 16})),
        ("a flag that changes the function", "", folder, config(use_dora=True)),
        ("an init that changes the base", "", folder, config(init_lora_weights="pissa")),
        ("an option of a PEFT to come", "", folder, config(use_magic=2)),
        ("the same option, off", "one adapter", folder, config(use_magic=False)),
        ("without the copied head", "", headless, config()),
        ("without a configuration", "", folder, None),
        ("alpha unknown", "", folder, config("lora_alpha")),
        ("embedding and convolution", "", {"adapter": embedding()}, config(r=2, lora_alpha=3)),
        ("IA3", "", {"adapter": [["base_model.model.b.q.ia3_l", "F32", [8, 1], hexes("ia3")]]}, ia3),
        ("a base model", "one base", {"model": base}, None),
        ("the same in another order, wrapped", "one base", {"model": wrapped}, None),
        ("the same in another role", "", {"ema": base}, None),
    ]
    found = []
    for what, same, components, document in cases:
        about = None if document is None else adapter_config(document)
        parts = {
            role: (
                Layout(tuple(TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape, _ in rows)),
                [digest for *_, digest in rows],
            )
            for role, rows in components.items()
        }
        targets = targets_of(parts["adapter"][0], about)[0] if "adapter" in parts else ()
        found.append(
            {
                "what": what,
                "same": same,
                "components": components,
                "config": document,
                "canonical_config": None if about is None else canonical_config(about),
                "digest": content_digest(parts, about, targets),
            }
        )
    return found
