"""What was taken away and is pushed again comes back under its number, with its bytes if they were gone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from sqlalchemy import Connection

from registry import Registry
from registry.catalog import blobs
from registry.core.errors import InUse, TagProtected, VersionNotFound


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry.init(tmp_path / "registry") as made:
        yield made


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    return {"w": torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))}


def test_a_removed_version_comes_back(registry: Registry) -> None:
    registry.push(tensors(), "walk/base", metadata={"task": "walk"})
    registry.remove("walk/base@1")
    again = registry.push(tensors(), "walk/base", tags=["v1"])
    assert (again.created, again.version, again.bytes_new) == (False, 1, 0)
    assert "it had been removed, and is back" in again.notes
    assert registry.get("walk/base:v1").metadata == {"task": "walk"}
    assert [event.kind for event in registry.events("walk/base")][-3:] == ["removed", "restored", "tag_moved"]


def test_a_purged_version_comes_back_with_its_bytes(registry: Registry, tmp_path: Path) -> None:
    registry.push(tensors(), "walk/base")
    registry.push(tensors(1), "walk/base")
    registry.pull("walk/base@1", tmp_path / "before.safetensors")
    registry.remove("walk/base@1")
    assert registry.gc(grace=timedelta(0)).purged == ("walk/base@1",)
    with pytest.raises(VersionNotFound):
        registry.restore("walk/base@1")
    again = registry.push(tensors(), "walk/base")
    assert (again.created, again.version) == (False, 1)
    assert again.bytes_new > 4 * 64 * 64
    assert "it had been removed, and is back" in again.notes
    registry.pull("walk/base@1", tmp_path / "after.safetensors")
    assert (tmp_path / "after.safetensors").read_bytes() == (tmp_path / "before.safetensors").read_bytes()
    assert registry.push(tensors(), "walk/base").bytes_new == 0


def test_a_version_comes_back_only_with_the_base_that_it_came_from(registry: Registry) -> None:
    registry.push(tensors(), "walk/base")
    registry.push(tensors(1), "walk/child", base="walk/base@1")
    registry.remove("walk/child@1", "walk/base@1")
    with pytest.raises(VersionNotFound, match="walk/base@1"):
        registry.push(tensors(1), "walk/child", base="walk/base@1")
    registry.restore("walk/base@1")
    assert registry.push(tensors(1), "walk/child", base="walk/base@1").version == 1


def test_a_purged_version_under_a_protected_tag_is_refused_before_anything_is_stored(registry: Registry) -> None:
    registry.push(tensors(), "walk/base")
    registry.push(tensors(1), "walk/base", tags=["prod"])
    registry.protect_tag("walk/base", "prod")
    registry.remove("walk/base@1")
    registry.gc(grace=timedelta(0))
    before = set(registry._context.store.blobs.digests())
    with pytest.raises(TagProtected, match="prod"):
        registry.push(tensors(), "walk/base:prod")
    assert set(registry._context.store.blobs.digests()) == before


def test_bytes_of_an_external_version_that_are_gone_before_its_rows_say_present_are_not_promised(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if it was removed, purged and recorded anew while a push wrote its bytes."""
    save_file(tensors(), tmp_path / "base.safetensors")
    registry.push(tmp_path / "base.safetensors", "walk/base", external=True)
    mark_present = blobs.mark_present

    def and_lose(connection: Connection, digests: Iterable[str]) -> None:
        mark_present(connection, digests)
        for digest in digests:
            registry._context.store.blobs.delete(digest)

    with monkeypatch.context() as patch:
        patch.setattr(blobs, "mark_present", and_lose)
        with pytest.raises(InUse, match="was deleted during the push"):
            registry.push(tmp_path / "base.safetensors", "walk/base")
    assert registry.push(tmp_path / "base.safetensors", "walk/base").bytes_new > 4 * 64 * 64
    registry.pull("walk/base", tmp_path / "pulled.safetensors")
