"""Parts of a registry that do not belong together in time: an older catalog beside its store, a torn blob."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from registry import Corrupt, Incompatible, InvalidInput, Registry


def test_an_older_catalog_that_was_put_back_gives_no_number_twice(tmp_path: Path) -> None:
    root = tmp_path / "registry"
    with Registry.init(root) as registry:
        registry.push({"weight": torch.ones(3)}, "walk/base")
    shutil.copy(root / "catalog.sqlite", tmp_path / "backup.sqlite")
    with Registry.open(root) as registry:
        registry.push({"weight": torch.zeros(3)}, "walk/base")
    journal = {path: path.read_bytes() for path in root.glob("journal/*/*/*.json")}
    shutil.copy(tmp_path / "backup.sqlite", root / "catalog.sqlite")
    with Registry.open(root) as registry:
        for change in (
            lambda: registry.push({"weight": torch.full((3,), 2.0)}, "walk/base"),
            lambda: registry.tag("walk/base", "prod"),
        ):
            with pytest.raises(Corrupt, match="an older catalog was put back"):
                change()
        assert [version.version for version in registry.find()] == [1]
        assert registry.push({"weight": torch.ones(3)}, "walk/other").version == 1
    with Registry.open(root) as registry:
        assert registry.get("walk/base").tags == ()
    assert {path: path.read_bytes() for path in journal} == journal


def test_a_torn_blob_is_not_reused_and_the_push_that_has_its_bytes_can_be_loaded(tmp_path: Path) -> None:
    root = tmp_path / "registry"
    shared = {f"layer.{number}": torch.randn(64, 64) for number in range(4)}
    with Registry.init(root) as registry:
        registry.push(shared, "walk/base")
        blob = max(root.glob("blobs/sha256/*/*"), key=lambda path: path.stat().st_size)
        blob.chmod(0o644)
        with blob.open("r+b") as file:
            file.truncate(blob.stat().st_size // 2)
        checkpoint = {**shared, "head": torch.randn(8)}
        assert registry.push(checkpoint, "walk/full", base="walk/base").created
        loaded = registry.load("walk/full")
        assert all(torch.equal(loaded[name], tensor) for name, tensor in checkpoint.items())
        registry.push(shared, "walk/again")  # the very file: its blob is whole again
        assert torch.equal(registry.load("walk/base")["layer.3"], shared["layer.3"])


def test_an_adapter_that_names_a_module_to_import_is_not_built(tmp_path: Path) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    model.peft_config["default"].megatron_config = {"tensor_model_parallel_size": 1}
    model.peft_config["default"].megatron_core = "antigravity"
    with Registry.init(tmp_path / "registry") as registry:
        registry.push(model, "walk/odd")
        base = nn.Sequential(nn.Linear(4, 4))
        with pytest.raises(Incompatible, match="megatron_config"):
            registry.load("walk/odd", base)
        assert type(base[0]) is nn.Linear


def test_blobs_on_an_unknown_kind_of_store_are_refused(tmp_path: Path, postgresql_url: str) -> None:
    with pytest.raises(InvalidInput, match="the blobs lie in a folder"):
        Registry.init(postgresql_url, store="s3://bucket/blobs")
