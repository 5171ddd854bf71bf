"""Checkpoint files in memory: the same tensors that torch.load gives, taken apart, without torch.load."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from registry.core.errors import (
    InvalidInput,
    MalformedTensors,
    RegistryError,
    SourceNotFound,
    UnsafePickle,
    UnsupportedTensor,
)
from registry.core.layout import Layout, TensorSpec
from registry.core.safetensors_header import build_header
from registry.core.state_document import Inert
from registry.formats.loaded_payload import LoadedPayload, load_payload
from registry.formats.safetensors_tree import write_safetensors_tree

LEGACY = Path(__file__).parent / "legacy"
FORMS = {
    "lora_adapters.pth": ({"adapter"}, set()),
    "lora_full.pth": ({"model"}, set()),
    "lora_checkpoint.pth": ({"model", "ema", "optimizer", "scheduler"}, {"cfg", "epoch", "global_step", "metadata"}),
    "lora_checkpoint_later.pth": ({"model", "optimizer", "scheduler"}, {"cfg", "epoch", "global_step", "metadata"}),
    "merged.pth": ({"model"}, {"model_type"}),
    "workspace.ckpt": ({"model", "optimizer"}, {"cfg", "epoch", "global_step"}),
    "forward.pth": ({"model"}, set()),
}


def tensors_of(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return [one for part in parts for one in tensors_of(part)]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def loaded(path: Path, payload: Any, **options: Any) -> LoadedPayload:
    torch.save(payload, path, **options)
    return load_payload(path)


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_the_older_framework_is_taken_apart(name: str) -> None:
    found = load_payload(LEGACY / name)
    assert (set(found.state_dicts), set(found.training)) == FORMS[name]
    assert (found.settings is not None) == name.startswith("lora_")
    assert found.settings is None or (found.settings["lora_r"], found.settings["lora_alpha"]) == (4, 8)
    assert (found.header, found.form) == ({}, "torch zip")


@pytest.mark.parametrize("name", ["lora_adapters.pth", "lora_full.pth", "merged.pth", "forward.pth"])
def test_the_tree_is_what_torch_load_gives(name: str) -> None:
    assert same(load_payload(LEGACY / name).tree, torch.load(LEGACY / name, weights_only=True))


def test_pickles_within_are_read_in_their_places() -> None:
    found = load_payload(LEGACY / "workspace.ckpt")
    assert found.tree["pickles"] == {"epoch": 10, "global_step": 1000}
    assert (found.training["epoch"], found.training["global_step"]) == (10, 1000)
    assert found.training["cfg"]["_target_"] == "pdp.workspace.DiffusionPolicyWorkspace"


def test_a_model_that_is_stored_twice_is_given_once() -> None:
    found = load_payload(LEGACY / "lora_checkpoint_later.pth")
    assert len(found.state_dicts["model"]) == 110
    assert [note.partition(" ")[0] for note in found.notes] == ["110", "lora_model"]


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_own_memory_that_can_be_written_to(tmp_path: Path, zipped: bool) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    payload = {"model": {"w": whole, "again": whole, "row": whole[1], "turned": whole.T, "none": whole[:0]}}
    path = tmp_path / "model.pth"
    found = loaded(path, payload, _use_new_zipfile_serialization=zipped)
    model = found.state_dicts["model"]
    assert same(model, payload["model"])
    assert model["w"] is model.pop("again")
    assert model["w"] is found.tree["model"]["w"]
    path.unlink()
    for tensor in model.values():
        assert tensor.is_contiguous()
        assert tensor._base is None
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        tensor += 1
    assert torch.equal(model["w"], whole + 1)
    assert torch.equal(model["row"], whole[1] + 1)


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


def test_every_dtype_comes_back(tmp_path: Path) -> None:
    names = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 float8_e5m2 float8_e4m3fn"
    tensors = {name: torch.ones(3).to(getattr(torch, name)) for name in names.split()}
    tensors["scalar"] = torch.tensor(3)
    found = loaded(tmp_path / "model.pth", tensors).state_dicts["model"]
    assert all(found[name].dtype == tensor.dtype for name, tensor in tensors.items())
    assert all(torch.equal(bits(found[name]), bits(tensor)) for name, tensor in tensors.items())


class Setting:
    def __init__(self) -> None:
        self.lr = 0.1


def test_an_object_of_somebodys_own_is_inert(tmp_path: Path) -> None:
    found = loaded(tmp_path / "run.pth", {"model": {"w": torch.ones(2)}, "setting": Setting(), "dtype": torch.float16})
    setting = found.training["setting"]
    assert isinstance(setting, Inert)
    assert (setting.name, setting.state) == (f"{Setting.__module__}.Setting", {"state": {"lr": 0.1}})
    assert found.training["dtype"] == "torch.float16"
    assert any("Setting" in note for note in found.notes)


def test_what_holds_itself_ends(tmp_path: Path) -> None:
    run: dict[str, Any] = {"model": {"w": torch.ones(2)}}
    run["run"] = run
    assert loaded(tmp_path / "run.pth", run).tree["run"] == Inert("a reference back to itself")


def test_an_optimizer_alone_is_taken_apart(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    found = loaded(tmp_path / "optimizer.pth", optimizer.state_dict())
    assert set(found.state_dicts) == {"optimizer"}
    torch.optim.AdamW(model.parameters()).load_state_dict(found.state_dicts["optimizer"])
    assert set(loaded(tmp_path / "both.pth", {"optimizer": optimizer.state_dict()}).state_dicts) == {"optimizer"}
    assert loaded(tmp_path / "none.pth", {"epoch": 3}).training == {"epoch": 3}


def test_a_single_state_dict_of_another_name_is_the_model(tmp_path: Path) -> None:
    assert set(loaded(tmp_path / "policy.pth", {"policy": {"w": torch.ones(2)}, "epoch": 1}).state_dicts) == {"model"}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_adapter_tensors_alone_are_an_adapter(tmp_path: Path, suffix: str) -> None:
    tensors = {"q.lora_A.weight": torch.ones(4, 2), "q.lora_B.weight": torch.ones(2, 4)}
    path = tmp_path / f"adapter{suffix}"
    if suffix == ".pth":
        torch.save(tensors, path)
    else:
        save_file(tensors, path, metadata={"format": "pt", "settings": "{}"})
    found = load_payload(path)
    assert same(found.state_dicts, {"adapter": tensors})
    assert found.header == ({} if suffix == ".pth" else {"format": "pt", "settings": "{}"})
    assert (found.settings, found.training) == (None, {})


def test_a_plain_safetensors_file_is_a_model(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2), "b": torch.zeros(3)}, tmp_path / "model.bin")
    found = load_payload(tmp_path / "model.bin")
    assert (set(found.state_dicts["model"]), found.header, found.form) == ({"w", "b"}, {}, "safetensors")


def test_options_of_a_lora_are_carried_along(tmp_path: Path) -> None:
    adapter = {"q.lora_A.weight": torch.ones(4, 2), "q.lora_B.weight": torch.ones(2, 4)}
    settings = {"lora_r": 4, "lora_alpha": 8, "target_modules": ["q"], "lora_options": {"use_rslora": True}}
    assert loaded(tmp_path / "a.pth", {**settings, "lora_state_dict": adapter}).settings == settings
    assert loaded(tmp_path / "b.pth", {"model_state_dict": adapter, "lora_config": settings}).settings == settings


def torn(path: Path) -> list[bytes]:
    whole = path.read_bytes()
    parts = [whole[:size] for size in (0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 1)]
    return [*parts, b"\0" * 64, b"{}", b"PK\x03\x04"]


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors", "tree"])
def test_a_torn_file_gives_one_error_that_names_it(tmp_path: Path, form: str) -> None:
    path = tmp_path / ("run.safetensors" if form in ("safetensors", "tree") else "run.pth")
    payload = {"model": {"w": torch.randn(30, 30)}, "epoch": 3}
    if form == "safetensors":
        save_file(payload["model"], path)  # type: ignore[arg-type]
    elif form == "tree":
        with path.open("wb") as file:
            write_safetensors_tree(payload, file)
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=form == "zip")
    for content in torn(path):
        path.write_bytes(content)
        with pytest.raises(InvalidInput, match=path.name):
            load_payload(path)


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFound, match=r"missing\.pth"):
        load_payload(tmp_path / "missing.pth")
    with pytest.raises(InvalidInput, match="is a folder"):
        load_payload(tmp_path)
    with pytest.raises(InvalidInput, match="NUL"):
        load_payload(Path("a\0b.pth"))
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(InvalidInput, match="not a regular file"):
        load_payload(tmp_path / "pipe.pth")


class Caller:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("inner", [False, True])
def test_nothing_of_a_file_is_run(tmp_path: Path, inner: bool) -> None:
    bad: Any = Caller(tmp_path / "ran")
    payload = {"state_dicts": {"model": {"w": torch.ones(1)}}, "pickles": {"x": pickle.dumps(bad)} if inner else bad}
    with pytest.raises(UnsafePickle, match="nothing was run"):
        loaded(tmp_path / "bad.pth", payload)
    assert not (tmp_path / "ran").exists()


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def shared(levels: int) -> Any:
    value: Any = [0]
    for _ in range(levels):
        value = [value, value]
    return value


HOSTILE: dict[str, tuple[Any, type[RegistryError], str]] = {
    "deep": ({"model": {"w": torch.ones(1)}, "x": nested(300)}, InvalidInput, "nested over 200 deep"),
    "without end": ({"model": {"w": torch.ones(1)}, "x": shared(60)}, InvalidInput, "over 2000000 values"),
    "an object as a key": ({"model": {"w": torch.ones(1)}, "x": {Setting(): 1}}, InvalidInput, "as keys and in sets"),
    "an object in a set": ({"model": {"w": torch.ones(1)}, "x": {Setting()}}, InvalidInput, "as keys and in sets"),
    "a list": ([torch.ones(2)], InvalidInput, "expected a state dict or a checkpoint, found a list"),
    "two models": ({"model": {"w": torch.ones(2)}, "net": {"w": torch.ones(2)}}, InvalidInput, "could be its model"),
    "a sparse tensor": ({"w": torch.eye(3).to_sparse()}, UnsupportedTensor, "sparse"),
    "a vast view": ({"w": torch.zeros(1).expand(2**40)}, MalformedTensors, "views repeat them"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused(tmp_path: Path, case: str) -> None:
    payload, error, message = HOSTILE[case]
    with pytest.raises(error, match=message):
        loaded(tmp_path / "bad.pth", payload)


def test_a_packed_dtype_is_refused(tmp_path: Path) -> None:
    head = build_header(Layout((TensorSpec("w", "F4", (2,)),)))
    (tmp_path / "m.safetensors").write_bytes(head + b"\0")
    with pytest.raises(UnsupportedTensor, match="w is F4"):
        load_payload(tmp_path / "m.safetensors")
