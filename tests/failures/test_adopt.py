"""An adoption that is killed or interrupted anywhere, repeated, and done by several at once, ends as one that nobody
disturbed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import pytest

from registry import Registry
from tests.failures.stages import interrupted_at_every_stage, killed_at_every_stage
from tests.failures.support import (
    CONFIG,
    adapter_tensors,
    at_once,
    model_tensors,
    peft_folder,
    quick_folder,
    succeeds_alone,
    tensor_file,
    warm_up,
    whole,
)


def tree_of(folder: Path, steps: int = 2) -> Path:
    """A base, a run of adapters on it, and a broken one."""
    tree = folder / "tree"
    tree.mkdir()
    tensor_file(tree / "model-7b.safetensors", model_tensors(size=24))
    config = CONFIG | {"base_model_name_or_path": "models/model-7b"}
    for step in range(1, steps + 1):
        place = peft_folder(tree / f"run/checkpoint-{step}", config, adapter_tensors(size=24, seed=step))
        log = [{"step": number} for number in range(1, step + 1)]
        (place / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": log}))
    (tree / "broken.safetensors").write_bytes(b"no")
    return tree


def versions(registry: Registry) -> dict[str, tuple[str, str | None, object]]:
    return {
        one.reference: (one.digest, one.base, one.metadata["adopted_from"])
        for one in registry.find()
        if "adopted_from" in one.metadata
    }


def disturbed(template: str, how: str) -> None:
    with quick_folder() as folder:
        warm_up(folder / "warm-up")
        tree = tree_of(folder)
        root = Path(shutil.copytree(template, folder / "registry"))
        registry = Registry.open(root)
        registry.adopt(tree)
        expected = versions(registry)
        assert [*expected] == ["tree/model-7b@1", "tree/run@2", "tree/run@1"]

        def prepare(_: int) -> Callable[[], object]:
            registry.close()
            shutil.rmtree(root)
            shutil.copytree(template, root)
            return partial(registry.adopt, tree)

        seen = set()
        stages: Iterable[object] = interrupted_at_every_stage(prepare, after=False)
        for rounds, _ in enumerate(killed_at_every_stage(prepare) if how == "killed" else stages):
            Registry.open(root).close()
            before = versions(registry)
            assert before.items() <= expected.items()
            seen.add(len(before))
            again = registry.adopt(tree)
            assert versions(registry) == expected
            assert again.verdicts == (
                {"adopted": 3 - len(before), "there": len(before), "broken": 1}
                if 0 < len(before) < 3
                else {"there" if before else "adopted": 3, "broken": 1}
            )
            if rounds % 10 == 0:  # it takes longer than the rest
                for reference in expected:
                    whole(registry, root, reference)
        assert seen == {0, 1, 2, 3}
        registry.close()


@pytest.mark.exhaustive
@pytest.mark.parametrize("how", ["killed", "interrupted"])
def test_an_adoption_that_is_cut_off_at_any_stage_goes_on_where_it_was(template: Path, how: str) -> None:
    succeeds_alone(disturbed, template, how, timeout=300)


def several(template: str, pushed: str) -> None:
    with quick_folder() as folder:
        warm_up(folder / "warm-up")
        tree = tree_of(folder, steps=6)
        alone = Path(shutil.copytree(template, folder / "alone"))
        with Registry.open(alone) as registry:
            registry.adopt(tree)
            expected = versions(registry)
        root = Path(shutil.copytree(template, folder / "registry"))
        other = peft_folder(folder / "other", CONFIG, adapter_tensors(seed=99))
        beside = other if pushed == "others" else tree / "run/checkpoint-3"

        def adopt() -> None:
            with Registry.open(root) as registry:
                assert "new" not in registry.adopt(tree).verdicts

        def push() -> None:
            with Registry.open(root) as registry:
                for number in range(5):
                    registry.push(beside, f"by/hand-{number}")

        assert at_once([adopt, push, adopt, adopt]) == [0] * 4
        with Registry.open(root) as registry:
            there = versions(registry)
            for reference in there:
                whole(registry, root, reference)
            if pushed == "others":
                assert there == expected
            contents = [registry.get(reference).content_digest for reference in there]
            assert len(contents) == len(set(contents)), "one content was adopted twice"
            assert len(there) in (len(expected), len(expected) - 1)


@pytest.mark.parametrize("pushed", ["others", "the same"])
def test_adoptions_and_pushes_at_once_make_each_version_once(template: Path, pushed: str) -> None:
    succeeds_alone(several, template, pushed)
