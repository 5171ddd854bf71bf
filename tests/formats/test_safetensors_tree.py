"""Training checkpoints as safetensors: one flat file for everybody, the whole tree for us, and the same version in a
registry as the `.pth` of that tree."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from registry import Registry
from registry.catalog.contents import Contents
from registry.core.errors import InvalidInput, MalformedTensors, NotStored, RegistryError, UnsupportedTensor
from registry.core.state_document import Inert
from registry.formats.loaded_payload import load_payload
from registry.formats.paths import read_path
from registry.formats.safetensors_tree import STATE, write_safetensors_tree
from tests.conformance.independent_reader import check_store
from tests.formats.test_loaded_payload import same

LEGACY = Path(__file__).parent / "legacy"


def write(path: Path, tree: Any) -> Path:
    with path.open("wb") as file:
        write_safetensors_tree(tree, file)
    return path


def run(seed: int = 0) -> dict[str, Any]:
    """A checkpoint after one step, its model tied to its moving average in one tensor."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(60, 50), nn.BatchNorm1d(50), nn.Linear(50, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    model(torch.randn(4, 60)).sum().backward()
    optimizer.step()
    scheduler.step()
    state = model.state_dict()
    average = {name: tensor.clone() for name, tensor in state.items()} | {"0.weight": state["0.weight"]}
    return {
        "state_dicts": {
            "model": state,
            "ema_model": average,
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
        },
        "epoch": 3,
        "loss": math.inf,
        "rates": (1.0, 2),
        "sums": {0: torch.ones(2, dtype=torch.int64), "a.b": torch.zeros(())},
        "raw": b"\0\1",
    }


def contents(registry: Registry, reference: str) -> Contents:
    return registry.show(reference).contents


def by_name(registry: Registry, reference: str) -> dict[str, tuple[dict[str, str], str | None]]:
    """Of each component the digests of its tensors by name, and of its state document."""
    return {
        role: ({s.name: d for s, d in zip(one.layout, one.tensors, strict=True)}, one.data)
        for role, one in contents(registry, reference).components.items()
    }


def test_any_reader_of_safetensors_opens_it_as_a_flat_file(tmp_path: Path) -> None:
    tree = run()
    flat = load_file(write(tmp_path / "run.safetensors", tree))
    assert torch.equal(flat["state_dicts.model.0.weight"], tree["state_dicts"]["model"]["0.weight"])
    assert torch.equal(flat["sums.0"], tree["sums"][0])
    assert "state_dicts.optimizer.state.0.exp_avg" in flat


def test_a_tensor_that_stands_twice_is_written_once_and_is_one_again(tmp_path: Path) -> None:
    path = write(tmp_path / "run.safetensors", run())
    shared = [name for name in load_file(path) if name.endswith("model.0.weight")]
    assert shared == ["state_dicts.model.0.weight"]
    states = load_payload(path).state_dicts
    assert states["model"]["0.weight"] is states["ema"]["0.weight"]
    assert states["model"]["2.weight"] is not states["ema"]["2.weight"]


def test_the_tree_comes_back_and_its_parts_are_those_of_the_pth(tmp_path: Path) -> None:
    tree = run()
    found = load_payload(write(tmp_path / "run.safetensors", tree))
    torch.save(tree, tmp_path / "run.pth")
    other = load_payload(tmp_path / "run.pth")
    assert same(sort(found.tree), sort(tree))
    assert same(sort(found.state_dicts), sort(other.state_dicts))
    assert same(sort(found.training), sort(other.training))
    assert (found.header, found.form, found.settings) == ({"format": "pt"}, "safetensors", None)


def sort(tree: Any) -> Any:
    """The tree with dicts of text in the order of their keys."""
    if isinstance(tree, dict):
        items = sorted(tree.items()) if all(isinstance(key, str) for key in tree) else tree.items()
        return {key: sort(value) for key, value in items}
    return type(tree)(map(sort, tree)) if isinstance(tree, list | tuple) else tree


def test_tensors_lie_in_the_order_of_the_safetensors_library(tmp_path: Path) -> None:
    path = write(tmp_path / "run.safetensors", run())
    with safe_open(path, "pt") as file:
        state = {STATE: file.metadata()[STATE], "format": "pt"}
    save_file(load_file(path), tmp_path / "again.safetensors", metadata=state)
    size = sum(tensor.nbytes for tensor in load_file(path).values())
    assert path.read_bytes()[-size:] == (tmp_path / "again.safetensors").read_bytes()[-size:]
    assert same(load_payload(tmp_path / "again.safetensors").tree, load_payload(path).tree)


def test_odd_keys_get_names_of_their_own(tmp_path: Path) -> None:
    tree = {
        "a.b": torch.ones(1),
        "a": {"b": torch.zeros(1)},
        "": torch.ones(2),
        3: [torch.ones(3)],
        None: torch.ones(4),
    }
    path = write(tmp_path / "odd.safetensors", {"model": {"w": torch.ones(5)}, "odd": tree})
    assert set(load_file(path)) == {"model.w", "odd.a.b", "odd.a.b#2", "odd.", "odd.3.0", "odd.None"}
    assert same(load_payload(path).tree["odd"], tree)


def test_inert_objects_with_tensors_in_them_come_back(tmp_path: Path) -> None:
    tree = {"model": {"w": torch.ones(2)}, "ema": Inert("a.B", (1,), {"shadow": {"w": torch.zeros(2)}})}
    path = write(tmp_path / "run.safetensors", tree)
    found = load_payload(path).tree["ema"]
    assert (found.name, found.arguments) == ("a.B", (1,))
    assert torch.equal(found.state["shadow"]["w"], torch.zeros(2))
    with Registry.init(tmp_path / "registry") as registry:
        registry.push(path, "a/run")
        kept = registry.load("a/run", component="training")["ema"]
        assert torch.equal(kept.state["shadow"]["w"], torch.zeros(2))


def test_a_checkpoint_without_tensors_is_read(tmp_path: Path) -> None:
    assert load_payload(write(tmp_path / "s.safetensors", {"epoch": 3})).training == {"epoch": 3}


def cycle() -> dict[str, Any]:
    tree: dict[str, Any] = {"model": {"w": torch.ones(1)}}
    tree["self"] = tree
    return tree


class Own:
    pass


UNWRITABLE: dict[str, tuple[Any, type[RegistryError], str]] = {
    "an object": ({"a": [Own()]}, InvalidInput, r"the checkpoint\['a'\]\[0\]: a Own is no plain data"),
    "a tensor in a set": ({"a": {torch.ones(1)}}, InvalidInput, "a Tensor is no plain data"),
    "a cycle": (cycle(), InvalidInput, "nested over 200 deep"),
    "a sparse tensor": ({"a": torch.eye(2).to_sparse()}, UnsupportedTensor, "a: safetensors cannot hold"),
    "a meta tensor": ({"a": torch.ones(2, device="meta")}, UnsupportedTensor, "a meta tensor"),
    "a control character": ({"a\n": torch.ones(2)}, MalformedTensors, "control character"),
    "a reserved name": ({"__metadata__": torch.ones(2)}, MalformedTensors, "one that is taken"),
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_what_cannot_be_written_is_refused_before_a_byte_is(case: str) -> None:
    tree, error, message = UNWRITABLE[case]
    file = io.BytesIO()
    with pytest.raises(error, match=message):
        write_safetensors_tree(tree, file)
    assert file.getvalue() == b""


# ---------------------------------------------------------------- in a registry


def test_a_push_makes_the_components_of_the_pth(tmp_path: Path) -> None:
    tree = run()
    torch.save(tree, tmp_path / "run.pth")
    path = write(tmp_path / "run.safetensors", tree)
    with Registry.init(tmp_path / "registry") as registry:
        pickled, pushed = registry.push(tmp_path / "run.pth", "a/pth"), registry.push(path, "a/run")
        assert by_name(registry, "a/run") == by_name(registry, "a/pth")
        assert set(by_name(registry, "a/run")) == {"model", "ema", "optimizer", "scheduler", "sums", "training"}
        assert (pushed.kind, registry.get("a/run").metadata) == (pickled.kind, {"epoch": 3})
        assert registry.get("a/run").content_digest == registry.get("a/pth").content_digest
        assert pushed.bytes_new < path.stat().st_size / 2  # the tensors are there
        fresh = nn.Sequential(nn.Linear(60, 50), nn.BatchNorm1d(50), nn.Linear(50, 2))
        registry.load("a/run", fresh, component="model")
        again = torch.optim.AdamW(fresh.parameters())
        again.load_state_dict(registry.load("a/run", component="optimizer"))
        torch.testing.assert_close(again.state_dict(), tree["state_dicts"]["optimizer"], rtol=0, atol=0)
        assert registry.load("a/run", component="training")["rates"] == (1.0, 2)


@pytest.mark.parametrize("first", [True, False])
def test_it_survives_a_pull_a_reindex_and_another_registry(tmp_path: Path, first: bool) -> None:
    """As a blob of its own, and as a header with tensors that were there before."""
    trees = [run(), run(1), {"model": run()["state_dicts"]["model"], "epoch": 2}, {"w": torch.ones(2), "step": 4}]
    root = tmp_path / "registry"
    with Registry.init(root) as registry:
        for number, tree in enumerate(trees):
            if not first:
                torch.save(tree, tmp_path / f"{number}.pth")
                registry.push(tmp_path / f"{number}.pth", f"a/pth{number}")
            registry.push(write(tmp_path / f"{number}.safetensors", tree), f"a/run{number}")
        before = [by_name(registry, f"a/run{number}") for number in range(len(trees))]
        carried = [contents(registry, f"a/run{number}").files[0].role for number in range(len(trees))]
        assert carried == [None, None, None, "model"]
    check_store(root)
    (root / "catalog.sqlite").unlink()
    Registry.reindex(root)
    assert Registry.fsck(root, deep=True).problems == ()
    with Registry.open(root) as registry, Registry.init(tmp_path / "other") as other:
        registry.export(*(f"a/run{number}" for number in range(len(trees))), to=tmp_path / "bundle.tar")
        other.import_(tmp_path / "bundle.tar")
        for one in (registry, other):
            assert [by_name(one, f"a/run{number}") for number in range(len(trees))] == before
            for number in range(len(trees)):
                out = tmp_path / f"out{number}.safetensors"
                one.pull(f"a/run{number}", out, force=True)
                assert out.read_bytes() == (tmp_path / f"{number}.safetensors").read_bytes()
    check_store(tmp_path / "other")
    assert Registry.fsck(tmp_path / "other", deep=True).problems == ()


@pytest.mark.parametrize(
    "name", ["lora_adapters.pth", "lora_full.pth", "lora_checkpoint.pth", "lora_checkpoint_later.pth"]
)
def test_the_older_frameworks_files_are_the_same_in_this_form(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "run.safetensors", load_payload(LEGACY / name).tree)
    with Registry.init(tmp_path / "registry") as registry:
        old, new = registry.push(LEGACY / name, "a/old"), registry.push(path, "a/new")
        assert (by_name(registry, "a/new"), new.kind) == (by_name(registry, "a/old"), old.kind)
        one, other = registry.get("a/new"), registry.get("a/old")
        assert (one.content_digest, one.r, one.lora_alpha) == (other.content_digest, 4, 8)


def test_it_is_not_recorded_as_external(tmp_path: Path) -> None:
    path = write(tmp_path / "run.safetensors", {"model": {"w": torch.ones(2)}})
    with Registry.init(tmp_path / "registry") as registry:
        with pytest.raises(
            InvalidInput, match="a checkpoint with a state document, so it cannot be recorded as external"
        ):
            registry.push(path, "a/base", external=True)
        registry.push(path, "a/base")
        adapter = {"q.lora_A.weight": torch.ones(4, 2), "q.lora_B.weight": torch.ones(2, 4)}
        registry.push(adapter, "a/lora", base="a/base", force=True)
        with pytest.raises(NotStored, match="a checkpoint with a state document"):
            registry.export("a/lora", to=tmp_path / "bundle", no_base=True)


def test_a_file_that_was_cut_in_between_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "run.safetensors", run())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(MalformedTensors, match=r"run\.safetensors"):
        read_path(path)


MODEL: dict[str, Tensor] = {"model.w": torch.ones(2)}
HOSTILE: dict[str, tuple[str, type[RegistryError], str]] = {
    "no JSON": ("{", MalformedTensors, "expected a state document as 'state' in its header"),
    "empty": ("", MalformedTensors, "expected a state document"),
    "another tensor": ('{"model":{"w":{"$tensor":"v"}}}', MalformedTensors, "KeyError: 'v'"),
    "a list for a name": ('{"model":{"w":{"$tensor":["v"]}}}', MalformedTensors, "TypeError"),
    "a tensor left out": ('{"model":{"w":1}}', MalformedTensors, r"model\.w is not in it"),
    "not canonical": ('{ "model":{"w":{"$tensor":"model.w"}}}', MalformedTensors, "canonical"),
    "deep": ("[" * 5000, MalformedTensors, "expected a state document"),
    "deep but whole": ("[" * 500 + "]" * 500, MalformedTensors, "expected a state document"),
    "an unknown member": ('{"$import":"os"}', MalformedTensors, "import"),
    "a tensor alone": ('{"$tensor":"model.w"}', InvalidInput, "found a single tensor"),
    "a list": ('[{"$tensor":"model.w"}]', InvalidInput, "found a list"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_refused(tmp_path: Path, case: str) -> None:
    text, error, message = HOSTILE[case]
    save_file(MODEL, tmp_path / "bad.safetensors", metadata={STATE: text})
    for read in (load_payload, read_path):
        with pytest.raises(error, match=message) as caught:
            read(tmp_path / "bad.safetensors")
        assert "bad.safetensors" in str(caught.value)


def test_a_tensor_that_would_be_in_no_component_is_refused(tmp_path: Path) -> None:
    lora = {"lora_r": 4, "lora_alpha": 8, "extra": torch.ones(3)}
    path = write(tmp_path / "run.safetensors", {"model": {"w": torch.ones(2)}, "lora_config": lora})
    with pytest.raises(InvalidInput, match=r"the tensor lora_config\.extra is in no state dict"):
        read_path(path)


def test_tensors_within_bytes_are_refused(tmp_path: Path) -> None:
    inner = io.BytesIO()
    torch.save({"w": torch.ones(2)}, inner)
    path = write(tmp_path / "run.safetensors", {"model": {"w": torch.ones(2)}, "pickles": {"more": inner.getvalue()}})
    with pytest.raises(InvalidInput, match="tensors within bytes"):
        read_path(path)
    assert set(load_payload(path).state_dicts) == {"model", "more"}
