"""Registries with a little of everything to export, and what has to be equal after an import."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save

from registry import Registry
from registry.core.layout import Layout, TensorSpec
from registry.core.state_document import state_document
from registry.formats.source import PlainFileInMemory, Source, TensorFile, TensorFileOnDisk
from registry.operations.push import push
from registry.operations.push_request import check_request
from tests.operations.models import QV, train, walker


class Checkpoint(TensorFile):
    """A file with tensors between bytes of its own. The `ema` is the `model` under a second name; the last tensor of
    the optimizer stands backwards in the file, so not as its plain bytes."""

    def __init__(self, path: str, model: dict[str, torch.Tensor], optimizer: dict[str, torch.Tensor]) -> None:
        self.path = path
        named = [*(("model", *one) for one in model.items()), *(("optimizer", *one) for one in optimizer.items())]
        self._data = [tensor.contiguous().numpy().tobytes() for _, _, tensor in named]
        self.layout = Layout(tuple(TensorSpec(f"{role}/{name}", "F32", tuple(one.shape)) for role, name, one in named))
        self.entries = {
            role: tuple((name, ordinal) for ordinal, (one, name, _) in enumerate(named) if one == role)
            for role in ("model", "optimizer")
        }
        self.entries["ema"] = self.entries["model"]
        self.inserts = [(1 + ordinal, ordinal) for ordinal in range(len(named) - 1)]
        self._skeleton = b"<" + b"|" * (len(named) - 1) + self._data[-1][::-1] + b">"
        self.skeleton_size = len(self._skeleton)
        self.size = self.skeleton_size + sum(map(len, self._data[:-1]))

    def tensor(self, ordinal: int) -> Iterator[memoryview]:
        yield memoryview(self._data[ordinal])

    def skeleton(self, begin: int, end: int) -> Iterator[memoryview]:
        yield memoryview(self._skeleton)[begin:end]


def push_source(registry: Registry, source: Source, name: str, **options: object) -> str:
    return push(registry._context, source, check_request(name, **options)).reference


def adapter(folder: Path, seed: int, **options: object) -> Path:
    """A PEFT folder of a trained LoRA on a Walker."""
    model = get_peft_model(walker(), LoraConfig(**(QV | options)))
    train(model, seed)
    model.save_pretrained(folder)
    return folder


def shards(folder: Path, tensors: dict[str, torch.Tensor]) -> Source:
    """Two shards, not in the order of their names, and an index."""
    names = list(tensors)
    files = []
    for path, its in {"b.safetensors": names[:2], "a.safetensors": names[2:]}.items():
        (folder / path).write_bytes(save({name: tensors[name] for name in its}, {"format": "pt"}))
        files.append(TensorFileOnDisk(path, "model", (folder / path).open("rb"), what=path))
    source = Source("folder", "base", tuple(files), (PlainFileInMemory("config.json", b'{"a": 1}'),))
    for file in files:
        source.resources.callback(file._open._file.close)
    return source


def fill(registry: Registry, folder: Path) -> list[str]:
    """A base, adapters in a line with a merge at its end, and a checkpoint that shares with the base; newest last."""
    folder.mkdir()
    base = walker().state_dict()
    base["big"] = torch.randn(400, 500, generator=torch.Generator().manual_seed(7))
    (folder / "base.safetensors").write_bytes(save(base))
    made = [registry.push(folder / "base.safetensors", "walk/base:v1").reference]
    for seed in (1, 2, 3):
        pushed = registry.push(
            adapter(folder / f"adapter{seed}", seed, r=4 if seed < 3 else 8),
            "walk/perturb",
            base="walk/base:v1",
            continued_from=f"walk/perturb@{seed - 1}" if seed > 1 else None,
            metadata={"robot": "a1", "seed": seed, "version": "1.10"},
            metrics={"reward": seed * 1.5, "loss": float("nan")},
            step=seed * 100,
            message=f"run {seed}",
        )
        made.append(pushed.reference)
    merged = registry.push(
        adapter(folder / "merged", 9),
        "walk/merged",
        base="walk/base@1",
        parents=[("merged_from", "walk/perturb@2", 0.25), ("merged_from", "walk/perturb@3", 0.75)],
    )
    made.append(merged.reference)
    optimizer = {"exp_avg": torch.zeros(400, 500), "step": torch.arange(3.0)}
    tree = {"state": optimizer, "lr": 0.1, "betas": (0.9, 0.99)}
    source = Source(
        "checkpoint",
        "checkpoint",
        (Checkpoint("run.ckpt", {"big": base["big"], "bias": torch.tensor([1.0, float("inf")])}, optimizer),),
        data={
            "optimizer": state_document(
                tree, tensor_name=lambda found: next(key for key, one in optimizer.items() if one is found)
            ),
            "scheduler": state_document({"last_epoch": 3}, tensor_name=lambda _: None),
        },
        metadata={"epoch": 3},
        described={"probe": b"seen", "live_names": json.dumps({"big": "model.big"}).encode()},
    )
    made.append(push_source(registry, source, "walk/run", base="walk/base"))
    made.append(push_source(registry, shards(folder, dict(list(base.items())[:5])), "walk/shards"))
    registry.annotate("walk/perturb@3", metadata={"robot": "b2"}, metrics={"reward": 9.5}, step=400)
    registry.annotate("walk/perturb@3", metrics={"reward": 11}, step=500)
    registry.tag("walk/perturb@2", "prod", why="it walks")
    registry.tag("walk/perturb@3", "prod", protect=True)
    registry.tag("walk/perturb@3", "newest")
    return made


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pulled(registry: Registry, reference: str, folder: Path) -> dict[str, bytes]:
    """The files of a version; a single one under its own name too."""
    folder.mkdir(parents=True)
    registry.pull(reference, folder)
    return files_of(folder)


def values(registry: Registry, reference: str) -> dict[str, object]:
    """What is the same of a version wherever it is."""
    found = registry.get(reference)
    details = registry.show(reference)
    shown = {
        name: getattr(found, name)
        for name in ("digest", "content_digest", "kind", "peft_version", "r", "lora_alpha", "size", "message")
    }
    pushed = next(event.payload for event in details.events if event.kind == "pushed")
    return shown | {
        "metadata": dict(found.metadata),
        "metrics": {key: str(value) for key, value in found.metrics.items()},
        "findings": details.findings,
        "environment": pushed["environment"],
        "nonfinite": pushed["nonfinite"],
        "said": [
            (event.kind, json.dumps(event.payload, sort_keys=True))
            for event in details.events
            if event.kind in ("metadata", "metrics", "note")
        ],
    }
