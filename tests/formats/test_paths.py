"""What lies on disk, told by the names in it. The names are PEFT's own."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.other import EMBEDDING_LAYER_NAMES
from safetensors.torch import load_file, save_file
from torch import nn

from registry.core.errors import InvalidConfig, InvalidInput, MalformedTensors, SourceNotFound
from registry.formats.kinds import EMBEDDINGS
from registry.formats.live import read_live
from registry.formats.paths import read_path
from registry.operations.hashing import hash_file
from tests.operations.models import lora, walker, zoo
from tests.operations.test_push_live import tiny_llama
from tests.operations.test_round_trips import VARIANTS


def saved(model: Any, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def kind_of_file(path: Path) -> tuple[str, str]:
    with read_path(path) as source:
        return source.kind, source.tensor_files[0].role


def assert_told_apart(model: nn.Module, folder: Path) -> None:
    """The adapter's file alone is an adapter, the whole state dict is a checkpoint, however they come."""
    bare = saved(model, folder) / "adapter_model.safetensors"
    assert kind_of_file(bare) == ("adapter", "adapter")
    assert read_live(load_file(bare)).kind == "adapter"
    save_file({name: value.clone() for name, value in model.state_dict().items()}, folder / "full.safetensors")
    assert kind_of_file(folder / "full.safetensors") == ("checkpoint", "model")
    assert read_live(model.state_dict()).kind == "checkpoint"


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_adapter_is_told_from_a_checkpoint(variant: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(zoo(), LoraConfig(r=4, **VARIANTS[variant]))
    assert_told_apart(model, tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"], "bias": "all", "modules_to_save": ["norm"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1]}},
    ],
    ids=str,
)
def test_an_adapter_with_whole_embeddings_is_told_from_a_checkpoint(options: dict[str, Any], tmp_path: Path) -> None:
    assert_told_apart(get_peft_model(tiny_llama(), LoraConfig(r=2, task_type="CAUSAL_LM", **options)), tmp_path)


def test_the_embeddings_are_those_that_peft_saves() -> None:
    assert set(EMBEDDINGS) == set(EMBEDDING_LAYER_NAMES)


def test_a_model_without_adapters_is_a_base(tmp_path: Path) -> None:
    save_file(walker().state_dict(), tmp_path / "model.safetensors")
    assert kind_of_file(tmp_path / "model.safetensors") == ("base", "model")
    # Prefixes of adapters alone make none: a merged PeftModel has them too.
    save_file({"base_model.model.head.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert kind_of_file(tmp_path / "model.safetensors") == ("base", "model")


def test_a_configuration_decides(tmp_path: Path) -> None:
    with read_path(saved(lora(modules_to_save=["head"]), tmp_path)) as source:
        assert (source.kind, source.form) == ("adapter", "PEFT folder")
        assert source.config is not None
        assert source.peft_version == source.config.peft_version
    plain = {"head.weight": torch.zeros(2)}
    save_file(plain, tmp_path / "adapter_model.safetensors")
    assert kind_of_file(tmp_path) == ("adapter", "adapter")
    assert kind_of_file(tmp_path / "adapter_model.safetensors") == ("base", "model")


def test_a_bare_adapter_says_what_it_lacks(tmp_path: Path) -> None:
    folder = saved(lora(), tmp_path / "saved")
    with read_path(folder / "adapter_model.safetensors") as source:
        (note,) = source.notes
    assert note.startswith("pushed without its adapter_config.json, so lora_alpha is unknown; push the folder ")
    (folder / "adapter_config.json").unlink()
    with read_path(folder / "adapter_model.safetensors") as source:
        assert source.notes == ("pushed without its adapter_config.json, so lora_alpha is unknown",)
        assert source.config is None
        assert source.peft_version is None


def test_the_files_of_a_folder_are_kept_to_the_byte(tmp_path: Path) -> None:
    folder = saved(lora(), tmp_path)
    config = folder / "adapter_config.json"
    config.write_text("\n " + json.dumps(json.loads(config.read_bytes())) + "\n")
    with read_path(folder) as source:
        assert [(file.path, b"".join(file.chunks())) for file in source.plain_files] == [
            ("adapter_config.json", config.read_bytes()),
            ("README.md", (folder / "README.md").read_bytes()),
        ]
        data = b"".join(bytes(chunk) for chunk in source.tensor_files[0].chunks())
        assert data == (folder / "adapter_model.safetensors").read_bytes()
        assert source.tensor_files[0].size == len(data)


def test_a_folder_of_links_is_a_folder(tmp_path: Path) -> None:
    """As a snapshot in the hub's cache is one."""
    folder = saved(lora(), tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs", path.name))
    with read_path(snapshot) as ours, read_path(folder) as theirs:
        assert hash_file(ours.tensor_files[0]) == hash_file(theirs.tensor_files[0])
        assert [file.path for file in ours.plain_files] == [file.path for file in theirs.plain_files]


def test_a_file_that_is_renamed_away_is_read_all_the_same(tmp_path: Path) -> None:
    save_file({"w": torch.arange(9.0)}, tmp_path / "model.safetensors")
    with read_path(tmp_path / "model.safetensors") as source:
        expected = hash_file(source.tensor_files[0])
        (tmp_path / "model.safetensors").rename(tmp_path / "old.safetensors")
        save_file({"w": torch.zeros(9)}, tmp_path / "model.safetensors")
        assert hash_file(source.tensor_files[0]) == expected
        assert source.tensor_files[0].is_unchanged()


def test_a_file_that_is_written_to_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.arange(9.0)}, path)
    with read_path(path) as source:
        assert source.tensor_files[0].is_unchanged()
        with path.open("ab") as file:
            file.write(b"\0")
        assert not source.tensor_files[0].is_unchanged()


def test_a_file_is_closed_when_it_is_refused(tmp_path: Path) -> None:
    """An open file that is forgotten is a warning, and a warning fails the test."""
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    save_file({}, tmp_path / "empty.safetensors")
    for name, error in (("torn", MalformedTensors), ("empty", MalformedTensors)):
        with pytest.raises(error):
            read_path(tmp_path / f"{name}.safetensors")
    with pytest.raises(SourceNotFound):
        read_path(tmp_path / "none.safetensors")
    (tmp_path / "model.pth").write_bytes(b"")
    with pytest.raises(InvalidInput, match="expected a pickle, found an empty file"):
        read_path(tmp_path / "model.pth")
    (tmp_path / "model.npy").write_bytes(b"")
    with pytest.raises(InvalidInput, match=r"expected a PEFT or model folder, .* found something else"):
        read_path(tmp_path / "model.npy")
    folder = saved(lora(), tmp_path / "saved")
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(InvalidConfig):
        read_path(folder)
