"""One pair, asked in process: `Registry.check` of a LoRA on all 224 linear layers of a narrow Llama with 32 layers
against its base, against the same weights under another name, and `Registry.fits` of that base. Beside it what the
same process needs for the bare reading of both state dicts' rows, the least that any answer takes.

Run: PYTHONPATH=. python benchmarks/check_pair.py
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from registry import Registry
from registry.catalog.contents import read_contents
from registry.catalog.versions import resolve
from registry.core.reference import parse_reference

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 32}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=128, **sizes))
    with tempfile.TemporaryDirectory() as folder, Registry.init(Path(folder) / "registry") as registry:
        registry.push(base, "llama/base", probe=False)
        adapter = get_peft_model(base, LoraConfig(r=8, target_modules=TARGETS))
        for name, parameter in adapter.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        registry.push(adapter, "llama/adapter", base="llama/base", probe=False)
        adapter.unload()
        registry.push(base, "copies/base", probe=False)
        for what, ask in {
            "check, recorded base": lambda: registry.check("llama/adapter"),
            "check, same weights under another name": lambda: registry.check("llama/adapter", "copies/base"),
            "fits": lambda: registry.fits("llama/base"),
            "bare reading of the rows of both": lambda: read_both(registry),
        }.items():
            first, median = measured(ask)
            print(f"{what:40} first {first:7.2f} ms   again {median:6.2f} ms")


def read_both(registry: Registry) -> None:
    with registry._context.reading() as connection:
        for reference in ("llama/adapter", "llama/base"):
            read_contents(connection, resolve(connection, parse_reference(reference)).id)


def measured(ask: Callable[[], object], rounds: int = 31) -> tuple[float, float]:
    """Milliseconds of the first call and the median of the following ones."""
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        ask()
        times.append((time.perf_counter() - begin) * 1e3)
    return times[0], statistics.median(times[1:])


if __name__ == "__main__":
    main()
