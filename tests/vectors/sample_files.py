"""Files of the sample store that are more than one state dict in one safetensors file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.formats.pickles.assembler import Code, storage, tensor, torch_zip
from tests.vectors.tensor_bytes import Tensor, floats, nan, safetensors_file


def checkpoint_file(known: tuple[str, list[int], bytes]) -> bytes:
    """A file of torch.save with model, ema, optimizer, scheduler and what a loop counts, all in one.

    Args:
        known: dtype, shape and bytes of a tensor that is stored already.
    """
    storages: dict[str, bytes] = {}

    def saved(data: bytes, shape: tuple[int, ...], stride: tuple[int, ...]) -> Code:
        key = str(len(storages))
        storages[key] = data
        return tensor(storage(len(data) // 4, key), 0, shape, stride)

    model = {
        "q_proj.weight": saved(known[2], (16, 16), (16, 1)),
        "head.weight": saved(floats("run head", 64), (8, 8), (8, 1)),
        "head.bias": saved(floats("run bias", 8), (8,), (1,)),
        # Its bytes do not stand in the file in their own order, so they stay in the skeleton too.
        "turned.weight": saved(floats("run turned", 12), (3, 4), (1, 3)),
    }
    ema = {**model, "head.weight": saved(floats("run ema", 64), (8, 8), (8, 1))}
    moments = {
        "step": saved(floats("run step", 1), (), ()),
        "exp_avg": saved(nan(floats("run avg", 64)), (8, 8), (8, 1)),
    }
    tree: dict[str, Any] = {
        "model": model,
        "ema": ema,
        "optimizer": {
            "state": {0: moments},
            "param_groups": [{"lr": 0.001, "betas": (0.9, 0.999), "weight_decay": 0.0, "params": [0]}],
        },
        "scheduler": {"last_epoch": 3, "_last_lr": [0.001], "best": float("inf")},
        "epoch": 3,
        "global_step": 120,
        "seed": 2**60,
        "config": {"name": "walk", "task": None, "stages": ()},
    }
    return torch_zip(tree, storages)


def write_shards(folder: Path, seed: str) -> Path:
    """A model folder with one component in two shards, and the index that says which is where."""
    folder.mkdir()
    shards: dict[str, list[Tensor]] = {
        f"diffusion_pytorch_model-0000{number}-of-00002.safetensors": [
            (f"block.{number}.weight", "F32", [8, 8], floats(f"{seed} {number}", 64)),
            (f"block.{number}.bias", "F32", [8], floats(f"{seed} bias {number}", 8)),
        ]
        for number in (1, 2)
    }
    for name, tensors in shards.items():
        (folder / name).write_bytes(safetensors_file(tensors, {"format": "pt"}))
    index = {
        "metadata": {"total_size": sum(len(data) for tensors in shards.values() for *_, data in tensors)},
        "weight_map": {name: file for file, tensors in shards.items() for name, *_ in tensors},
    }
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text('{"_class_name": "UNet1DModel"}')
    return folder
