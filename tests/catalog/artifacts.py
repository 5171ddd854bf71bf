"""Tiny artifacts to push, made without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

MODULE = "base_model.model.layers.0.{}.lora_{}.weight"


def tensor_file(folder: Path, value: float, *, names: tuple[str, ...] = ("weight",)) -> Path:
    """A safetensors file of a base; another value is another version."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"base-{value}.safetensors"
    path.write_bytes(save({name: np.full((2, 2), value, np.float32) for name in names}))
    return path


def adapter_tensors(value: float, *, r: int = 2, modules: tuple[str, ...] = ("q_proj",)) -> bytes:
    tensors = {}
    for module in modules:
        tensors[MODULE.format(module, "A")] = np.full((r, 4), value, np.float32)
        tensors[MODULE.format(module, "B")] = np.full((4, r), value, np.float32)
    return save(tensors)


def peft_folder(
    folder: Path, value: float, *, r: int = 2, modules: tuple[str, ...] = ("q_proj",), **config: Any
) -> Path:
    """A PEFT folder; another value is another version of the same layout."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(adapter_tensors(value, r=r, modules=modules))
    document = {"peft_type": "LORA", "r": r, "lora_alpha": 2 * r, "target_modules": sorted(modules), **config}
    (folder / "adapter_config.json").write_text(json.dumps(document))
    return folder
