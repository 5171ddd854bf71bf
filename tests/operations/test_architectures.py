"""How a pushed live model was built is kept beside its version, and found again wherever the version goes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from registry import Registry
from registry.catalog.descriptions import descriptions_of
from registry.catalog.versions import resolve
from registry.core.architecture import Architecture
from registry.core.errors import BlobNotFound, Corrupt, DigestMismatch, VersionNotFound
from registry.core.reference import parse_reference
from tests.operations.models import train

ARGUMENTS: dict[str, Any] = {"size": 16, "n_head": 4, "dropout": 0.0, "kernel": (3, 3), "name": None}


class Net(nn.Module):
    """A model that says how it was built; `n_head` changes its function and no shape."""

    def __init__(self, **changed: Any) -> None:
        super().__init__()
        self.arguments = {**ARGUMENTS, **changed}
        self.q_proj = nn.Linear(16, 16)

    @property
    def constructor_arguments(self) -> Mapping[str, Any]:
        return self.arguments

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x)


class Silent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x)


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.lora_model = model


NET = Architecture(f"{Net.__module__}.Net", ARGUMENTS)


def lora(base: nn.Module) -> nn.Module:
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
    train(model)
    return model


def blob_of(registry: Registry, reference: str) -> str | None:
    with registry._context.reading() as connection:
        return descriptions_of(connection, resolve(connection, parse_reference(reference)).id).get("architecture")


def blob_path(registry: Registry, root: Path, reference: str) -> Path:
    digest = blob_of(registry, reference)
    assert digest is not None
    return next((root / "blobs").rglob(digest))


@pytest.mark.parametrize(
    "make", [Net, lambda: lora(Net()), lambda: Wrapper(lora(Net()))], ids=["plain", "lora", "held"]
)
def test_a_live_model_keeps_how_it_was_built(registry: Registry, make: Any) -> None:
    pushed = registry.push(make(), "walk/net", probe=False)
    assert pushed.notes == ()
    of_a_base = {"rounded_digests"} if pushed.kind == "base" else set()
    assert registry.architecture("walk/net") == NET
    assert [
        dict(event.payload)["blobs"].keys() for event in registry.events("walk/net") if event.kind == "described"
    ] == [{"architecture", "modules", *of_a_base}]


def test_a_compiled_model_keeps_that_of_the_model_within(registry: Registry) -> None:
    registry.push(torch.compile(Net(), backend="eager"), "walk/net", probe=False)
    assert registry.architecture("walk/net") == NET


def test_an_attribute_does_as_well_and_the_wrapper_comes_first(registry: Registry) -> None:
    model = Wrapper(lora(Net()))
    model.constructor_arguments = {"model": "net"}
    registry.push(model, "walk/net", probe=False)
    assert registry.architecture("walk/net") == Architecture(f"{__name__}.Wrapper", {"model": "net"})


def test_it_stands_beside_the_probe_and_is_no_part_of_what_the_version_is(registry: Registry) -> None:
    registry.push(Net(), "walk/net")
    details = registry.show("walk/net")
    assert [set(event.payload["blobs"]) for event in details.events if event.kind == "described"] == [
        {"architecture", "modules", "probe", "rounded_digests"}
    ]
    registry.push(dict(Net().state_dict()), "walk/state")
    assert registry.architecture("walk/state") is None
    model = Net()
    with_it, without = registry.push(model, "walk/a", probe=False), registry.push(dict(model.state_dict()), "walk/b")
    assert with_it.digest == without.digest


def test_a_version_keeps_the_one_that_it_has(registry: Registry) -> None:
    model = Net()
    registry.push(model, "walk/net", probe=False)
    model.arguments["n_head"] = 8
    again = registry.push(model, "walk/net", probe=False)
    other = "that of this push is another"
    kept = [f"the version keeps the {one} that it has; {other}" for one in ("architecture", "modules")]
    assert list(again.notes) == kept
    assert registry.architecture("walk/net") == NET


def test_it_can_be_added_to_a_version_that_has_none(registry: Registry) -> None:
    model = Net()
    registry.push(dict(model.state_dict()), "walk/net")
    again = registry.push(model, "walk/net", probe=False)
    assert (again.version, again.created) == (1, False)
    assert registry.architecture("walk/net@1") == NET


def test_a_version_without_one_has_that_of_its_base(registry: Registry) -> None:
    base = Net()
    registry.push(base, "walk/base", probe=False)
    finetuned = {name: tensor + 1 for name, tensor in base.state_dict().items()}
    registry.push(finetuned, "walk/finetuned", base="walk/base")
    registry.push(lora(Silent()), "walk/lora", base="walk/finetuned", probe=False, force=True)
    registry.push(lora(Silent()), "walk/alone", probe=False)
    assert registry.architecture("walk/lora") == NET
    assert registry.architecture("walk/alone") is None
    with pytest.raises(VersionNotFound):
        registry.architecture("walk/base@2")


class Failing(Silent):
    @property
    def constructor_arguments(self) -> Mapping[str, Any]:
        raise RuntimeError("not built yet")


@pytest.mark.parametrize(
    ("make", "note"),
    [
        (lambda: Net(act=nn.ReLU()), r"no architecture is kept of .*Net: arguments\['act'\]: a ReLU is no plain data"),
        (lambda: Net(sizes=[1, {2}]), r"arguments\['sizes'\]\[1\]: a set is no plain data"),
        (lambda: Net(w=torch.ones(2)), r"arguments\['w'\]: a Tensor is no plain data"),
        (lambda: Net(text="x" * (1 << 20)), "expected at most 1048576"),
        (Failing, r"constructor_arguments of .*Failing failed: RuntimeError\('not built yet'\)"),
    ],
)
def test_arguments_that_are_no_plain_data_are_noted_and_the_push_goes_on(
    registry: Registry, make: Any, note: str
) -> None:
    pushed = registry.push(make(), "walk/net", probe=False)
    assert len(pushed.notes) == 1
    assert re.search(note, pushed.notes[0])
    assert registry.architecture("walk/net") is None


def test_what_is_no_mapping_is_noted(registry: Registry) -> None:
    model = Silent()
    model.constructor_arguments = [1, 2]  # type: ignore[assignment]
    pushed = registry.push(model, "walk/net", probe=False)
    assert "Silent is a list; expected a mapping" in pushed.notes[0]


def test_it_survives_a_reindex_and_goes_along_to_another_registry(
    registry: Registry, root: Path, tmp_path: Path
) -> None:
    registry.push(Net(), "walk/base", probe=False)
    registry.push(lora(Silent()), "walk/lora", base="walk/base", probe=False, force=True)
    registry.export("walk/lora", to=tmp_path / "bundle.tar", no_base=True)
    copy = tmp_path / "copy"
    shutil.copytree(root, copy, ignore=shutil.ignore_patterns("catalog.sqlite*"))
    Registry.reindex(copy)
    with Registry.open(copy) as again, Registry.init(tmp_path / "other") as other:
        other.import_(tmp_path / "bundle.tar")
        assert again.architecture("walk/lora") == other.architecture("walk/lora") == NET
        assert blob_of(other, "walk/base") == blob_of(again, "walk/base") == blob_of(registry, "walk/base")
        again.gc(grace=timedelta(0))
        assert again.architecture("walk/lora") == NET
    assert Registry.fsck(copy, deep=True).problems == ()


def test_a_damaged_one_is_named(registry: Registry, root: Path) -> None:
    registry.push(Net(), "walk/net", probe=False)
    path = blob_path(registry, root, "walk/net")
    whole = path.read_bytes()
    for content, error in ((whole[:-1], DigestMismatch), (b" " * ((1 << 20) + 1), Corrupt), (None, BlobNotFound)):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(error):
            registry.architecture("walk/net")


def test_it_is_read_without_torch(registry: Registry, root: Path) -> None:
    registry.push(Net(), "walk/net", probe=False)
    code = (
        "import sys; from registry import Registry; found = Registry.open(sys.argv[1]).architecture('walk/net'); "
        "heavy = {'torch', 'peft', 'numpy', 'safetensors', sys.argv[2]} & set(sys.modules); "
        "print(found.arguments['n_head'], sorted(heavy))"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(root), __name__], capture_output=True, text=True, check=True)
    assert ran.stdout == "4 []\n"
