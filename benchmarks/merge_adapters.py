"""Merging three rank-16 adapters on a 400 MB model, ours against PEFT's `add_weighted_adapter` and `merge_adapter` in
the same run, warm: 12 layers, width 768, 48 targets.

Ours is the algebra from tensors in memory to factors in memory, errors included; PEFT's is the call on a model that
holds the adapters. The true-delta forms have another bound: one pass that forms every delta and adds them (`deltas`).
Prints times, their ratio, and the peak of new memory of each (of torch's allocations on the CPU, by resident size).

    PYTHONPATH=. python benchmarks/merge_adapters.py
"""

from __future__ import annotations

import gc
import resource
import statistics
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from registry.formats.live import adapter_tensors, live_config, tensor_file
from registry.merge.combine import ModuleInputs, SourceUpdate, combine
from registry.merge.compress import RankChoice
from registry.merge.group import Options
from registry.merge.lora_modules import lora_modules
from registry.merge.low_rank import LowRank
from registry.merge.methods import find_method
from registry.merge.model_weights import WeightUpdate, merged_weight

LAYERS, WIDTH, RANK, REPEATS = 12, 768, 16, 7
TARGETS = ("q", "k", "v", "o")
WEIGHTS = (0.5, 0.3, 0.2)
PAIRS = {
    "svd": ("svd", {}, RANK),
    "cat": ("cat", {}, None),
    "linear": ("linear", {}, None),
    "ties": ("ties_factors", {"density": 0.5}, None),
    "dare_linear": ("dare_linear_factors", {"density": 0.5}, None),
    "dare_ties": ("dare_ties_factors", {"density": 0.5}, None),
    "magnitude_prune": ("magnitude_prune_factors", {"density": 0.5}, None),
    "ties_svd": ("ties", {"density": 0.5}, RANK),
    "dare_linear_svd": ("dare_linear", {"density": 0.5}, RANK),
    "dare_ties_svd": ("dare_ties", {"density": 0.5}, RANK),
    "magnitude_prune_svd": ("magnitude_prune", {"density": 0.5}, RANK),
}
"""PEFT's name -> ours, options, rank."""
OWN = {"knots": {"density": 0.5}, "tsv": {}}


def model() -> nn.Module:
    def layer() -> nn.ModuleDict:
        sizes = {**dict.fromkeys(TARGETS, (WIDTH, WIDTH)), "up": (WIDTH, 4 * WIDTH), "down": (4 * WIDTH, WIDTH)}
        return nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()})

    return nn.ModuleDict({"layers": nn.ModuleList(layer() for _ in range(LAYERS)), "emb": nn.Embedding(19_000, WIDTH)})


def best(call: Callable[[], Any], repeats: int = REPEATS) -> float:
    call()
    times = []
    for _ in range(repeats):
        gc.collect()
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e3


def peak(call: Callable[[], Any]) -> float:
    """MiB of resident memory above the begin, sampled each millisecond."""
    page = resource.getpagesize()

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    gc.collect()
    begin, most, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.001):
            most = max(most, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    kept = call()
    done.set()
    watcher.join()
    del kept
    return max(0, max(most, resident()) - begin) / 2**20


def main() -> None:
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": list(TARGETS),
        "init_lora_weights": False,
    }
    peft = get_peft_model(model(), LoraConfig(**settings), adapter_name="a0")
    for name in ("a1", "a2"):
        peft.add_adapter(name, LoraConfig(**settings))
    names = ["a0", "a1", "a2"]
    layers = {path: one for path, one in peft.base_model.model.named_modules() if hasattr(one, "lora_A")}
    inputs = [
        ModuleInputs(
            path,
            (1, WIDTH, WIDTH),
            tuple(
                SourceUpdate(number, RANK, layer.scaling[name], WEIGHTS[number], reader(layer, name))
                for number, name in enumerate(names)
            ),
        )
        for path, layer in layers.items()
    ]
    total = sum(one.numel() for one in peft.base_model.model.parameters()) * 4 / 1e6
    print(f"{len(layers)} targets of {WIDTH} x {WIDTH}, model of {total:.0f} MB, {torch.get_num_threads()} threads")
    count = 0

    def theirs(kind: str) -> None:
        nonlocal count
        count += 1
        density = {} if kind in ("svd", "cat", "linear") else {"density": 0.5}
        peft.add_weighted_adapter(names, list(WEIGHTS), f"m{count}", combination_type=kind, **density)
        peft.delete_adapter(f"m{count}")
        peft.set_adapter("a0")

    def ours(method: str, options: dict[str, Any], rank: int | None) -> list[Any]:
        return list(combine(inputs, find_method(method), Options(**options), RankChoice(rank)))

    def deltas() -> None:
        for one in inputs:
            total = torch.zeros(one.shape[1:])
            for update in one.updates:
                factors = update.read()
                total.add_((factors.b[0] @ factors.a[0]) * (update.scaling * update.weight))

    bound = best(deltas)
    print(f"one pass that forms every delta: {bound:.1f} ms")
    print(f"{'PEFT':>20} {'ms':>8} {'MiB':>6}   {'ours':<24} {'ms':>8} {'MiB':>6} {'PEFT/ours':>10} {'error':>9}")
    for kind, (method, options, rank) in PAIRS.items():
        other, own = partial(theirs, kind), partial(ours, method, options, rank)
        peft_ms, our_ms = best(other, 2 if kind.endswith("svd") else REPEATS), best(own)
        peft_mib, our_mib = peak(other), peak(own)
        made = own()
        error = (sum(one.error**2 for one in made) / sum(one.norm**2 for one in made)) ** 0.5
        print(
            f"{kind:>20} {peft_ms:8.1f} {peft_mib:6.1f}   {method:<24} {our_ms:8.1f} {our_mib:6.1f} "
            f"{peft_ms / our_ms:10.1f} {error:9.2e}"
        )
    for method, options in OWN.items():
        print(f"{'-':>20} {'':8} {'':6}   {method:<24} {best(partial(ours, method, options, RANK)):8.1f}")

    tensors = adapter_tensors(peft, "a0")
    config = live_config(peft, "a0")
    modules = lora_modules(tensor_file("a", "adapter", tensors).layout, config)

    def ours_into() -> None:
        for path, layer in layers.items():
            merged_weight(layer.base_layer.weight, [WeightUpdate(modules[path], tensors, 1.0, config)], turned=False)

    theirs_ms, our_ms = once(peft, lambda: peft.merge_adapter(["a0"])), best(ours_into)
    print(
        f"{'merge into the base':>20} {theirs_ms:8.1f} {'':6}   {'merged_weight, measured':<24} {our_ms:8.1f}", end=""
    )
    print(f" {'':6} {theirs_ms / our_ms:10.1f}")


def once(peft: Any, call: Callable[[], Any]) -> float:
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
        peft.unmerge_adapter()
    return statistics.median(times) * 1e3


def reader(layer: Any, name: str) -> Callable[[], LowRank]:
    a, b = (getattr(layer, part)[name].weight.detach()[None] for part in ("lora_A", "lora_B"))
    return lambda: LowRank(a, b)


if __name__ == "__main__":
    main()
