"""Checkpoints as people save them: what is a model, what is training state, and what nobody can tell."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from registry import Registry
from registry.core.errors import InvalidInput, MalformedTensors, RegistryError, UnsafePickle
from registry.formats.paths import read_path


def saved(path: Path, payload: object, **options: Any) -> Path:
    torch.save(payload, path, **options)
    return path


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))


def components(path: Path) -> tuple[str, dict[str, list[str]]]:
    with read_path(path) as source:
        (file,) = source.tensor_files
        return source.kind, {role: [name for name, _ in entries] for role, entries in file.entries.items()}


@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict_is_a_base(tmp_path: Path, zipped: bool) -> None:
    path = saved(tmp_path / "model.pth", model().state_dict(), _use_new_zipfile_serialization=zipped)
    assert components(path) == ("base", {"model": list(model().state_dict())})


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".bin", ".weights", ""])
def test_the_content_decides_and_not_the_suffix(tmp_path: Path, suffix: str) -> None:
    assert components(saved(tmp_path / f"model{suffix}", model().state_dict()))[0] == "base"


def test_a_training_run_is_a_checkpoint_with_its_optimizer(tmp_path: Path) -> None:
    made = model()
    optimizer = torch.optim.AdamW(made.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    made(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    scheduler.step()
    payload = {
        "epoch": 3,
        "model_state_dict": made.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(),
        "loss": torch.tensor(0.5),
        "args": {"lr": 1e-3},
    }
    path = saved(tmp_path / "run.ckpt", payload)
    with Registry.init(tmp_path / "registry") as registry:
        registry.push(path, "a/run")
        assert registry.get("a/run").metadata == {"epoch": 3}
        fresh = model()
        registry.load("a/run", fresh, component="model")
        assert all(
            torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), made.state_dict().values(), strict=True)
        )
        again = torch.optim.AdamW(fresh.parameters())
        again.load_state_dict(registry.load("a/run", component="optimizer"))
        torch.testing.assert_close(again.state_dict(), optimizer.state_dict(), rtol=0, atol=0)
        steps = torch.optim.lr_scheduler.StepLR(again, 3)
        steps.load_state_dict(registry.load("a/run", component="scheduler"))
        assert steps.state_dict() == scheduler.state_dict()
        training = registry.load("a/run", component="training")
        assert (training["epoch"], training["args"], training["loss"].item()) == (3, {"lr": 1e-3}, 0.5)


def test_lightning_is_understood(tmp_path: Path) -> None:
    made = model()
    payload = {
        "epoch": 1,
        "global_step": 20,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": {f"net.{name}": tensor for name, tensor in made.state_dict().items()},
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {},
        "optimizer_states": [torch.optim.SGD(made.parameters(), lr=0.1).state_dict()],
        "lr_schedulers": [],
        "hyper_parameters": {"hidden": 5},
    }
    kind, found = components(saved(tmp_path / "lightning.ckpt", payload))
    assert (kind, set(found)) == ("checkpoint", {"model", "optimizer", "training"})


def test_mixed_dtypes_are_kept(tmp_path: Path) -> None:
    tensors = {
        "a": torch.ones(2, dtype=torch.float16),
        "b": torch.ones(3, dtype=torch.bfloat16),
        "c": torch.ones(2, dtype=torch.int64),
        "d": torch.tensor(True),
        "e": torch.ones(4, dtype=torch.float8_e4m3fn),
    }
    with Registry.init(tmp_path / "registry") as registry:
        registry.push(saved(tmp_path / "mixed.pth", tensors), "a/mixed")
        loaded = registry.load("a/mixed")
        assert all(loaded[name].dtype == tensor.dtype for name, tensor in tensors.items())
        assert all(torch.equal(loaded[name].float(), tensor.float()) for name, tensor in tensors.items())


class Setting:
    def __init__(self) -> None:
        self.lr = 0.1


def test_a_class_of_somebodys_own_is_kept_as_data_and_reported(tmp_path: Path) -> None:
    path = saved(tmp_path / "run.pth", {"model": model().state_dict(), "settings": Setting()})
    with Registry.init(tmp_path / "registry") as registry:
        pushed = registry.push(path, "a/run")
        assert any(f"{Setting.__module__}.Setting" in note for note in pushed.notes)
        settings = registry.load("a/run", component="training")["settings"]
        assert (settings.name, settings.state) == (f"{Setting.__module__}.Setting", {"state": {"lr": 0.1}})


class MovingAverage:
    def __init__(self, shadow: dict[str, torch.Tensor]) -> None:
        self.decay = 0.99
        self.shadow = shadow
        self.owner = self


def test_tensors_within_an_object_of_somebodys_own_are_kept_and_come_back(tmp_path: Path) -> None:
    shadow = {"w": torch.randn(3, 2)}
    path = saved(tmp_path / "run.pth", {"model": model().state_dict(), "ema": MovingAverage(shadow)})
    with Registry.init(tmp_path / "registry") as registry:
        registry.push(path, "a/run")
        kept = registry.load("a/run", component="training")["ema"]
        assert torch.equal(kept.state["state"]["shadow"]["w"], shadow["w"])
        registry.pull("a/run", tmp_path / "out.pth")
        assert (tmp_path / "out.pth").read_bytes() == path.read_bytes()


def test_a_dict_that_holds_itself_comes_back_as_it_was(tmp_path: Path) -> None:
    run: dict[str, Any] = {"model": model().state_dict(), "averages": {"w": torch.ones(2)}}
    run["averages"]["run"] = run["averages"]
    path = saved(tmp_path / "run.pth", run)
    with Registry.init(tmp_path / "registry") as registry:
        registry.push(path, "a/run")
        registry.pull("a/run", tmp_path / "out.pth")
        assert (tmp_path / "out.pth").read_bytes() == path.read_bytes()


def test_tensors_under_the_key_training_stand_beside_the_plain_values(tmp_path: Path) -> None:
    run = {"model": model().state_dict(), "training": {"losses": torch.ones(3)}, "epoch": 2}
    path = saved(tmp_path / "run.pth", run)
    with Registry.init(tmp_path / "registry") as registry:
        registry.push(path, "a/run")
        kept = registry.load("a/run", component="training")
        assert torch.equal(kept["training"]["losses"], torch.ones(3))
        assert kept["epoch"] == 2


def test_an_object_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    chain: Any = None
    for _ in range(150):
        chain = MovingAverage({"next": chain})
    path = saved(tmp_path / "run.pth", {"model": model().state_dict(), "chain": chain})
    with pytest.raises(InvalidInput, match="nested over 200 deep"):
        read_path(path)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer: fetch the file itself"),
        (b"<html>404</html>", "a web page"),
    ],
)
def test_what_only_has_the_name_of_a_checkpoint_is_named(tmp_path: Path, content: bytes, found: str) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match=found):
        read_path(path)


REFUSED: dict[str, tuple[Any, type[RegistryError], str]] = {
    "no tensors": ({"epoch": 3}, MalformedTensors, "holds no tensors; there is nothing to keep"),
    "empty": ({}, MalformedTensors, "holds no tensors"),
    "an empty model": ({"model": {}}, MalformedTensors, "holds no tensors"),
    "a tensor": (torch.ones(3), InvalidInput, "expected a state dict or a checkpoint, found a single tensor"),
    "a list": ([torch.ones(3)], InvalidInput, "found a list"),
    "a number": (3, InvalidInput, "found a int"),
    "two models": (
        {"model": {"w": torch.ones(2)}, "state_dict": {"w": torch.zeros(2)}},
        InvalidInput,
        "holds two state dicts that could be its model, model and state_dict; save one of them alone",
    ),
    "two state dicts": (
        {"generator": {"w": torch.ones(2)}, "discriminator": {"w": torch.zeros(2)}},
        InvalidInput,
        "holds 2 state dicts and none that is called model: generator, discriminator",
    ),
    "an optimizer alone": (
        {"optimizer": {"state": {0: {"step": torch.ones(())}}, "param_groups": []}},
        InvalidInput,
        "holds no model, only optimizer",
    ),
    "an optimizer's own file": (
        {"state": {0: {"step": torch.ones(())}}, "param_groups": []},
        InvalidInput,
        "holds no model, only optimizer",
    ),
    "a module as a whole": (nn.Linear(2, 2), InvalidInput, "an object of torch.nn.modules.linear.Linear; save the"),
    "modules as a whole": (
        {"G": nn.Linear(2, 2)},
        InvalidInput,
        "tensors that stand in no dict of named tensors, in a dict of G; save the model's state_dict()",
    ),
    "a control character": ({"w\n": torch.ones(2)}, MalformedTensors, "holds a control character"),
    "a sparse tensor": ({"w": torch.eye(3).to_sparse()}, RegistryError, "sparse"),
    "no rank": (
        {"lora_r": "4", "lora_alpha": 8, "lora_state_dict": {"q.lora_A.weight": torch.ones(4, 2)}},
        InvalidInput,
        "lora_r",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_nobody_can_tell_is_refused_and_leaves_nothing(tmp_path: Path, case: str) -> None:
    payload, error, message = REFUSED[case]
    path = saved(tmp_path / "bad.pth", payload)
    with Registry.init(tmp_path / "registry") as registry:
        with pytest.raises(error, match=re.escape(message)):
            registry.push(path, "a/bad")
        assert registry.find() == []
        assert list(registry._context.store.blobs.digests()) == []


def test_a_module_itself_is_refused_by_the_name_of_what_it_would_call(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.pth", torch.nn.functional.relu)
    with Registry.init(tmp_path / "registry") as registry, pytest.raises((UnsafePickle, InvalidInput)):
        registry.push(path, "a/module")


def test_a_file_that_changes_while_it_is_pushed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from registry.operations import push as module

    path = saved(tmp_path / "model.pth", model().state_dict())
    digest_files = module.digest_files

    def rewritten_in_between(*arguments: Any, **options: Any) -> Any:
        done = digest_files(*arguments, **options)
        with path.open("r+b") as file:
            file.write(b"PK")
        return done

    monkeypatch.setattr(module, "digest_files", rewritten_in_between)
    with Registry.init(tmp_path / "registry") as registry:
        with pytest.raises(InvalidInput, match="changed while it was pushed"):
            registry.push(path, "a/changed")
        assert registry.find() == []


def test_views_of_one_storage_come_back_each_by_itself(tmp_path: Path) -> None:
    whole = torch.randn(40, 30)
    tensors = {"whole": whole, "again": whole, "half": whole[:20], "turned": whole.T, "empty": whole[:0]}
    with Registry.init(tmp_path / "registry") as registry:
        registry.push(saved(tmp_path / "views.pth", tensors), "a/views")
        loaded = registry.load("a/views")
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
        registry.pull("a/views", tmp_path / "out.pth")
        assert (tmp_path / "out.pth").read_bytes() == (tmp_path / "views.pth").read_bytes()
