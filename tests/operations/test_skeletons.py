"""Files as skeletons with tensors in them: shards that share a component, files of several components, state documents
and external bases, as a source may bring them whatever it was read from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from registry import Registry
from registry.core.errors import MalformedTensors, NotStored
from registry.core.layout import Layout, TensorSpec
from registry.core.state_document import state_document
from registry.formats import paths
from registry.formats.source import PlainFileInMemory, Source, TensorFile, TensorFileOnDisk
from registry.operations.push import push
from registry.operations.push_request import check_request


class Mixed(TensorFile):
    """Bytes of our own with tensors between them: `<`, then for each tensor its bytes and `|`."""

    def __init__(self, path: str, tensors: dict[str, dict[str, torch.Tensor]]) -> None:
        self.path = path
        named = [(role, name, tensor) for role, its in tensors.items() for name, tensor in its.items()]
        self._data = [tensor.contiguous().view(torch.uint8).numpy().tobytes() for _, _, tensor in named]
        self.layout = Layout(
            tuple(TensorSpec(f"{role}/{name}", "F32", tuple(tensor.shape)) for role, name, tensor in named)
        )
        self.entries = {}
        for ordinal, (role, name, _) in enumerate(named):
            self.entries[role] = (*self.entries.get(role, ()), (name, ordinal))
        self.inserts = [(1 + ordinal, ordinal) for ordinal in range(len(named))]
        self._skeleton = b"<" + b"|" * len(named)
        self.skeleton_size = len(self._skeleton)
        self.size = self.skeleton_size + sum(map(len, self._data))
        self.bytes = b"<" + b"".join(data + b"|" for data in self._data)

    def tensor(self, ordinal: int) -> Iterator[memoryview]:
        yield memoryview(self._data[ordinal])

    def skeleton(self, begin: int, end: int) -> Iterator[memoryview]:
        yield memoryview(self._skeleton)[begin:end]


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry.init(tmp_path / "registry") as made:
        yield made


def pushed(registry: Registry, source: Source, name: str) -> str:
    """Pushes a source that no path has."""
    return push(registry._context, source, check_request(name)).reference


def shard_source(folder: Path, shards: dict[str, dict[str, torch.Tensor]], *plain: PlainFileInMemory) -> Source:
    with ExitStack() as stack:
        files = []
        for path, its in shards.items():
            (folder / path).write_bytes(save(its))
            file = stack.enter_context((folder / path).open("rb"))
            files.append(TensorFileOnDisk(path, "model", file, what=path))
        return Source("folder", "base", tuple(files), plain, resources=stack.pop_all())


def tensors(seed: int, *shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"w{place}": torch.randn(shape, generator=generator) for place, shape in enumerate(shapes)}


def test_a_file_of_several_components_comes_back_byte_for_byte(registry: Registry, tmp_path: Path) -> None:
    model = tensors(1, (30, 40), (5,))
    average = {"exp_avg": torch.zeros(30, 40)}
    file = Mixed("run.ckpt", {"model": model, "ema": model, "optimizer": average})
    tree = {"state": {0: {"exp_avg": average["exp_avg"]}}, "param_groups": [{"lr": 0.1}]}
    documents = {
        "optimizer": state_document(tree, tensor_name=lambda _: "exp_avg"),
        "scheduler": state_document({"last_epoch": 3}, tensor_name=lambda _: None),
    }
    source = Source("checkpoint", "checkpoint", (file,), data=documents, metadata={"epoch": 3})
    reference = pushed(registry, source, "walk/run")
    assert registry.pull(reference, tmp_path / "again.ckpt").bytes == file.size
    assert (tmp_path / "again.ckpt").read_bytes() == file.bytes
    for component in ("model", "ema"):
        loaded = registry.load(reference, component=component)
        assert all(torch.equal(loaded[name], tensor) for name, tensor in model.items())
    optimizer = registry.load(reference, component="optimizer")
    assert torch.equal(optimizer["state"][0].pop("exp_avg"), average["exp_avg"])
    assert optimizer == {"state": {0: {}}, "param_groups": [{"lr": 0.1}]}
    assert registry.load(reference, component="scheduler") == {"last_epoch": 3}
    assert registry.get(reference).metadata == {"epoch": 3}
    # The ema's tensors are the model's, so they are stored once.
    assert registry.get(reference).size > 2 * 4 * 1200 + 4 * 1200
    assert stored_bytes(registry) < 2 * 4 * 1205 + 6000


def stored_bytes(registry: Registry) -> int:
    blobs = registry._context.store.blobs
    return sum(blobs.size(digest) for digest in blobs.digests())


def test_shards_are_one_component_and_share_with_a_single_file(registry: Registry, tmp_path: Path) -> None:
    whole = tensors(2, (600, 500), (500, 600), (3,))
    (tmp_path / "model.safetensors").write_bytes(save(whole))
    registry.push(tmp_path / "model.safetensors", "walk/whole")
    shards = {"a.safetensors": ["w0"], "b.safetensors": ["w1", "w2"]}
    contents = {path: {name: whole[name] for name in names} for path, names in shards.items()}
    source = shard_source(tmp_path, contents, PlainFileInMemory("config.json", b"{}"))
    before = stored_bytes(registry)
    reference = pushed(registry, source, "walk/shards")
    assert stored_bytes(registry) - before < 10_000
    registry.pull(reference, tmp_path / "out")
    for path in shards:
        assert (tmp_path / "out" / path).read_bytes() == (tmp_path / path).read_bytes()
    assert (tmp_path / "out" / "config.json").read_bytes() == b"{}"
    loaded = registry.load(reference)
    assert list(loaded) == ["w0", "w1", "w2"]
    assert all(torch.equal(loaded[name], whole[name]) for name in whole)


def test_one_tensor_in_two_shards_is_refused(registry: Registry, tmp_path: Path) -> None:
    source = shard_source(tmp_path, {path: tensors(3, (2, 2)) for path in ("a.safetensors", "b.safetensors")})
    with pytest.raises(MalformedTensors, match=r"the tensor w0 is in b.safetensors and another file of the model"):
        pushed(registry, source, "walk/twice")


def test_an_external_base_is_known_and_not_stored(registry: Registry, tmp_path: Path) -> None:
    path = tmp_path / "models--org--big" / "snapshots" / "abc123" / "model.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(save(tensors(4, (300, 300))))
    first = registry.push(path, "walk/base", external=True)
    assert first.bytes_new < 5_000
    assert stored_bytes(registry) < 5_000
    details = registry.show(first.reference)
    assert details.contents.components["model"].layout.parameters == 90_000
    assert details.events[0].payload["origin"] == {"path": str(path), "hub_id": "org/big", "revision": "abc123"}
    for use in (lambda: registry.pull(first.reference, tmp_path / "x"), lambda: registry.load(first.reference)):
        with pytest.raises(NotStored, match=r"walk/base@1 is recorded without its bytes.*push it again without"):
            use()
    adapter = registry.push({"w0": torch.zeros(2, 2)}, "walk/child", base="walk/base")
    assert registry.get(adapter.reference).base == "walk/base@1"
    assert registry.push(path, "walk/base", external=True).created is False

    # With its bytes it is the same version, and from now on it can be pulled.
    second = registry.push(path, "walk/base")
    assert (second.created, second.version, second.bytes_new) == (False, 1, path.stat().st_size)
    registry.pull("walk/base", tmp_path / "out.safetensors")
    assert sha256((tmp_path / "out.safetensors").read_bytes()).digest() == sha256(path.read_bytes()).digest()
    assert torch.equal(registry.load("walk/base")["w0"], tensors(4, (300, 300))["w0"])
    assert paths.ADAPTER_CONFIG not in {file.path for file in details.contents.files}
