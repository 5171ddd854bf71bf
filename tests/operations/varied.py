"""A registry with something of everything in it: every kind of file, component, event and state that there is."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save

from registry import Registry
from registry.core.state_document import state_document
from registry.formats.source import PlainFileInMemory, Source
from registry.operations.push import push
from registry.operations.push_request import check_request
from tests.failures.support import CONFIG, adapter_tensors, floats, peft_folder, safetensors_bytes
from tests.operations.models import lora, walker
from tests.operations.test_skeletons import Mixed, shard_source


def tensors(seed: int, *shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"w{place}": torch.randn(shape, generator=generator) for place, shape in enumerate(shapes)}


def fill(registry: Registry, folder: Path) -> None:
    """Pushes, tags and annotates; `folder` is for what is pushed."""
    adapters(registry, folder)
    checkpoints(registry, folder)
    externals(registry, folder)
    said(registry)


def adapters(registry: Registry, folder: Path) -> None:
    base = folder / "base.safetensors"
    square = {"q.weight": floats(16, 16), "v.weight": floats(16, 16, seed=1)}
    base.write_bytes(safetensors_bytes({**square, "big": floats(64, 64)}))
    registry.push(base, "walk/base:v1", metadata={"robot": "a1"}, message="the base")
    first = peft_folder(folder / "first")
    registry.push(first, "walk/perturb:prod", base="walk/base", metrics={"reward": 1.5, "loss": math.nan}, step=10)
    odd = {**CONFIG, "rank_pattern": {"v": 4, "q": 4}, "odd_key": 1.0, "peft_version": "0.18.0"}
    odd_folder = peft_folder(folder / "odd", odd)
    registry.push(odd_folder, "walk/perturb", base="walk/base", continued_from="walk/perturb@1", force=True)
    nan = adapter_tensors(seed=3)
    name = next(iter(nan))
    nan[name] = (nan[name][0], nan[name][1], b"\0\0\xc0\x7f" + nan[name][2][4:])
    broken = peft_folder(folder / "nan", tensors=nan)
    registry.push(broken, "walk/broken", parents=[("merged_from", "walk/perturb@1", 0.25)])
    registry.push(lora(walker(), seed=5), "walk/live")
    # No configuration, and the layout of the others: its targets come from the shapes.
    plain = folder / "plain.safetensors"
    plain.write_bytes(safetensors_bytes(adapter_tensors(seed=6)))
    registry.push(plain, "walk/plain")


def checkpoints(registry: Registry, folder: Path) -> None:
    model = tensors(1, (300, 400), (5,))
    whole = folder / "whole.safetensors"
    whole.write_bytes(save(model))
    registry.push(whole, "run/model", base="walk/base")
    # The next one shares a tensor, so its file is a header with tensors of two blobs.
    later = folder / "later.safetensors"
    later.write_bytes(save({**model, "w1": torch.zeros(5), "w2": torch.zeros(5)}))
    registry.push(later, "run/model", continued_from="run/model@1")
    (folder / "shards").mkdir()
    parts = {"a.safetensors": {"w0": model["w0"]}, "b.safetensors": {"w1": model["w1"], "w3": torch.ones(3, 3)}}
    with shard_source(folder / "shards", parts, PlainFileInMemory("config.json", b"{}")) as source:
        push(registry._context, source, check_request("run/shards"))
    average = {"exp_avg": torch.ones(30, 40)}
    file = Mixed("run.ckpt", {"model": model, "ema": model, "optimizer": average})
    tree = {"state": {0: {"exp_avg": average["exp_avg"]}}, "param_groups": [{"lr": 0.1}]}
    documents = {
        "optimizer": state_document(tree, tensor_name=lambda _: "exp_avg"),
        "scheduler": state_document({"last_epoch": 3}, tensor_name=lambda _: None),
    }
    source = Source(
        "checkpoint",
        "checkpoint",
        (file,),
        data=documents,
        metadata={"epoch": 3},
        described={"probe": b"a probe", "live_names": json.dumps({"a": "b"}).encode()},
    )
    push(registry._context, source, check_request("run/full"))
    # Nothing but the description is new.
    source = Source("checkpoint", "checkpoint", (file,), data=documents, described={"history": b"[]"})
    push(registry._context, source, check_request("run/full"))
    empty = Source("checkpoint", "checkpoint", (), data={"scheduler": documents["scheduler"]})
    push(registry._context, empty, check_request("run/scheduler"))


def externals(registry: Registry, folder: Path) -> None:
    big = folder / "big.safetensors"
    big.write_bytes(save(tensors(4, (100, 100), (7,))))
    registry.push(big, "hub/stays", external=True)
    then = folder / "then.safetensors"
    then.write_bytes(save(tensors(7, (100, 100))))
    registry.push(then, "hub/comes", external=True)
    registry.push(then, "hub/comes")
    registry.push({"w0": torch.zeros(2, 2)}, "hub/child", base="hub/stays")


def said(registry: Registry) -> None:
    registry.annotate("walk/perturb@1", metadata={"robot": "b2", "seed": 3, "ratio": 0.1}, metrics={"reward": 2})
    registry.annotate("walk/perturb@1", metrics={"reward": math.inf, "steps": 1e20}, step=2**40)
    registry.tag("walk/perturb@1", "best", why="it walks")
    registry.tag("walk/perturb@2", "best")
    registry.protect_tag("walk/perturb", "best")
    registry.tag("walk/perturb@2", "gone")
    registry.delete_tag("walk/perturb", "gone")
    registry.push({"w0": torch.zeros(2, 2)}, "hub/child", base="hub/stays", message="said again")
