"""A tree as a team has it after a year: runs of a trainer, flat folders, a hub cache, bases, duplicates, junk and
damage. Everything that is whole in it was saved by PEFT, transformers or torch itself."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.formats.saved_models import save_model
from tests.operations.models import Walker, lora, walker, zoo

LEGACY = Path(__file__).parents[1] / "formats" / "legacy"
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1234\n"


def save_adapter(
    folder: Path, *, seed: int, recorded: str | None = "models/walker", base: Any = None, **options: Any
) -> Path:
    """A PEFT folder as `save_pretrained` writes it."""
    lora(base, seed=seed, **options).save_pretrained(folder)
    # Set here, as PEFT would look it up when it saves.
    config = json.loads((folder / "adapter_config.json").read_bytes())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": recorded}))
    return folder


def save_checkpoint(folder: Path, *, step: int, every: int = 500, loss_from: float = 1.0, **options: Any) -> Path:
    """What transformers' Trainer leaves: an adapter with its optimizer, random state and log."""
    save_adapter(folder, seed=step, **options)
    torch.save({"state": {0: {"exp_avg": torch.full((4,), float(step))}}, "param_groups": []}, folder / "optimizer.pt")
    torch.save({"last_epoch": step}, folder / "scheduler.pt")
    torch.save({"python": [step]}, folder / "rng_state.pth")
    torch.save({"output_dir": "out"}, folder / "training_args.bin")
    log = [{"step": at, "loss": loss_from / at} for at in range(every, step + 1, every)]
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "epoch": 1.5, "log_history": log}))
    return folder


def hub_snapshot(cache: Path, hub_id: str, revision: str, source: Path, *, is_main: bool = True) -> Path:
    """A folder as the hub's client keeps it: files in `blobs`, links in `snapshots/<revision>`."""
    home = cache / f"models--{hub_id.replace('/', '--')}"
    snapshot = home / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir(exist_ok=True)
    for file in sorted(source.iterdir()):
        blob = home / "blobs" / f"{revision}-{file.name}".replace(".", "_")
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    if is_main:
        (home / "refs").mkdir(exist_ok=True)
        (home / "refs" / "main").write_text(revision)
    return snapshot


class Taller(Walker):
    """A Walker with another width, so that no adapter of the one fits the other."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = torch.nn.Linear(24, 16)


def build(root: Path) -> Path:
    """The tree."""
    models = root / "models"
    models.mkdir(parents=True)
    save_file(walker().state_dict(), models / "walker.safetensors")
    torch.save(Taller().state_dict(), models / "taller.pth")
    save_model("llama", models / "llama tiny")
    llama = models / "llama tiny"

    # Runs of a trainer.
    for step in (500, 1000, 1500):
        save_checkpoint(root / f"runs/2026-03-Walk/checkpoint-{step}", step=step)
    shutil.copytree(root / "runs/2026-03-Walk/checkpoint-1500", root / "runs/2026-03-Walk/final")
    (root / "runs/2026-03-Walk/final/optimizer.pt").unlink()
    (root / "runs/2026-03-Walk/latest").symlink_to("checkpoint-1500")
    output = save_adapter(root / "runs/carry", seed=90)  # the trainer's output folder is an adapter itself
    for step in (10, 20):
        save_checkpoint(output / f"checkpoint-{step}", step=step, every=10)
    save_checkpoint(root / "runs/restarted/checkpoint-10", step=10, every=10, r=2)
    save_checkpoint(root / "runs/restarted/checkpoint-20", step=20, every=10, r=2, loss_from=7.0)
    for seed in (1, 2):
        save_adapter(root / f"sweep/seed_{seed}", seed=100 + seed)
    save_adapter(root / "a/Wälk (best)", seed=200, recorded=None)
    save_adapter(root / "b/Wälk (best)", seed=201, recorded="/home/someone/models/walker")
    save_adapter(root / "走る", seed=202)
    save_adapter(
        root / "other/unknown-base", seed=203, recorded="acme/never-heard-of-it", base=zoo(), target_modules=["lin"]
    )
    save_adapter(root / "other/wrong-base", seed=204, recorded="models/taller")

    # Flat folders.
    flat = root / "flat"
    flat.mkdir()
    for name in ("lora_adapters.pth", "lora_full.pth", "lora_checkpoint.pth", "workspace.ckpt", "merged.pth"):
        shutil.copy(LEGACY / name, flat / name)
    save_file(lora(seed=300).state_dict(), flat / "walk_step_7.safetensors")
    save_file(lora(seed=301).state_dict(), flat / "walk_step_30.safetensors")
    torch.save([torch.zeros(3), "a list"], flat / "embeddings.pt")
    torch.save({"names": ["a"]}, flat / "vocabulary.pt")

    # A hub cache.
    hub = root / "hub"
    hub_snapshot(hub, "acme/llama-tiny", "0" * 40, llama)
    adapter = save_adapter(root / "scratch", seed=400, recorded="acme/llama-tiny", base=llama_of(llama))
    hub_snapshot(hub, "acme/walk-lora", "1" * 40, adapter)
    shutil.rmtree(adapter)
    only_config = root / "only-config"
    only_config.mkdir()
    shutil.copy(llama / "config.json", only_config / "config.json")
    hub_snapshot(hub, "acme/half", "2" * 40, only_config)
    (hub / "datasets--acme--walks").mkdir()
    (hub / "datasets--acme--walks" / "x.safetensors").write_bytes(b"not a model")

    # Damage: `only-config` too.
    truncated = save_adapter(root / "broken/truncated", seed=500)
    whole = (truncated / "adapter_model.safetensors").read_bytes()
    (truncated / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
    pointer = save_adapter(root / "broken/pointer", seed=501)
    (pointer / "adapter_model.safetensors").write_bytes(LFS_POINTER)
    (root / "broken/pointer.pth").write_bytes(LFS_POINTER)
    (root / "broken/empty.pt").write_bytes(b"")
    (save_adapter(root / "broken/no-tensors", seed=502) / "adapter_model.safetensors").unlink()
    (save_adapter(root / "broken/no-config", seed=503) / "adapter_config.json").unlink()
    (root / "broken/shards").mkdir()
    for number in (1, 2):
        save_file({"x": torch.zeros(2)}, root / f"broken/shards/model-0000{number}-of-00002.safetensors")
    (root / "broken/dangling.pth").symlink_to("nowhere.pth")

    # Junk.
    for path in (
        "wandb/run-1/x.safetensors",
        ".git/config",
        ".cache/x.pth",
        "logs/train.log",
        "plots/a.png",
        "notes.md",
    ):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"junk")
    (root / "data.bin").write_bytes(bytes(range(256)) * 8)
    (root / "loop").symlink_to(".")
    (root / "up").symlink_to("..")
    return root


def llama_of(folder: Path) -> torch.nn.Module:
    """The model that was saved there, without the name of where it came from."""
    import transformers

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(folder))
    model.config.name_or_path = ""
    return model
