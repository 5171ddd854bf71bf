"""What is found in a tree, and what is not taken for something that it is not."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest

from registry.core.errors import InvalidInput, SourceNotFound
from registry.formats.scan import Artifact, Tree, fingerprint, scan
from tests.failures.support import as_nobody, open_folder, peft_folder, tensor_file

CONFIG = json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}).encode()


def fill(root: Path, *paths: str, data: bytes = b"x") -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    return root


def found(tree: Tree) -> dict[str, str]:
    return {artifact.path: artifact.form for artifact in tree.artifacts}


def only(tree: Tree) -> Artifact:
    (artifact,) = tree.artifacts
    return artifact


def test_peft_folders_model_folders_and_single_files_are_found(tmp_path: Path) -> None:
    peft_folder(tmp_path / "a/one")
    fill(tmp_path, "b/two/config.json", data=CONFIG)
    tensor_file(tmp_path / "b/two/model.safetensors")
    tensor_file(fill(tmp_path, "c/notes.md") / "c/Three 3.safetensors")
    (tmp_path / "c/four.pth").write_bytes(pickle.dumps({"a": 1}))
    assert found(scan(tmp_path)) == {
        "a/one": "peft",
        "b/two": "model",
        "c/Three 3.safetensors": "file",
        "c/four.pth": "file",
    }


def test_the_folder_itself_may_be_an_artifact(tmp_path: Path) -> None:
    peft_folder(tmp_path / "out")
    assert only(scan(tmp_path / "out")) == Artifact(".", tmp_path / "out", "peft")


def test_state_of_a_trainer_beside_an_adapter_is_part_of_it_and_alone_it_is_counted(tmp_path: Path) -> None:
    names = ("optimizer.pt", "rng_state.pth", "rng_state_3.pth", "scheduler.pt", "training_args.bin", "scaler.pt")
    pickled = pickle.dumps({"a": 1})
    fill(peft_folder(tmp_path / "with"), *names, data=pickled)
    fill(tmp_path / "alone", *names, "mp_rank_00_model_states.pt", data=pickled)
    tree = scan(tmp_path)
    assert found(tree) == {"with": "peft"}
    assert tree.counted == {"training state without a model": 7}


def test_a_checkpoint_within_an_adapters_folder_is_its_own_artifact_and_no_part_of_it(tmp_path: Path) -> None:
    peft_folder(tmp_path / "out")
    peft_folder(tmp_path / "out/checkpoint-5")
    fill(tmp_path, "out/runs/events.out.tfevents.1", "out/README.md")
    tree = scan(tmp_path)
    assert found(tree) == {"out": "peft", "out/checkpoint-5": "peft"}
    assert tree.artifacts[0].without == {"checkpoint-5", "runs"}


def test_a_pipeline_is_one_artifact_with_all_below_it(tmp_path: Path) -> None:
    fill(tmp_path, "sd/model_index.json", "sd/unet/config.json", "sd/tokenizer/vocab.json", data=b"{}")
    tensor_file(tmp_path / "sd/unet/diffusion_pytorch_model.safetensors")
    fill(tmp_path, "st/modules.json", "st/2_Dense/model.safetensors", data=b"[]")
    fill(tmp_path, "st/config.json", data=CONFIG)
    assert found(scan(tmp_path)) == {"sd": "model", "st": "model"}


def test_folders_of_tools_other_registries_and_data_are_counted_and_not_entered(tmp_path: Path) -> None:
    for folder in (".git", ".cache", "wandb", "__pycache__", "node_modules", "hub/datasets--a--b", "venv/lib"):
        tensor_file(fill(tmp_path, f"{folder}/x") / folder / "model.safetensors")
    fill(tmp_path, "venv/pyvenv.cfg", "store/registry.json", "store/blobs/aa/model.safetensors")
    fill(tmp_path, "a.png", "b.jpg", "c.log", "d.parquet", "e.gguf", "f.py", "g", "h.incomplete")
    tree = scan(tmp_path)
    assert found(tree) == {}
    assert tree.counted == {
        "data": 1,
        "folders of tools": 7,
        "images and films": 2,
        "logs": 1,
        "models in forms that are not read": 1,
        "others": 1,
        "registries": 1,
        "texts": 1,
        "unfinished downloads": 1,
    }


def test_files_by_the_name_of_a_checkpoint_are_told_by_how_they_begin(tmp_path: Path) -> None:
    (tmp_path / "packages.pth").write_text("import sys\n")
    (tmp_path / "data.bin").write_bytes(bytes(range(200)))
    (tmp_path / "empty.bin").write_bytes(b"")
    (tmp_path / "zeros.pt").write_bytes(bytes(600))
    (tmp_path / "pointer.ckpt").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "pickle.bin").write_bytes(pickle.dumps({}))
    tensor_file(tmp_path / "really-safetensors.bin")
    tree = scan(tmp_path)
    assert set(found(tree)) == {"zeros.pt", "pointer.ckpt", "pickle.bin", "really-safetensors.bin"}
    assert tree.counted == {"others": 3}


def test_a_configuration_without_weights_is_broken_only_where_it_is_a_models(tmp_path: Path) -> None:
    fill(tmp_path, "model/config.json", data=CONFIG)
    fill(tmp_path, "experiment/config.json", data=b'{"lr": 1, "model_type": "mlp"}')
    fill(tmp_path, "damaged/config.json", data=b'{"lr": ')
    artifact = only(scan(tmp_path))
    assert artifact.path == "model"
    assert artifact.broken == (
        "the config.json of a LlamaForCausalLM without its weights; download or save them beside it"
    )


def test_shards_alone_are_one_broken_artifact(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        tensor_file(tmp_path / f"model-0000{number}-of-00003.safetensors")
    artifact = only(scan(tmp_path))
    assert artifact.path == "model-00001-of-00003.safetensors"
    assert artifact.broken is not None
    assert "3 shards of one model without its config.json and index" in artifact.broken


def hub(cache: Path, *files: str) -> Path:
    home = cache / "models--acme--walk"
    snapshot = home / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    for name in files:
        shutil.move(cache / name, home / "blobs" / f"blob-{name}")
        (snapshot / name).symlink_to(f"../../blobs/blob-{name}")
    return snapshot


def test_a_hub_cache_is_entered_by_its_snapshots_alone(tmp_path: Path) -> None:
    tensor_file(tmp_path / "lora.safetensors")
    hub(tmp_path, "lora.safetensors")
    (tmp_path / "models--acme--walk/blobs/other.safetensors").write_bytes(b"never listed")
    assert found(scan(tmp_path)) == {f"models--acme--walk/snapshots/{'a' * 40}/lora.safetensors": "file"}


def test_a_configuration_alone_is_usual_in_a_hub_cache(tmp_path: Path) -> None:
    fill(tmp_path, "config.json", data=CONFIG)
    hub(tmp_path, "config.json")
    tree = scan(tmp_path)
    assert found(tree) == {}
    assert tree.counted == {"hub folders of which only the configuration was fetched": 1, "texts": 1}


def test_links_are_entered_once_and_never_in_a_circle(tmp_path: Path) -> None:
    tree, outside = tmp_path / "tree", tmp_path / "scratch"
    peft_folder(tree / "run/checkpoint-5")
    peft_folder(outside / "other")
    (tree / "run/latest").symlink_to("checkpoint-5")
    (tree / "again").symlink_to(".")
    (tree / "up").symlink_to("..")
    (tree / "gone").symlink_to("nowhere")
    (tree / "a-link").symlink_to(outside)
    (tree / "b-link").symlink_to(outside / "other")
    (outside / "back").symlink_to(tree)
    scanned = scan(tree)
    # A link that leads into a folder that another link leads around comes first or last; both ways it is there once.
    assert found(scanned) == {"run/checkpoint-5": "peft", "a-link/other": "peft"}
    assert {one.path: one.why for one in scanned.skipped} == {
        "run/latest": "a link to run/checkpoint-5",
        "again": "a link to .",
        "up": "a link to a folder around this one",
        "b-link": "a link to a-link/other",
        "a-link/back": "a link to .",
    }
    assert not any(one.unreadable for one in scanned.skipped)


def test_a_link_to_a_file_of_the_tree_is_counted_and_one_that_leads_out_is_taken(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    tensor_file(tree / "one.safetensors")
    tensor_file(tmp_path / "out.safetensors")
    (tree / "latest.safetensors").symlink_to("one.safetensors")
    (tree / "out.safetensors").symlink_to("../out.safetensors")
    (tree / "dangling.safetensors").symlink_to("nowhere")
    scanned = scan(tree)
    assert set(found(scanned)) == {"one.safetensors", "out.safetensors", "dangling.safetensors"}
    assert scanned.counted == {"links to files of this tree": 1}


def test_an_unreadable_folder_is_said_and_stops_nothing() -> None:
    with open_folder() as folder:
        peft_folder(folder / "a")
        peft_folder(folder / "b")
        peft_folder(folder / "b/c")
        (folder / "b").chmod(0o000)

        def look() -> None:
            tree = scan(folder)
            assert found(tree) == {"a": "peft"}
            (skipped,) = tree.skipped
            assert (skipped.path, skipped.why, skipped.unreadable) == ("b", "cannot be read: Permission denied", True)

        as_nobody(look)


def test_no_pipe_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    tree = scan(tmp_path)
    assert (found(tree), tree.counted) == ({}, {"no regular files": 1})


def test_a_tree_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFound, match="no such folder"):
        scan(tmp_path / "nowhere")
    with pytest.raises(InvalidInput, match="is a file; push it"):
        scan(tensor_file(tmp_path / "a.safetensors"))


def test_a_fingerprint_changes_with_any_file_of_the_artifact_and_no_other(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "out")
    fill(folder, "README.md", "checkpoint-5/x")
    artifact = only(scan(tmp_path))
    before, size = fingerprint(artifact)
    assert size == sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    fill(folder, "checkpoint-5/x", data=b"longer than before")
    assert fingerprint(artifact) == (before, size)
    seen = {before}
    fill(folder, "README.md", data=b"longer than before")
    seen.add(fingerprint(artifact)[0])
    os.utime(folder / "README.md", ns=(1, 1))
    seen.add(fingerprint(artifact)[0])
    (folder / "README.md").rename(folder / "READ.md")
    seen.add(fingerprint(artifact)[0])
    assert len(seen) == 4


def test_the_same_tree_is_found_the_same_however_it_was_made(tmp_path: Path) -> None:
    for root, order in (("x", (1, 2, 3)), ("y", (3, 1, 2))):
        for number in order:
            peft_folder(tmp_path / root / f"run-{number}")
    assert found(scan(tmp_path / "x")) == found(scan(tmp_path / "y"))
