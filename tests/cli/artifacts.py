"""Adapters and a base as files, written without torch or peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

MODULES = ("q_proj", "v_proj")


def write_base(path: Path, seed: int = 0) -> Path:
    generator = np.random.default_rng(seed)
    save_file({f"{name}.weight": generator.normal(size=(16, 16)).astype(np.float32) for name in MODULES}, path)
    return path


def write_adapter(folder: Path, *, seed: int = 0, r: int = 4, nan: bool = False, **config: Any) -> Path:
    """A PEFT folder; a config value of None leaves its key out."""
    folder.mkdir()
    generator = np.random.default_rng(seed)
    tensors = {}
    for name in MODULES:
        tensors[f"base_model.model.{name}.lora_A.weight"] = generator.normal(size=(r, 16)).astype(np.float32)
        tensors[f"base_model.model.{name}.lora_B.weight"] = generator.normal(size=(16, r)).astype(np.float32)
    if nan:
        tensors["base_model.model.q_proj.lora_A.weight"][0, 0] = np.nan
    save_file(tensors, folder / "adapter_model.safetensors")
    document = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": 2 * r,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(MODULES),
        "base_model_name_or_path": "acme/walker",
        "peft_version": "0.18.0",
    } | config
    present = {key: value for key, value in document.items() if value is not None}
    (folder / "adapter_config.json").write_text(json.dumps(present))
    return folder
