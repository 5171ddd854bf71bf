"""A merge into a base at 7B shapes, streaming: 4096 wide, 7 targets, four adapters of rank 64, bfloat16 base, float32
factors. Beside it the bound in the same run: reading all bytes of the base and the adapters once, and writing
as many as the base has, with sha256, as any content-addressed store must.

What is computed is what `Registry.merge(..., into_base=True)` computes for each tensor (read, BLAKE3, update, rounding,
its measurement, sha256, BLAKE3, write), over a few layers in a temporary registry; all 32 layers are 13 GB.
Prints seconds for the layers that ran and scaled to 32, bytes a second, and the peak of resident memory.

    PYTHONPATH=. python benchmarks/merge_into_base.py [--layers 4] [--device cuda]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from registry import Registry

WIDTH, INNER, RANK, ADAPTERS, ALL_LAYERS = 4096, 11008, 64, 4, 32
SHAPES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (WIDTH, WIDTH)),
    **dict.fromkeys(("gate_proj", "up_proj"), (INNER, WIDTH)),
    "down_proj": (WIDTH, INNER),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--method", default="cat")
    parser.add_argument("--density", type=float)
    asked = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name, Registry.init(Path(name) / "registry") as registry:
        folder = Path(name)
        weights = {
            f"layers.{layer}.{path}.weight": torch.randn(shape, dtype=torch.bfloat16) * 0.02
            for layer in range(asked.layers)
            for path, shape in SHAPES.items()
        }
        save_file(weights, folder / "base.safetensors")
        registry.push(folder / "base.safetensors", "llama/base")
        size = (folder / "base.safetensors").stat().st_size
        del weights
        for number in range(ADAPTERS):
            push_adapter(registry, folder / f"a{number}", f"llama/a{number}", asked.layers)
        sources = {f"llama/a{number}": 0.25 for number in range(ADAPTERS)}
        adapters = sum(
            (folder / f"a{number}" / "adapter_model.safetensors").stat().st_size for number in range(ADAPTERS)
        )
        bound = copying(folder, size)
        begin = time.perf_counter()
        result = registry.merge(
            sources, "llama/merged", into_base=True, device=asked.device, method=asked.method, density=asked.density
        )
        seconds = time.perf_counter() - begin
    scale = ALL_LAYERS / asked.layers
    print(
        f"{asked.layers} of {ALL_LAYERS} layers: base {size / 1e9:.2f} GB, adapters {adapters / 1e9:.2f} GB, "
        f"{asked.device}"
    )
    print(f"bound, read and write once with sha256: {bound:.2f} s, of {ALL_LAYERS} layers {bound * scale:.1f} s")
    print(f"merge into the base ({asked.method}): {seconds:.2f} s, of {ALL_LAYERS} layers {seconds * scale:.1f} s")
    print(f"ratio {seconds / bound:.1f}; {2 * size / seconds / 1e9:.2f} GB/s; unmoved {result.unmoved or 0:.1%}")
    print(f"peak resident {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB, with set-up")


def push_adapter(registry: Registry, folder: Path, name: str, layers: int) -> None:
    import json

    folder.mkdir()
    tensors = {}
    for layer in range(layers):
        for path, (rows, columns) in SHAPES.items():
            start = f"base_model.model.layers.{layer}.{path}"
            tensors[f"{start}.lora_A.weight"] = torch.randn(RANK, columns) * 0.01
            tensors[f"{start}.lora_B.weight"] = torch.randn(rows, RANK) * 0.01
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": list(SHAPES)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    registry.push(folder, name, base="llama/base")


def copying(folder: Path, size: int) -> float:
    """Seconds to read all files once and write the base's bytes once, hashed and made durable."""
    begin = time.perf_counter()
    digest = hashlib.sha256()
    for number in range(ADAPTERS):
        with (folder / f"a{number}" / "adapter_model.safetensors").open("rb") as file:
            while file.read(4 << 20):
                pass
    with (folder / "base.safetensors").open("rb") as file, (folder / "copy").open("wb") as out:
        while chunk := file.read(4 << 20):
            digest.update(chunk)
            out.write(chunk)
        out.flush()
        os.fsync(out.fileno())
    (folder / "copy").unlink()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
