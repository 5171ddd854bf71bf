"""Adapters with each other at 7B shapes: 4096 wide, 7 targets a layer, four adapters of rank 64 in float32, result in
rank 64. Beside each method the bound in the same run: forming every dense update once and adding it up (of the exact
methods none is formed at all).

Prints seconds for the layers that ran, scaled to 32.

    PYTHONPATH=. python benchmarks/merge_wide.py [--layers 1] [--device cuda]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch

from registry.merge.combine import Arithmetic, ModuleInputs, SourceUpdate, combine
from registry.merge.compress import RankChoice
from registry.merge.group import Options
from registry.merge.low_rank import LowRank
from registry.merge.methods import DENSE, find_method

WIDTH, INNER, RANK, ADAPTERS, ALL_LAYERS = 4096, 11008, 64, 4, 32
SHAPES = [*[(WIDTH, WIDTH)] * 4, *[(INNER, WIDTH)] * 2, (WIDTH, INNER)]
METHODS = ("svd", "knots", "tsv", "ties", "dare_linear", "dare_ties", "magnitude_prune")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--methods", nargs="*", default=METHODS)
    asked = parser.parse_args()
    torch.manual_seed(0)
    modules = [
        ModuleInputs(
            f"layers.{layer}.{place}",
            (1, rows, columns),
            tuple(SourceUpdate(one, RANK, 1.0, 0.25, factors(rows, columns)) for one in range(ADAPTERS)),
        )
        for layer in range(asked.layers)
        for place, (rows, columns) in enumerate(SHAPES)
    ]
    scale = ALL_LAYERS / asked.layers
    print(f"{len(modules)} modules, {asked.layers} of {ALL_LAYERS} layers, {asked.device}")
    bound = measured(lambda: deltas(modules, asked.device), asked.device)
    print(f"{'every update formed once':26} {bound:8.2f} s, of all layers {bound * scale:8.1f} s")
    for name in asked.methods:
        options = Options(density=0.5 if name in (*DENSE, "knots") else 1.0)
        seconds = measured(partial(merged, modules, name, options, asked.device), asked.device)
        ratio = f"{seconds / bound:5.1f} times the bound" if name in DENSE else ""
        print(f"{name:26} {seconds:8.2f} s, of all layers {seconds * scale:8.1f} s  {ratio}")


def factors(rows: int, columns: int) -> Callable[[], LowRank]:
    update = LowRank(torch.randn(1, RANK, columns), torch.randn(1, rows, RANK))
    return lambda: update


def deltas(modules: list[ModuleInputs], device: str) -> None:
    for one in modules:
        total = torch.zeros(one.shape[1:], device=device)
        for update in one.updates:
            found = update.read()
            total.addmm_(found.b[0].to(device), found.a[0].to(device), alpha=update.weight)


def merged(modules: list[ModuleInputs], name: str, options: Options, device: str) -> None:
    arithmetic = Arithmetic(device=device)
    for one in combine(modules, find_method(name), options, RankChoice(RANK), arithmetic=arithmetic):
        assert one.factors is not None


def measured(call: Callable[[], None], device: str) -> float:
    """Seconds, warm."""
    call()
    begin = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
