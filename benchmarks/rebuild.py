"""How long `reindex` and `fsck` take: a registry of many small versions is made by real pushes, then checked and
rebuilt. The bare lower bound is reading every journal object and every manifest once and hashing it."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from registry import Registry
from registry.core.journal_document import read_event

A_NAME = 50
TENSORS = 16
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q", "v"], "peft_version": "0.18.0"}


def fill(root: Path, versions: int) -> None:
    """Adapters of 16 tensors on one base, each with metadata, metrics and a tag, each continuing the one before."""
    folder = root.parent / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    generator = torch.Generator().manual_seed(0)
    layers = [f"base_model.model.{layer}.{part}" for layer in range(TENSORS // 4) for part in ("q", "v")]
    with Registry.init(root) as registry:
        registry.push({"weight": torch.zeros(64, 64)}, "bench/base")
        for number in range(versions):
            tensors = {}
            for layer in layers:
                tensors[f"{layer}.lora_A.weight"] = torch.randn(4, 16, generator=generator)
                tensors[f"{layer}.lora_B.weight"] = torch.randn(16, 4, generator=generator)
            (folder / "adapter_model.safetensors").write_bytes(save(tensors))
            name = f"bench/adapter-{number // A_NAME:05}"
            more: dict[str, Any] = {"continued_from": name} if number % A_NAME else {}
            registry.push(
                folder, f"{name}:newest", base="bench/base", metadata={"seed": number}, metrics={"loss": 0.5}, **more
            )


def copy_names(root: Path, copies: int) -> None:
    """Gives every adapter's journal to other names too, as a manifest may be a version of several; blobs are shared."""
    for folder in sorted(root.glob("journal/bench/adapter-*")):
        for copy in range(copies):
            name = f"copy-{copy:04}-{folder.name}"
            other = folder.with_name(name)
            other.mkdir()
            for path in folder.iterdir():
                registry, event = read_event(path.read_bytes(), path.name)
                payload = json.loads(json.dumps(event.payload).replace(f"bench/{folder.name}@", f"bench/{name}@"))
                (other / path.name).write_bytes(replace(event, name=name, payload=payload).document(registry))


def timed(what: str, function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    seconds = time.perf_counter() - begin
    print(f"{what:32} {seconds:8.2f} s")
    return seconds


def read_all(root: Path) -> None:
    with Registry.open(root) as registry:
        manifests = [version.digest for version in registry.find()]
    for path in (*root.glob("journal/*/*/*.json"), *(root / "blobs/sha256" / one[:2] / one for one in manifests)):
        sha256(path.read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--versions", type=int, default=300)
    parser.add_argument("--copies", type=int, default=0, help="so many further names for each, with the same versions")
    parser.add_argument("--no-sync", action="store_true", help="make the registry without fsync")
    parser.add_argument("--keep", type=Path, help="make it here, or use the one that is here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = (given.keep or Path(scratch)) / "registry"
        if not root.exists():
            real = os.fsync
            if given.no_sync:
                os.fsync = lambda _descriptor: None
            root.parent.mkdir(parents=True, exist_ok=True)
            timed(f"{given.versions} pushes", lambda: fill(root, given.versions))
            os.fsync = real
        if given.copies:
            copy_names(root, given.copies)
            Registry.reindex(root)
        bare = timed("journal and manifests read", lambda: read_all(root))
        for what, function in (
            ("fsck", lambda: _whole(Registry.fsck(root).problems)),
            ("fsck --deep", lambda: _whole(Registry.fsck(root, deep=True).problems)),
            ("reindex in place", lambda: Registry.reindex(root)),
        ):
            seconds = timed(what, function)
            print(f"{'':32} {seconds / bare:8.1f} times the bare reading")
        (root / "catalog.sqlite").unlink()
        timed("reindex of a lost catalog", lambda: Registry.reindex(root))
        _whole(Registry.fsck(root).problems)


def _whole(problems: object) -> None:
    if problems:
        raise SystemExit(f"the registry is not whole: {problems}")


if __name__ == "__main__":
    main()
