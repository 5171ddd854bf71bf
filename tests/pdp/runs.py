"""Small training runs for the tests of pdp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from pdp.workspace import DiffusionPolicyWorkspace
from tests.pdp.datasets import write_synthetic

MODEL = {
    **{"obs_dim": 11, "input_dim": 3, "output_dim": 3, "emb_dim": 32, "T_obs": 2, "T_action": 4},
    **{"n_encoder_layers": 1, "n_decoder_layers": 1, "n_head": 4, "obs_type": "ref"},
    **{"p_drop_emb": 0.1, "p_drop_attn": 0.1},
}
LORA = {"lora_r": 4, "lora_alpha": 8, "target_modules": ["mlp", "q_proj", "v_proj"]}


def configuration(folder: Path, **changed: Any) -> Any:
    """A run of 3 epochs of 8 steps, with dropout, on a data set in this folder."""
    path = folder / "data.zarr"
    if not path.exists():
        write_synthetic(path, episodes=5, steps=32)
    cfg = OmegaConf.create(
        {
            "_target_": "pdp.workspace.DiffusionPolicyWorkspace",
            "policy": {
                "model": MODEL,
                "noise_scheduler": {
                    "num_train_timesteps": 10,
                    "beta_schedule": "squaredcos_cap_v2",
                    "prediction_type": "sample",
                },
            },
            "dataset": {"path": str(path), "val_ratio": 0.2},
            "dataloader": {"batch_size": 16},
            "val_dataloader": {"batch_size": 16, "shuffle": False},
            "optimizer": {"lr": 1e-3},
            "training": {"seed": 3, "num_epochs": 3, "lr_warmup_steps": 4},
        }
    )
    for key, value in changed.items():
        OmegaConf.update(cfg, key.replace("__", "."), value)
    return cfg


def workspace(folder: Path, name: str = "run", *, registry: Any = None, **changed: Any) -> DiffusionPolicyWorkspace:
    return DiffusionPolicyWorkspace(configuration(folder, **changed), folder / name, registry=registry)


def differing(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two trees of plain values and tensors differ, bit for bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [where]
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{where}: {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [one for key in a for one in differing(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return [where]
        return [
            one for place, pair in enumerate(zip(a, b, strict=True)) for one in differing(*pair, f"{where}[{place}]")
        ]
    return [] if a == b else [f"{where}: {a!r} {b!r}"]
