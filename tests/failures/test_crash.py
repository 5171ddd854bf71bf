"""A process that is killed in the middle: at every stage of a push the version is afterwards absent or whole, the
registry opens, and the same push again ends where it would have ended."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from registry import Registry
from registry.core.errors import ArtifactNotFound
from registry.operations import writing
from registry.store import open_store
from tests.failures.stages import killed_at_every_stage
from tests.failures.support import (
    adapter_tensors,
    model_tensors,
    peft_folder,
    quick_folder,
    succeeds_alone,
    tensor_file,
    warm_up,
    whole,
)


def push_of(scenario: str, folder: Path) -> Callable[[Registry], str]:
    """A push, and what it gives: the version's digest.

    Args:
        scenario: `whole` stores a PEFT folder of new tensors as it is, with all that can be said of it; `parts` a
            checkpoint of which the base is there already, after it was written as a whole, as happens to a large file
            that looked new.
    """
    said: dict[str, Any] = {"base": "walk/base"}
    if scenario == "whole":
        source = peft_folder(folder / "adapter")
        said |= {"tags": ["prod"], "metrics": {"reward": 1.5}}
    else:
        base = {name.replace(".weight", ".base_layer.weight"): tensor for name, tensor in model_tensors().items()}
        source = tensor_file(folder / "model.safetensors", {**base, **adapter_tensors()})
        writing.STREAM_MIN_BYTES = 1
    return lambda registry: registry.push(source, "walk/new", **said).digest


def holds_only_whole_blobs(root: Path) -> None:
    store = open_store(root)
    digests = set(store.blobs.digests())
    assert {path.name for path in (root / "blobs").rglob("*") if path.is_file()} == digests
    for digest in digests:
        store.blobs.verify(digest)


def killed_pushes(template: str, scenario: str) -> None:
    with quick_folder() as folder:
        warm_up(folder / "warm-up")
        push = push_of(scenario, folder)
        root = Path(shutil.copytree(template, folder / "registry"))
        # One object for all rounds, in the children too: its engine has compiled every statement once.
        registry = Registry.open(root)
        expected = push(registry)

        def prepare(_: int) -> Callable[[], object]:
            registry.close()
            shutil.rmtree(root)
            shutil.copytree(template, root)
            return partial(push, registry)

        found = {"absent": 0, "whole": 0}
        for _, killed in killed_at_every_stage(prepare):
            holds_only_whole_blobs(root)
            Registry.open(root).close()
            try:
                registry.get("walk/new")
            except ArtifactNotFound:
                assert killed
                found["absent"] += 1
                assert not (root / "journal" / "walk" / "new").exists()
            else:
                found["whole"] += 1
                whole(registry, root, "walk/new")
            assert push(registry) == expected
            whole(registry, root, "walk/new")
            version = registry.get("walk/new")
            assert (version.version, version.digest) == (1, expected)
            if scenario == "whole":
                assert (version.tags, version.metrics) == (("prod",), {"reward": 1.5})
            assert killed or not any((root / "tmp").iterdir()), "a push leaves temporary files"
        assert found["absent"] > 20, found
        assert found["whole"] > 5, found
        registry.close()
        print(found)


@pytest.mark.parametrize("scenario", [pytest.param("whole", marks=pytest.mark.exhaustive), "parts"])
def test_a_push_that_is_killed_at_any_stage_is_absent_or_whole(template: Path, scenario: str) -> None:
    print(succeeds_alone(killed_pushes, template, scenario))
