"""A team moves in: a whole tree of adapters, checkpoints, bases, copies, junk and damage becomes versions, once."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from registry import Registry
from registry.core.errors import InvalidInput, InvalidReference, SourceNotFound
from registry.operations.adoption import Adoption, Item
from tests.failures.support import photograph
from tests.formats.saved_models import save_model
from tests.operations.models import walker
from tests.operations.trees import Taller, build, hub_snapshot, save_adapter, save_checkpoint

BROKEN = {
    "broken/dangling.pth": "no such file or folder",
    "broken/empty.pt": "an empty file",
    "broken/no-config": "but no adapter_config.json",
    "broken/no-tensors": "it has no adapter_model.safetensors",
    "broken/pointer": "Git LFS pointer",
    "broken/pointer.pth": "Git LFS pointer",
    "broken/shards/model-00001-of-00002.safetensors": "2 shards of one model",
    "broken/truncated": "the file is truncated",
    "only-config": "without its weights",
}


@pytest.fixture(scope="session")
def team_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree; nobody may change it."""
    return build(tmp_path_factory.mktemp("team") / "Team Tree")


@pytest.fixture(scope="module")
def adopted(
    team_tree: Path, empty_registry: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Registry, Adoption]]:
    """A registry that adopted it, and what came of that; nobody may change it."""
    root = shutil.copytree(empty_registry, tmp_path_factory.mktemp("adopted") / "registry")
    with Registry.open(root) as registry:
        yield registry, registry.adopt(team_tree)


def items(adoption: Adoption) -> dict[str, Item]:
    return {item.path: item for item in adoption.items}


def verdicts(adoption: Adoption) -> dict[str, str]:
    return {item.path: item.verdict for item in adoption.items}


# ---------------------------------------------------------------- the whole tree


def test_all_that_is_whole_is_in(adopted: tuple[Registry, Adoption], team_tree: Path) -> None:
    registry, adoption = adopted
    assert adoption.verdicts == {"adopted": 26, "duplicate": 2, "left out": 2, "broken": 9}
    assert not adoption.is_whole
    versions = {version.reference: version for version in registry.find()}
    assert len(versions) == 26
    for item in adoption.items:
        if item.verdict == "adopted":
            version = versions.pop(item.reference or "")
            assert version.metadata["adopted_from"] == item.path
            assert (version.name, version.kind, version.base) == (item.name, item.kind, item.base)
            assert version.metadata.get("step") == item.step
    assert not versions
    assert adoption.bytes_new == sum(item.bytes_new for item in adoption.items) > 0


def test_what_was_adopted_comes_back_byte_for_byte(
    adopted: tuple[Registry, Adoption], team_tree: Path, tmp_path: Path
) -> None:
    registry, adoption = adopted
    for item in adoption.items:
        if item.verdict == "adopted":
            back = tmp_path / item.name.replace("/", "-") / str(item.reference).rpartition("@")[2]
            back.mkdir(parents=True)
            pulled = registry.pull(item.reference or "", back)
            source = team_tree / item.path
            for file in pulled.files:
                there = source if item.form == "file" else source / file.relative_to(back)
                assert file.read_bytes() == there.read_bytes()


def test_each_broken_one_says_why_and_where(adopted: tuple[Registry, Adoption], team_tree: Path) -> None:
    broken = {item.path: item for item in adopted[1].items if item.verdict == "broken"}
    assert broken.keys() == BROKEN.keys()
    for path, said in BROKEN.items():
        assert said in broken[path].why
        assert path in broken[path].why
        assert str(team_tree) not in broken[path].why
        assert (broken[path].reference, broken[path].base, broken[path].kind) == (None, None, None)


def test_a_whole_file_that_is_no_checkpoint_is_left_out_and_not_broken(adopted: tuple[Registry, Adoption]) -> None:
    left_out = {item.path: item.why for item in adopted[1].items if item.verdict == "left out"}
    assert left_out.keys() == {"flat/embeddings.pt", "flat/vocabulary.pt"}
    assert "found a list" in left_out["flat/embeddings.pt"]


def test_copies_are_told_with_what_they_are_copies_of(adopted: tuple[Registry, Adoption]) -> None:
    found = items(adopted[1])
    final, last = found["runs/2026-03-Walk/final"], found["runs/2026-03-Walk/checkpoint-1500"]
    assert (final.verdict, final.reference) == ("duplicate", last.reference)
    assert final.why == f"same content as {last.reference}, from {last.path}"
    assert found["models/llama tiny"].verdict == "duplicate"


def test_checkpoints_of_a_run_are_versions_of_one_name_in_the_order_of_their_steps(
    adopted: tuple[Registry, Adoption],
) -> None:
    found = items(adopted[1])
    for step, number in ((500, 1), (1000, 2), (1500, 3)):
        item = found[f"runs/2026-03-Walk/checkpoint-{step}"]
        assert (item.reference, item.step) == (f"team-tree/2026-03-walk@{number}", step)
    # The folder of the run itself is what came out at its end.
    assert found["runs/carry"].reference == "team-tree/carry@3"
    assert found["flat/walk_step_7.safetensors"].reference == "team-tree/walk@1"
    assert found["flat/walk_step_30.safetensors"].reference == "team-tree/walk@2"


def test_a_checkpoint_continues_the_one_before_it_where_the_trainers_logs_say_so(
    adopted: tuple[Registry, Adoption],
) -> None:
    registry, adoption = adopted
    found = items(adoption)
    assert found["runs/2026-03-Walk/checkpoint-1000"].continued_from == "team-tree/2026-03-walk@1"
    assert found["runs/2026-03-Walk/checkpoint-1500"].continued_from == "team-tree/2026-03-walk@2"
    # No log, and a log that begins otherwise: the folder was used twice.
    assert found["runs/carry"].continued_from is None
    assert found["runs/restarted/checkpoint-20"].continued_from is None
    edges = registry.log("team-tree/2026-03-walk@3").ancestors
    assert [edge.relation for edge in edges].count("continued_from") == 2


def test_bases_are_found_by_name_by_the_hubs_id_and_by_what_fits(adopted: tuple[Registry, Adoption]) -> None:
    found = items(adopted[1])
    walker_base, llama = (
        found["models/walker.safetensors"].reference,
        found["hub/models--acme--llama-tiny/snapshots/" + "0" * 40],
    )
    assert found["sweep/seed_1"].base == walker_base
    assert found["b/Wälk (best)"].base == walker_base  # by the end of another machine's path
    assert found["a/Wälk (best)"].base == walker_base  # nothing is recorded, and it alone fits
    assert found["a/Wälk (best)"].why == "guessed: it alone has all targets"
    assert found["hub/models--acme--walk-lora/snapshots/" + "1" * 40].base == llama.reference
    assert found["flat/lora_adapters.pth"].base == found["flat/merged.pth"].reference


def test_a_base_that_does_not_fit_is_not_set_and_what_is_without_one_is_listed(
    adopted: tuple[Registry, Adoption],
) -> None:
    found = items(adopted[1])
    wrong, unknown = found["other/wrong-base"], found["other/unknown-base"]
    assert (wrong.base, unknown.base) == (None, None)
    assert "models/taller is recorded, but models/taller.pth does not fit" in wrong.why
    assert "(16, 24), and the adapter is for (16, 16)" in wrong.why
    assert "acme/never-heard-of-it is recorded, which is not here" in unknown.why
    assert {item.path for item in adopted[1].without_base} == {"other/wrong-base", "other/unknown-base"}


def test_what_is_no_artifact_is_counted_and_links_are_said(adopted: tuple[Registry, Adoption]) -> None:
    adoption = adopted[1]
    assert adoption.counted["folders of tools"] == 4
    assert {one.path for one in adoption.skipped} == {"loop", "up", "runs/2026-03-Walk/latest"}


def test_names_are_the_same_in_any_registry(adopted: tuple[Registry, Adoption], team_tree: Path, root: Path) -> None:
    with Registry.open(root) as other:
        again = other.adopt(team_tree, dry_run=True)
    first = {item.path: item.name for item in adopted[1].items if item.verdict == "adopted"}
    assert {path: item.name for path, item in items(again).items() if path in first} == first


# ---------------------------------------------------------------- once more


def test_a_dry_run_writes_nothing_and_says_what_would_be(registry: Registry, root: Path, team_tree: Path) -> None:
    before = photograph(root)
    adoption = registry.adopt(team_tree, dry_run=True)
    assert photograph(root) == before
    assert adoption.verdicts == {"new": 28, "left out": 2, "broken": 9}
    assert adoption.dry_run
    guesses = {path: item.guess for path, item in items(adoption).items() if item.guess is not None}
    assert guesses["sweep/seed_1"].how == "recorded"
    assert [base.label for base in guesses["sweep/seed_1"].bases] == ["models/walker.safetensors"]
    assert (guesses["other/wrong-base"].how, guesses["other/unknown-base"].how) == ("mismatch", "unknown")
    assert (guesses["a/Wälk (best)"].how, guesses["a/Wälk (best)"].recorded) == ("fits", None)


def small_tree(folder: Path) -> Path:
    """A base, a run with a copy, and a broken one."""
    tree = folder / "tree"
    tree.mkdir()
    save_file(walker().state_dict(), tree / "walker.safetensors")
    for step in (10, 20):
        save_checkpoint(tree / f"run/checkpoint-{step}", step=step, every=10)
    shutil.copytree(tree / "run/checkpoint-20", tree / "run/final")
    (tree / "broken.safetensors").write_bytes(b"no")
    return tree


def test_adopting_again_changes_nothing_and_reads_no_tensor(registry: Registry, root: Path, tmp_path: Path) -> None:
    tree = small_tree(tmp_path)
    registry.adopt(tree)
    before = photograph(root)
    # Damage that leaves size and time alone would be noticed by whoever reads the tensors.
    tensors = tree / "run/checkpoint-10/adapter_model.safetensors"
    status = tensors.stat()
    with tensors.open("r+b") as file:
        file.write(b"\xff" * 8)
    os.utime(tensors, ns=(status.st_atime_ns, status.st_mtime_ns))
    again = registry.adopt(tree)
    assert photograph(root) == before
    assert verdicts(again) == {
        "walker.safetensors": "there",
        "run/checkpoint-10": "there",
        "run/checkpoint-20": "there",
        "run/final": "duplicate",
        "broken.safetensors": "broken",
    }
    assert items(again)["run/checkpoint-10"].base == "tree/walker@1"


def test_a_catalog_on_a_server_knows_what_it_adopted_too(postgresql_url: str, tmp_path: Path) -> None:
    tree = small_tree(tmp_path)
    with Registry.init(postgresql_url, store=tmp_path / "store") as registry:
        assert registry.adopt(tree).verdicts == {"adopted": 3, "duplicate": 1, "broken": 1}
        again = registry.adopt(tree)
        assert again.verdicts == {"there": 3, "duplicate": 1, "broken": 1}
        assert items(again)["run/checkpoint-20"].base == "tree/walker@1"


def test_files_that_were_only_touched_are_read_and_make_no_version(registry: Registry, tmp_path: Path) -> None:
    tree = small_tree(tmp_path)
    first = registry.adopt(tree)
    for path in tree.rglob("*"):
        os.utime(path)
    for _ in range(2):
        again = registry.adopt(tree)
        assert {path: item.reference for path, item in items(again).items()} == {
            path: item.reference for path, item in items(first).items()
        }
    assert "adopted" not in again.verdicts
    assert len(registry.find()) == 3


def test_what_came_since_goes_on_under_the_same_names(registry: Registry, tmp_path: Path) -> None:
    tree = small_tree(tmp_path)
    registry.adopt(tree)
    save_checkpoint(tree / "run/checkpoint-30", step=30, every=10)
    save_checkpoint(tree / "other/run/checkpoint-5", step=5, every=5)  # alone it would be called `run` too
    found = items(registry.adopt(tree))
    assert found["run/checkpoint-30"].reference == "tree/run@3"
    assert found["run/checkpoint-30"].continued_from == "tree/run@2"
    assert found["other/run/checkpoint-5"].reference == "tree/other-run@1"


def test_a_checkpoint_that_changed_is_a_new_version(registry: Registry, tmp_path: Path) -> None:
    tree = small_tree(tmp_path)
    registry.adopt(tree)
    shutil.rmtree(tree / "run/checkpoint-10")
    save_adapter(tree / "run/checkpoint-10", seed=77)
    found = items(registry.adopt(tree))
    assert (found["run/checkpoint-10"].verdict, found["run/checkpoint-10"].reference) == ("adopted", "tree/run@3")


def test_a_name_that_belongs_to_something_else_is_not_mixed_with_it(registry: Registry, tmp_path: Path) -> None:
    tree = small_tree(tmp_path)
    registry.push(save_adapter(tmp_path / "stranger", seed=99), "tree/run")
    found = items(registry.adopt(tree))
    assert found["run/checkpoint-10"].name.startswith("tree/run-")
    assert [version.number for version in registry_versions(registry, "tree/run")] == [1]


class _Numbered:
    def __init__(self, reference: str) -> None:
        self.number = int(reference.rpartition("@")[2])


def registry_versions(registry: Registry, name: str) -> list[_Numbered]:
    return [_Numbered(version.reference) for version in registry.find() if version.name == name]


def test_what_somebody_pushed_by_hand_is_a_duplicate(registry: Registry, tmp_path: Path) -> None:
    tree = small_tree(tmp_path)
    pushed = registry.push(tree / "run/checkpoint-10", "by/hand")
    found = items(registry.adopt(tree))
    assert (found["run/checkpoint-10"].verdict, found["run/checkpoint-10"].reference) == ("duplicate", pushed.reference)
    # And what continues it says so all the same.
    assert found["run/checkpoint-20"].continued_from == pushed.reference


def test_duplicates_are_kept_where_that_is_asked_for(registry: Registry, tmp_path: Path) -> None:
    tree = small_tree(tmp_path)
    adoption = registry.adopt(tree, keep_duplicates=True)
    assert items(adoption)["run/final"].reference == "tree/run@3"
    assert registry.adopt(tree, keep_duplicates=True).verdicts == {"there": 4, "broken": 1}


# ---------------------------------------------------------------- bases


def test_a_base_of_the_registry_is_found_too(registry: Registry, tmp_path: Path) -> None:
    save_file(walker().state_dict(), tmp_path / "w.safetensors")
    base = registry.push(tmp_path / "w.safetensors", "bases/walker").reference
    tree = tmp_path / "tree"
    save_adapter(tree / "named", seed=1, recorded="registry://bases/walker@1")
    save_adapter(tree / "tail", seed=2, recorded="/elsewhere/bases/walker")
    save_adapter(tree / "fits", seed=3, recorded=None)
    found = items(registry.adopt(tree))
    assert {item.base for item in found.values()} == {base}
    assert {path: item.guess.how for path, item in found.items() if item.guess} == {
        "named": "recorded",
        "tail": "recorded",
        "fits": "fits",
    }


def test_another_model_of_the_hub_is_never_taken_for_the_one_that_is_recorded(
    registry: Registry, tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    (tmp_path / "w").mkdir()
    save_file(walker().state_dict(), tmp_path / "w/walker.safetensors")
    hub_snapshot(tree, "acme/walker", "3" * 40, tmp_path / "w")
    save_adapter(tree / "theirs", seed=1, recorded="acme/walker")
    save_adapter(tree / "path", seed=2, recorded=f"/root/hub/models--acme--walker/snapshots/{'3' * 40}")
    save_adapter(tree / "other", seed=3, recorded="umbrella/walker")
    save_adapter(tree / "chat", seed=4, recorded="acme/walker-chat")
    found = items(registry.adopt(tree))
    base = f"models--acme--walker/snapshots/{'3' * 40}/walker.safetensors"
    assert {name for name, item in found.items() if item.base is not None} == {"theirs", "path"}
    # And when the base is in the registry alone.
    shutil.rmtree(tree / "models--acme--walker")
    save_adapter(tree / "more", seed=5, recorded="acme/walker")
    save_adapter(tree / "more-other", seed=6, recorded="umbrella/walker")
    again = items(registry.adopt(tree))
    assert (again["more"].base, again["more-other"].base) == (found[base].reference, None)


def test_revisions_of_the_hub_are_versions_and_the_recorded_one_is_the_base(registry: Registry, tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    for number, revision in enumerate(("b" * 40, "a" * 40, "c" * 40)):
        (tmp_path / revision).mkdir()
        save_file(walker(number).state_dict(), tmp_path / revision / "model.safetensors")
        hub_snapshot(hub, "acme/walker", revision, tmp_path / revision, is_main=revision[0] == "a")
    lora = save_adapter(hub / "lora", seed=1, recorded="acme/walker")
    found = {item.path.split("/")[-2] if "/" in item.path else item.path: item for item in registry.adopt(hub).items}
    assert [found[one * 40].reference for one in "bca"] == ["hub/walker@1", "hub/walker@2", "hub/walker@3"]
    assert found["lora"].why.startswith("no base: 3 bases are called acme/walker")
    config = json.loads((lora / "adapter_config.json").read_bytes()) | {"revision": "c" * 40}
    (lora / "adapter_config.json").write_text(json.dumps(config))
    assert items(registry.adopt(hub, keep_duplicates=True))["lora"].base == "hub/walker@2"
    # The folder of the model alone has the same names.
    planned = registry.adopt(hub / "models--acme--walker", namespace="other", dry_run=True)
    assert {item.name for item in planned.items} == {"other/walker"}


def test_several_bases_that_fit_are_listed_and_none_is_set(registry: Registry, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for seed in (1, 2):
        save_file(walker(seed).state_dict(), tree / f"walker-{'ab'[seed - 1]}.safetensors")
    save_adapter(tree / "lora", seed=3, recorded=None)
    item = items(registry.adopt(tree))["lora"]
    assert item.base is None
    assert item.why == "no base: 2 bases have all its targets: walker-a.safetensors, walker-b.safetensors"


def test_copies_of_one_base_are_one_base(registry: Registry, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in "ab":
        save_file(walker().state_dict(), tree / f"walker-{name}.safetensors")
    save_adapter(tree / "lora", seed=3, recorded=None)
    planned = items(registry.adopt(tree, dry_run=True))["lora"]
    assert planned.guess is not None
    assert planned.guess.how == "undecided"
    assert items(registry.adopt(tree))["lora"].base == "tree/walker-a@1"


def test_what_is_in_without_a_base_is_told_when_there_is_one(registry: Registry, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    save_adapter(tree / "lora", seed=3, recorded="models/walker")
    (item,) = registry.adopt(tree).items
    assert item.why == "no base: models/walker is recorded, which is not here; no known base has all its targets"
    save_file(walker().state_dict(), tree / "walker.safetensors")
    found = items(registry.adopt(tree))
    assert (found["lora"].verdict, found["lora"].base) == ("there", None)
    assert found["lora"].why == "it has no base, and by now there is walker.safetensors: push it again with --base"


def test_a_base_that_is_broken_leaves_its_adapters_without_one(registry: Registry, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    save_adapter(tree / "lora", seed=3, recorded="models/walker")
    whole = tmp_path / "whole.safetensors"
    save_file(walker().state_dict(), whole)
    (tree / "models").mkdir()
    (tree / "models/walker.safetensors").write_bytes(whole.read_bytes()[:-1])
    found = items(registry.adopt(tree))
    assert (found["models/walker.safetensors"].verdict, found["lora"].verdict) == ("broken", "adopted")
    assert found["lora"].base is None


def test_renamed_modules_of_a_library_are_found_by_its_map(registry: Registry, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    saved = load_file(save_model("vit", tree / "vit") / "model.safetensors")
    model = transformers.ViTModel(transformers.ViTConfig.from_pretrained(tree / "vit"))
    model.config.name_or_path = ""
    assert "layers.0.attention.k_proj.weight" not in saved
    save_adapter(tree / "lora", seed=1, recorded="/models/vit", base=model, target_modules=["k_proj"])
    assert items(registry.adopt(tree))["lora"].base == "tree/vit@1"


def test_a_large_base_is_recorded_without_its_bytes_and_a_pickled_one_with_them(
    registry: Registry, tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    save_adapter(tree / "lora", seed=3, recorded="walker")
    save_file(walker().state_dict(), tree / "walker.safetensors")
    torch.save(Taller().state_dict(), tree / "taller.pth")
    found = items(registry.adopt(tree, external_over=100))
    assert (found["walker.safetensors"].external, found["taller.pth"].external) == (True, False)
    assert found["walker.safetensors"].bytes_new < 2000
    assert found["lora"].base == "tree/walker@1"
    assert items(registry.adopt(tree, external_over=None))["walker.safetensors"].verdict == "there"


# ---------------------------------------------------------------- attachments, findings, refusals


def test_a_large_file_beside_an_adapter_is_left_out_and_noted(registry: Registry, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "tree/checkpoint-5", step=5, every=5)
    (folder / "link").symlink_to("/etc/hostname")
    (item,) = registry.adopt(tmp_path / "tree", attachment_limit=900).items
    assert item.verdict == "adopted"
    large = (folder / "optimizer.pt").stat().st_size
    assert f"left out ({large} bytes, over the limit of 900): optimizer.pt" in item.notes
    assert "left out (it is a symbolic link): link" in item.notes
    paths = {file.path for file in registry.show(item.reference or "").contents.files}
    assert "trainer_state.json" in paths
    assert "optimizer.pt" not in paths


def test_without_attachments_only_the_adapter_is_kept(registry: Registry, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "tree/checkpoint-5", step=5, every=5)
    (item,) = registry.adopt(tmp_path / "tree", attachments=False).items
    paths = {file.path for file in registry.show(item.reference or "").contents.files}
    assert paths == {"adapter_config.json", "adapter_model.safetensors"}


def test_an_adapter_that_learned_nothing_but_nan_is_in_with_its_findings(registry: Registry, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "tree/lora", seed=1)
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, folder / "adapter_model.safetensors")
    (item,) = registry.adopt(tmp_path / "tree").items
    assert (item.verdict, item.findings) == ("adopted", 1)


def test_what_was_removed_is_not_brought_back(registry: Registry, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "tree/lora", seed=1)
    registry.adopt(tmp_path / "tree")
    registry.remove("tree/lora@1")
    for touched in (False, True):
        if touched:
            os.utime(folder / "adapter_config.json")
        (item,) = registry.adopt(tmp_path / "tree").items
        assert (item.verdict, item.reference) == ("left out", "tree/lora@1")
        assert item.why == "tree/lora@1 was this, and was removed; push it by hand to have it back"
    registry.push(folder, "tree/lora")
    (item,) = registry.adopt(tmp_path / "tree").items
    assert (item.verdict, item.reference) == ("there", "tree/lora@1")


def test_the_registry_may_lie_in_the_tree(tmp_path: Path) -> None:
    save_adapter(tmp_path / "tree/lora", seed=1)
    with Registry.init(tmp_path / "tree/registry") as registry:
        assert registry.adopt(tmp_path / "tree").verdicts == {"adopted": 1}
        again = registry.adopt(tmp_path / "tree")
        assert (again.verdicts, again.counted) == ({"there": 1}, {"registries": 1})


def test_an_empty_tree_is_whole(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    adoption = registry.adopt(tmp_path / "nothing")
    assert (adoption.items, adoption.is_whole, adoption.namespace) == ((), True, "nothing")


def test_wrong_arguments_are_refused_before_anything_is_done(registry: Registry, root: Path, tmp_path: Path) -> None:
    tree = small_tree(tmp_path)
    before = photograph(root)
    with pytest.raises(InvalidReference):
        registry.adopt(tree, namespace="Not Allowed")
    with pytest.raises(SourceNotFound):
        registry.adopt(tree / "nowhere")
    with pytest.raises(InvalidInput):
        registry.adopt(tree / "walker.safetensors")
    assert photograph(root) == before


def test_progress_is_told_phase_by_phase(registry: Registry, tmp_path: Path) -> None:
    told: list[tuple[str, int, int, str]] = []
    registry.adopt(small_tree(tmp_path), progress=lambda *said: told.append(said))
    assert [*dict.fromkeys(phase for phase, *_ in told)] == ["scan", "look", "push"]
    assert told[-1] == ("push", 5, 5, "")


def test_paths_that_are_no_text_are_adopted(registry: Registry, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    save_adapter(tmp_path / "lora", seed=1).rename(os.fsdecode(os.fsencode(tree) + b"/caf\xe9"))
    for _ in range(2):
        (item,) = registry.adopt(tree).items
    assert (item.verdict, item.reference) == ("there", item.reference)
    assert registry.find()[0].metadata["adopted_from"] == "caf?"
