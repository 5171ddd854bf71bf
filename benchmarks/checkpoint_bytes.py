"""Bytes that full checkpoints of one LoRA model take in a registry, against one base and their adapters.

    python benchmarks/checkpoint_bytes.py [--layers 12] [--width 768] [--rank 8] [--checkpoints 20] [--folder FOLDER]

By default the base has 400 MB, as a small language model: 12 layers of width 768 and 20,000 tokens, in float32. Every
byte below the registry's folder counts, the database included. Run twice: with the base pushed first, and with
nothing but the checkpoints. Exits with 1 where they take more than 1.01 times one base and the adapters.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from registry import Registry

LIMIT = 1.01


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)


class Model(nn.Module):
    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20_000, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))


def train(model: nn.Module) -> None:
    """New values for all that learns."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def state_bytes(model: nn.Module, part: str = "") -> int:
    return sum(tensor.nbytes for name, tensor in model.state_dict().items() if part in name)


def measure(options: argparse.Namespace, root: Path, *, base_first: bool) -> float:
    """Pushes all checkpoints, prints where the bytes went, and gives their ratio to the bytes at the least."""
    base = Model(options.layers, options.width)
    base_bytes = state_bytes(base)
    with Registry.init(root) as registry:
        empty = folder_bytes(root)
        if base_first:
            registry.push(base, "walk/base")
        model = get_peft_model(base, LoraConfig(r=options.rank, target_modules=["q_proj", "v_proj"]))
        seconds = []
        for step in range(options.checkpoints):
            train(model)
            begin = time.perf_counter()
            registry.push(
                model, "walk/run", kind="checkpoint", base="walk/base" if base_first else None, metadata={"step": step}
            )
            seconds.append(time.perf_counter() - begin)
    adapters = options.checkpoints * state_bytes(model, ".lora_")
    total = folder_bytes(root)
    beside = (total - base_bytes - adapters - empty) / options.checkpoints
    ratio = total / (base_bytes + adapters)
    print(f"{'with the base pushed first' if base_first else 'with the checkpoints alone'}:")
    print(f"  one base {base_bytes / 1e6:.1f} MB, {options.checkpoints} adapters {adapters / 1e6:.1f} MB")
    print(f"  the registry's folder {total / 1e6:.1f} MB, of it the database {_database_bytes(root) / 1e6:.2f} MB")
    print(f"  an empty registry {empty / 1e3:.0f} kB; beside its tensors a checkpoint takes {beside / 1e3:.1f} kB")
    print(
        f"  push: {seconds[0]:.2f} s the first, {sum(seconds[1:]) / max(1, len(seconds) - 1):.2f} s each of the others"
    )
    print(f"  ratio {ratio:.4f}, at most {LIMIT}")
    return ratio


def _database_bytes(root: Path) -> int:
    return sum(path.stat().st_size for path in root.glob("catalog.sqlite*"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--checkpoints", type=int, default=20)
    parser.add_argument("--folder", type=Path, help="on the disk to be used (default: the temporary folder)")
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="checkpoint-bytes-") as folder:
        ratios = [
            measure(options, Path(folder) / f"base-{base_first}", base_first=base_first) for base_first in (True, False)
        ]
    sys.exit(any(ratio > LIMIT for ratio in ratios))


if __name__ == "__main__":
    main()
