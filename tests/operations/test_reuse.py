"""Every tensor is stored once, and a pull gives back the very file: whatever files share with one another, and
whichever way their bytes took."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from registry import Registry
from registry.catalog.blobs import StoredTensor
from registry.core.errors import InvalidInput
from registry.core.layout import DTYPE_BITS, Layout, TensorSpec
from registry.formats.paths import read_path
from registry.operations import writing
from registry.operations.reuse import MIN_SAVING_BYTES, Plan, plan_reuse
from tests.operations.models import lora, train, walker

MIB = 1 << 20


def blob_bytes(root: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in (root / "blobs").rglob("*") if path.is_file()}


def placement(registry: Registry, reference: str) -> dict[str, Any]:
    pushed = next(event for event in registry.show(reference).events if event.kind == "pushed")
    return dict(pushed.payload["placement"])


def roles(registry: Registry, reference: str) -> list[str]:
    return sorted(role for _, role in placement(registry, reference)["blobs"])


# ---------------------------------------------------------------- the plan


def plan(
    sizes: Sequence[int], digests: str, stored: Mapping[str, str], file_size: int, base: Mapping[str, str] | None = None
) -> Plan:
    """A plan for tensors that are one letter each; `stored` says which letters lie in which blob."""
    layout = Layout(tuple(TensorSpec(str(place), "U8", (size,)) for place, size in enumerate(sizes)))
    candidates = [
        {
            letter: StoredTensor(blob, place, 0)
            for blob, letters in blobs.items()
            for place, letter in enumerate(letters)
        }
        for blobs in (base or {}, stored)
    ]
    return plan_reuse(layout, list(digests), candidates, file_size=file_size)


@pytest.mark.parametrize(
    ("size", "file_size", "reused"),
    [
        (MIB, 1000 * MIB, True),
        (MIB - 1, 1000 * MIB, False),
        (100, 10_000, True),
        (99, 10_000, False),
        (0, 10_000, False),
    ],
)
def test_a_blob_has_to_save_a_mebibyte_or_a_hundredth(size: int, file_size: int, reused: bool) -> None:
    assert MIN_SAVING_BYTES == MIB
    made = plan([size, file_size - size], "ab", {"old": "a"}, file_size)
    assert (0 in made.reused) == reused
    assert made.whole == (not reused)
    assert made.new == ((1,) if reused else (0, 1))
    # The same for a tensor that the file holds twice.
    assert (1 in plan([size, size, file_size - 2 * size], "aab", {}, file_size).repeats) == reused


def test_many_strangers_that_save_little_each_are_left_alone() -> None:
    letters = "".join(chr(ord("a") + place) for place in range(26))
    strangers = {f"stranger {letter}": letter for letter in letters}
    assert plan([99] * 26, letters, strangers, 10_000).whole
    # Together in one blob they are worth it.
    made = plan([99] * 26, letters, {"one": letters}, 10_000)
    assert len(made.reused) == 26


def test_the_blob_that_saves_most_comes_first_and_others_count_for_the_rest_alone() -> None:
    made = plan([500, 500, 50, 60], "abcd", {"large": "abc"}, 10_000, base={"small": "cd"})
    # `small` would save 110 of 10,000 bytes, but `large` has c already, and 60 are too few.
    assert {place: one.blob for place, one in made.reused.items()} == {0: "large", 1: "large", 2: "large"}
    assert made.new == (3,)


def test_of_equal_blobs_the_base_is_taken() -> None:
    made = plan([500, 500], "ab", {"found": "ab"}, 1000, base={"base": "ab"})
    assert {one.blob for one in made.reused.values()} == {"base"}


def test_a_tensor_that_stands_twice_counts_once() -> None:
    made = plan([60, 60, 9_880], "aab", {"old": "a"}, 10_000)
    assert made.whole
    made = plan([60, 60, 60, 60, 9_760], "aaacb", {"old": "c"}, 10_000)
    assert made.repeats == {1: 0, 2: 0}


@given(
    st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 400)), min_size=1, max_size=14),
    st.dictionaries(st.sampled_from(["x", "y", "z"]), st.text("abcdefgh", max_size=6), max_size=3),
    st.text("abcdefgh", max_size=6),
)
def test_every_tensor_has_one_place_and_every_blob_is_worth_it(
    tensors: list[tuple[str, int]], stored: dict[str, str], base: str
) -> None:
    size_of = dict(reversed(tensors))
    digests = "".join(letter for letter, _ in tensors)
    sizes = [size_of[letter] for letter in digests]
    file_size = sum(sizes) + 100
    made = plan(sizes, digests, stored, file_size, {"base": base} if base else {})
    assert sorted([*made.reused, *made.repeats, *made.new]) == list(range(len(tensors)))
    assert all(digests[first] == digests[place] and first in made.new for place, first in made.repeats.items())
    where = stored | {"base": base}
    saving: dict[str, set[str]] = {}
    for place, one in made.reused.items():
        assert where[one.blob][one.ordinal] == digests[place]
        saving.setdefault(one.blob, set()).add(digests[place])
    assert all(sum(map(size_of.__getitem__, letters)) * 100 >= file_size for letters in saving.values())
    assert len({digests[place] for place in made.new}) == len(made.new) or not made.reused
    assert made == plan(sizes, digests, stored, file_size, {"base": base} if base else {})


# ---------------------------------------------------------------- byte for byte

DTYPES = ("F32", "BF16", "U8", "F64", "BOOL", "F8_E4M3", "I64", "F4", "F6_E2M3")
SHAPES = ((), (0,), (4,), (3, 8), (2, 0, 5), (64,), (16, 40), (100, 24), (1, 1))


def content(dtype: str, shape: tuple[int, ...], seed: int) -> bytes:
    """Bytes of a tensor; seed 0 gives zeros, which many tensors are."""
    bits = DTYPE_BITS[dtype]
    for size in shape:
        bits *= size
    return bytes(
        (place * seed * 37 + seed) % 2 if dtype == "BOOL" else (place * seed + seed) % 251 for place in range(bits // 8)
    )


def whole_bytes(dtype: str, shape: tuple[int, ...]) -> bool:
    bits = DTYPE_BITS[dtype]
    for size in shape:
        bits *= size
    return bits % 8 == 0


tensors_of_files = st.tuples(st.sampled_from(DTYPES), st.sampled_from(SHAPES), st.integers(0, 3)).filter(
    lambda one: whole_bytes(one[0], one[1])
)


@st.composite
def odd_file(draw: st.DrawFn) -> bytes:
    """A safetensors file as no library writes it and every library reads it: entries in any order, spaces where JSON
    has them, names as escapes, metadata anywhere, padding or none, so that tensors begin at odd addresses."""
    tensors = draw(st.lists(tensors_of_files, min_size=1, max_size=8))
    names = draw(st.permutations([f"l{place % 3}.ü{place}" for place in range(len(tensors))]))
    entries, data = [], b""
    for name, (dtype, shape, seed) in zip(names, tensors, strict=True):
        value = content(dtype, shape, seed)
        fields = draw(
            st.permutations(
                [("dtype", dtype), ("shape", list(shape)), ("data_offsets", [len(data), len(data) + len(value)])]
            )
        )
        entries.append((name, dict(fields)))
        data += value
    metadata = draw(st.none() | st.dictionaries(st.sampled_from(["format", "step", "ü"]), st.text("pt1 ", max_size=4)))
    if metadata is not None:
        entries.append(("__metadata__", metadata))
    entries = draw(st.permutations(entries))
    comma, colon = draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,\n\t", " : ")]))
    text = json.dumps(dict(entries), ensure_ascii=draw(st.booleans()), separators=(comma, colon)).encode()
    text += b" " * draw(st.integers(0, 9))
    return struct.pack("<Q", len(text)) + text + data


def small(*tensors: tuple[str, tuple[int, ...], int], step: int = 0) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"step": str(step)}}
    data = b""
    for place, (dtype, shape, seed) in enumerate(tensors):
        value = content(dtype, shape, seed)
        entries[f"t{place}"] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(value)]}
        data += value
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


W, V, E = ("F32", (100, 24), 1), ("F32", (100, 24), 2), ("U8", (0,), 0)


@settings(max_examples=30)
@given(st.lists(odd_file(), min_size=1, max_size=4))
@example([small(W, V), small(V, W), small(V, V, W, step=1), small(E, W, E, V, E)])
@example([small(W), small(W, step=1), small(W, W), small(W, ("U8", (3, 8), 1), V)])
@example([small(("U8", (3, 8), 2), W), small(E, ("U8", (3, 8), 1), W), small(("BOOL", (4,), 1), V, W)])
def test_a_pull_gives_back_the_very_file(empty_registry: Path, tmp_path_factory: Any, files: list[bytes]) -> None:
    folder = tmp_path_factory.mktemp("law")
    root = Path(shutil.copytree(empty_registry, folder / "registry"))
    with Registry.open(root) as registry:
        for number, data in enumerate(files):
            path = folder / f"{number}.safetensors"
            path.write_bytes(data)
            before = sum(blob_bytes(root).values())
            pushed = registry.push(path, f"law/n{number}", kind="checkpoint")
            assert pushed.bytes_new == sum(blob_bytes(root).values()) - before
            assert pushed.bytes_total == len(data)
            assert registry.push(path, f"law/n{number}", kind="checkpoint").bytes_new == 0
            if "reused" not in roles(registry, f"law/n{number}") and "header" not in roles(registry, f"law/n{number}"):
                assert pushed.digest
                assert blob_bytes(root)[registry.show(f"law/n{number}").contents.files[0].sha256] == len(data)
        for number, data in enumerate(files):
            registry.pull(f"law/n{number}", folder / "out.safetensors", force=True)
            assert (folder / "out.safetensors").read_bytes() == data
            assert_loads_as_the_library_reads(registry, f"law/n{number}", folder / f"{number}.safetensors")
    shutil.rmtree(folder)


def assert_loads_as_the_library_reads(registry: Registry, reference: str, path: Path) -> None:
    layout = registry.show(reference).contents.components["model"].layout
    if any(
        one.dtype.startswith("F6") or (one.dtype == "F4" and (not one.shape or one.shape[-1] % 2)) for one in layout
    ):
        return
    ours = registry.load(reference)
    with safe_open(path, "pt") as file:
        assert set(ours) == set(file.keys())
        for name in ours:
            theirs = file.get_tensor(name)
            assert (ours[name].dtype, ours[name].shape) == (theirs.dtype, theirs.shape)
            flat = [one.reshape(-1).view(torch.uint8) for one in (ours[name], theirs)]
            assert torch.equal(*flat)


def test_a_file_that_repeats_nothing_is_its_own_blob(registry: Registry, root: Path, tmp_path: Path) -> None:
    # Small zero biases stand in it twice, and in another file too: not worth a header beside it.
    zeros = {f"bias{place}": torch.zeros(8) for place in range(4)}
    save_file({**zeros, "other": torch.randn(9000)}, tmp_path / "first.safetensors")
    registry.push(tmp_path / "first.safetensors", "walk/first")
    save_file({**zeros, "w": torch.randn(90, 90)}, tmp_path / "model.safetensors")
    registry.push(tmp_path / "model.safetensors", "walk/base")
    assert roles(registry, "walk/base") == ["layout", "manifest", "tensors"]
    digest = registry.show("walk/base").contents.files[0].sha256
    assert (root / "blobs" / "sha256" / digest[:2] / digest).read_bytes() == (
        tmp_path / "model.safetensors"
    ).read_bytes()


def test_a_version_never_hangs_on_many_strangers(registry: Registry) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {f"w{place:03}": torch.randn(50, generator=generator) for place in range(150)}
    for name in list(state)[:20]:
        registry.push({name: state[name], "own": torch.randn(9000, generator=generator)}, f"strangers/{name}")
    pushed = registry.push(state, "walk/run")
    assert pushed.bytes_new > sum(value.nbytes for value in state.values())
    assert roles(registry, "walk/run") == ["layout", "manifest", "tensors"]
    # From there on they lie together, and are taken from there although the index knew the strangers first.
    more = torch.randn(60, generator=generator)
    registry.push(state | {"more": more}, "walk/run")
    found = placement(registry, "walk/run")
    assert [role for _, role in found["blobs"]] == ["tensors", "reused", "header", "layout", "manifest"]
    layout = registry.show("walk/run").contents.components["model"]
    new = {digest for digest, _ in layout.places} - {
        registry.show("walk/run@1").contents.components["model"].places[0][0]
    }
    assert [place[0] in new for place in layout.places] == [spec.name == "more" for spec in layout.layout]


def test_the_same_folder_has_one_digest_in_every_registry(empty_registry: Path, tmp_path: Path) -> None:
    """What a store held before decides where the bytes lie and not what a version is."""
    model = lora()
    state = model.state_dict()
    save_file({name: state[name].clone() for name in list(state)[:5]}, tmp_path / "part.safetensors")
    digests, placements = [], []
    for number, first in enumerate([None, tmp_path / "part.safetensors"]):
        with Registry.open(shutil.copytree(empty_registry, tmp_path / f"r{number}")) as registry:
            if first is not None:
                registry.push(first, "walk/other")
            digests.append(registry.push(model, "walk/full", kind="checkpoint").digest)
            placements.append(placement(registry, "walk/full"))
    assert digests[0] == digests[1]
    assert placements[0] != placements[1]


# ---------------------------------------------------------------- large files: streamed, or hashed first


def megabytes(*sizes: float, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors of these sizes in MiB; the name says which."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"w{seed}.{place}": torch.randint(0, 256, (int(size * MIB),), generator=generator, dtype=torch.uint8)
        for place, size in enumerate(sizes)
    }


LARGE = megabytes(1, 1.25, 4, 4.5, 5, 6)
SMALLEST_AND_LARGEST = ["w0.0", "w0.1", "w0.4", "w0.5"]
"""Those that the probe looks at."""


def both_ways(
    empty_registry: Path, tmp_path: Path, prepare: Callable[[Registry], object], source: Any, monkeypatch: Any
) -> dict[str, Any]:
    """Pushes to two registries: as it comes, and with every file hashed before a byte is written.

    Returns:
        The placement, which is that of both.
    """
    results = []
    for way in ("as it comes", "hashed first"):
        root = shutil.copytree(empty_registry, tmp_path / way)
        with Registry.open(root) as registry:
            prepare(registry)
            with monkeypatch.context() as patch:
                if way == "hashed first":
                    patch.setattr(writing, "STREAM_MIN_BYTES", 1 << 60)
                before = sum(blob_bytes(root).values())
                pushed = registry.push(source, "walk/large")
                assert pushed.bytes_new == sum(blob_bytes(root).values()) - before
            assert list((root / "tmp").iterdir()) == []
            results.append((pushed.digest, pushed.bytes_new, placement(registry, "walk/large")))
            registry.pull("walk/large", tmp_path / f"{way}.safetensors")
    assert results[0] == results[1]
    files = [(tmp_path / f"{way}.safetensors").read_bytes() for way in ("as it comes", "hashed first")]
    assert files[0] == files[1]
    return results[0][2]


def test_a_new_large_file_is_placed_as_a_small_one_is(empty_registry: Path, tmp_path: Path, monkeypatch: Any) -> None:
    found = both_ways(empty_registry, tmp_path, lambda registry: None, LARGE, monkeypatch)
    assert [role for _, role in found["blobs"]] == ["tensors", "layout", "manifest"]


def test_a_large_file_of_which_much_is_stored(empty_registry: Path, tmp_path: Path, monkeypatch: Any) -> None:
    part = {name: LARGE[name] for name in ("w0.0", "w0.3", "w0.5")}
    found = both_ways(empty_registry, tmp_path, lambda registry: registry.push(part, "walk/part"), LARGE, monkeypatch)
    assert [role for _, role in found["blobs"]] == ["tensors", "reused", "header", "layout", "manifest"]


def test_a_probe_that_wrongly_takes_a_file_for_new(empty_registry: Path, tmp_path: Path, monkeypatch: Any) -> None:
    hidden = {name: tensor for name, tensor in LARGE.items() if name not in SMALLEST_AND_LARGEST}
    assert len(hidden) == 2
    found = both_ways(empty_registry, tmp_path, lambda registry: registry.push(hidden, "walk/part"), LARGE, monkeypatch)
    assert [role for _, role in found["blobs"]] == ["tensors", "reused", "header", "layout", "manifest"]


def test_a_probe_that_wrongly_takes_a_file_for_stored(empty_registry: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def forget(registry: Registry) -> None:
        """The catalog still knows a blob that somebody deleted."""
        registry.push({"w": LARGE["w0.5"]}, "walk/part")
        file = registry.show("walk/part").contents.files[0]
        registry._context.store.blobs.delete(file.blob)

    found = both_ways(empty_registry, tmp_path, forget, LARGE, monkeypatch)
    assert [role for _, role in found["blobs"]] == ["tensors", "layout", "manifest"]


def test_a_large_file_that_repeats_itself(empty_registry: Path, tmp_path: Path, monkeypatch: Any) -> None:
    twice = LARGE | {f"again.{name}": tensor for name, tensor in LARGE.items()}
    found = both_ways(empty_registry, tmp_path, lambda registry: None, twice, monkeypatch)
    assert [role for _, role in found["blobs"]] == ["tensors", "header", "layout", "manifest"]


def test_a_large_file_again_under_another_name_costs_nothing(registry: Registry, tmp_path: Path) -> None:
    save_file(LARGE, tmp_path / "model.safetensors")
    registry.push(tmp_path / "model.safetensors", "walk/large")
    assert registry.push(tmp_path / "model.safetensors", "walk/copy").bytes_new == 0
    assert roles(registry, "walk/copy") == ["layout", "manifest", "tensors"]


# ---------------------------------------------------------------- files that change while they are read


class Restless(Tensor):
    """Another thread trains it: it holds other values whenever it has been read."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.detach:
            with torch._C.DisableTorchFunctionSubclass():
                seen = args[0].detach().clone()
                args[0].detach().add_(1)
            return seen
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("shared", [False, True])
def test_a_model_that_changes_between_two_passes_is_refused(shared: bool, registry: Registry, root: Path) -> None:
    still = torch.randn(1000)
    if shared:
        registry.push({"still": still}, "walk/base")
    before = blob_bytes(root)
    state = {"still": still, "w": torch.zeros(3000).as_subclass(Restless)}
    with pytest.raises(InvalidInput, match="changed while it was pushed; push it when nobody writes it"):
        registry.push(state, "walk/perturb")
    assert blob_bytes(root) == before
    assert list((root / "tmp").iterdir()) == []
    assert registry.find(pattern="walk/perturb") == []


@pytest.mark.parametrize("size", [1, 17])
def test_a_file_that_is_written_while_it_is_read_is_refused(size: int, registry: Registry, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(size * MIB, dtype=torch.uint8)}, path)
    context = registry._context
    with read_path(path) as source, context.store.blobs.batch() as batch:
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\1")
        os.utime(path, ns=(1, 1))
        with pytest.raises(InvalidInput, match=r"model\.safetensors changed while it was pushed"):
            writing.digest_files(context, source, batch, {})


# ---------------------------------------------------------------- twenty checkpoints


class Layers(nn.Module):
    """40 MB, in the proportions of a small language model."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4096, 640)
        self.q = nn.ModuleList(nn.Linear(640, 640) for _ in range(8))
        self.up = nn.ModuleList(nn.Linear(640, 1280) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(1280, 640) for _ in range(2))
        self.norm = nn.ModuleList(nn.LayerNorm(640) for _ in range(15))


def folder_bytes(root: Path) -> int:
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


@pytest.mark.parametrize("base_first", [True, False])
def test_twenty_checkpoints_take_one_base_and_twenty_adapters(base_first: bool, root: Path) -> None:
    """The law for a base a tenth of the size; benchmarks/checkpoint_bytes.py measures it at 400 MB."""
    torch.manual_seed(0)
    base = Layers()
    base_bytes = sum(value.nbytes for value in base.state_dict().values())
    empty = folder_bytes(root)
    adapters = 0
    with Registry.open(root) as registry:
        if base_first:
            registry.push(base, "walk/base")
        model = get_peft_model(base, LoraConfig(r=32, target_modules=r"q\.\d"))
        for step in range(20):
            train(model, seed=step)
            base_name = "walk/base" if base_first else None
            metadata = {"step": step}
            # The law is about weights; a probe of each adds its inputs and outputs.
            registry.push(model, "walk/run", kind="checkpoint", base=base_name, metadata=metadata, probe=False)
            adapters += sum(value.nbytes for name, value in model.state_dict().items() if ".lora_" in name)
        assert registry.get("walk/run").version == 20
        loaded = registry.load("walk/run")
        assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())
    assert 40e6 < base_bytes < 42e6
    total = folder_bytes(root)
    # What is no weight weighs ten times as much here: manifests, headers, and since then the configurations.
    assert total <= 1.011 * (base_bytes + adapters)
    # Of the rest, 0.3 MB is what an empty registry takes. A checkpoint adds about 200 bytes for each of its 72 tensors.
    assert (total - base_bytes - adapters - empty) / 20 < 20_000


# ---------------------------------------------------------------- threads and forks


def use(registry: Registry, worker: int) -> None:
    """What a program does with a registry, with every answer checked."""
    for step in range(3):
        state = {"own": torch.full((50,), float(worker * 10 + step)), "shared": torch.arange(3000.0)}
        pushed = registry.push(state, f"walk/worker{worker}", metadata={"step": step})
        assert pushed.version == step + 1
        assert registry.push(state, "walk/together", metadata={f"by{worker}": step}).created
        assert len(registry.find(f"meta.step = {step}", pattern=f"walk/worker{worker}")) == 1
        loaded = registry.load(f"walk/worker{worker}@{step + 1}")
        assert torch.equal(loaded["own"], state["own"])
        assert torch.equal(loaded["shared"], state["shared"])
        model = nn.Module()
        model.register_buffer("own", torch.zeros(50))
        model.register_buffer("shared", torch.zeros(3000))
        registry.load(f"walk/worker{worker}", model)
        assert torch.equal(model.own, state["own"])


def test_eight_threads_use_one_registry(registry: Registry, root: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda worker: use(registry, worker), range(8)))
    together = registry.find(pattern="walk/together")
    assert sorted(version.version for version in together) == list(range(1, 25))
    assert len({version.digest for version in together}) == 24
    assert list((root / "tmp").iterdir()) == []


def _in_child(registry: Registry, worker: int) -> None:
    use(registry, worker)
    registry.load("walk/base", walker(1))


@pytest.mark.skipif(sys.platform == "darwin", reason="fork is not safe there")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_workers_use_the_registry_that_their_parent_opened(registry: Registry) -> None:
    registry.push(walker(), "walk/base")  # so that the parent has connections and threads of its own
    use(registry, 9)
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=_in_child, args=(registry, worker)) for worker in range(3)]
    for child in children:
        child.start()
    use(registry, 8)
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert sorted(version.version for version in registry.find(pattern="walk/together")) == list(range(1, 16))
    assert registry.load("walk/worker2")["own"][0] == 22.0
