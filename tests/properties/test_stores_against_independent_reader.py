"""Whatever is pushed, removed and collected, in whatever order: the store is whole, says what the catalog says, and
gives back every file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from registry import Registry
from registry.core.errors import InUse
from registry.core.layout import Layout, TensorSpec
from registry.core.state_document import state_document
from registry.formats.source import PlainFileInMemory, Source, TensorFile, TensorFileOnDisk
from registry.operations.push import push
from registry.operations.push_request import check_request
from tests.conformance.catalog_state import catalog_state
from tests.conformance.independent_reader import check_store
from tests.vectors.tensor_bytes import Tensor, nan, safetensors_file, stream

# A few tensors, some alike in their bytes, some of no bytes, one of less than a byte an element, one not finite.
POOL: list[tuple[str, list[int], bytes]] = [
    ("F32", [8, 8], stream("x", 256)),
    ("F32", [8, 8], stream("y", 256)),
    ("I32", [8, 8], stream("x", 256)),
    ("F32", [64], stream("x", 256)),
    ("F32", [4], nan(bytes(16))),
    ("BF16", [4], stream("z", 8)),
    ("F32", [0, 3], b""),
    ("F32", [3, 0], b""),
    ("F4", [4, 2], stream("4", 4)),
    ("U8", [], b"\x07"),
]
NAMES = st.sampled_from(["p/a", "p/b"])
TENSORS = st.lists(
    st.tuples(st.integers(0, 5), st.sampled_from(POOL)), min_size=1, max_size=6, unique_by=lambda one: one[0]
)
TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3),
    max_leaves=5,
)
WHOLE = st.tuples(st.just("whole"), TENSORS, st.booleans(), st.booleans(), st.sampled_from(["", "t", "u"]))
MIXED = st.tuples(
    st.just("mixed"),
    st.dictionaries(st.sampled_from(["ema", "optimizer", "b"]), TENSORS, max_size=3),
    TENSORS,
    st.dictionaries(st.sampled_from(["optimizer", "scheduler"]), TREES, max_size=2),
)
SHARDS = st.tuples(st.just("shards"), TENSORS, st.integers(1, 3), st.booleans())
GONE = st.tuples(st.just("removed"), st.integers(0, 9)) | st.just(("collected",))


class Mixed(TensorFile):
    """Some bytes, then tensors of several components with bytes between them: one after each, none before those that
    begin a component. A tensor that stands twice has its bytes in the file once."""

    def __init__(self, path: str, parts: Mapping[str, Sequence[Tensor]]) -> None:
        self.path = path
        self.entries = {}
        specs: list[TensorSpec] = []
        self._data: list[bytes] = []
        known: dict[tuple[str, tuple[int, ...], bytes], int] = {}
        for role, tensors in parts.items():
            for name, dtype, shape, data in tensors:
                ordinal = known.setdefault((dtype, tuple(shape), data), len(specs))
                if ordinal == len(specs):
                    specs.append(TensorSpec(f"{role}/{name}", dtype, tuple(shape)))
                    self._data.append(data)
                self.entries[role] = (*self.entries.get(role, ()), (name, ordinal))
        self.layout = Layout(tuple(specs))
        # Every third tensor is not in the file as its plain bytes.
        self.inserts = [(3 + ordinal // 2, ordinal) for ordinal in range(len(specs)) if ordinal % 3 != 2]
        self._skeleton = stream(path, 4 + len(specs))
        self.skeleton_size = len(self._skeleton)
        self.size = self.skeleton_size + sum(len(self._data[ordinal]) for _, ordinal in self.inserts)

    def tensor(self, ordinal: int) -> Iterator[memoryview]:
        yield memoryview(self._data[ordinal])

    def skeleton(self, begin: int, end: int) -> Iterator[memoryview]:
        yield memoryview(self._skeleton)[begin:end]


def named(tensors: Sequence[tuple[int, tuple[str, list[int], bytes]]]) -> list[Tensor]:
    return [(f"t{place}", *tensor) for place, tensor in tensors]


class Registered:
    """A registry, and the bytes of every file that was pushed into it."""

    def __init__(self, registry: Registry, work: Path) -> None:
        self.registry = registry
        self.work = work
        self.files: dict[str, dict[str, bytes]] = {}
        self.external: set[str] = set()

    def push(self, source: Source, name: str, *, external: bool = False, files: Mapping[str, bytes]) -> None:
        reference = push(self.registry._context, source, check_request(name, external=external)).reference
        self.files[reference] = dict(files)
        self.external = self.external | {reference} if external else self.external - {reference}

    def whole(self, name: str, tensors: Any, reverse: bool, with_base: bool, tag: str) -> None:
        path = self.work / "model.safetensors"
        path.write_bytes(
            safetensors_file(named(tensors), {"format": "pt"} if len(self.files) % 2 else None, reverse=reverse)
        )
        base = next(iter(self.files), None) if with_base else None
        found = self.registry.push(path, name, base=base, tags=[tag] if tag else [], metadata={"reverse": reverse})
        self.files[found.reference] = {"": path.read_bytes()}
        self.external.discard(found.reference)

    def mixed(self, name: str, parts: Any, model: Any, trees: Mapping[str, Any]) -> None:
        tensors = {role: named(its) for role, its in {**parts, "model": model}.items()}
        file = Mixed("run.ckpt", tensors)
        data = {role: state_document(tree, tensor_name=lambda _: None) for role, tree in trees.items()}
        described = {"history": b"".join(data.values())} if data else {}
        source = Source("run", "checkpoint", (file,), data=data, described=described)
        self.push(source, name, files={"": b"".join(map(bytes, file.chunks()))})

    def shards(self, name: str, tensors: Any, count: int, external: bool) -> None:
        with ExitStack() as stack:
            files: dict[str, bytes] = {"index.json": b"{}"}
            opened = []
            for place in range(count):
                if not (its := named(tensors)[place::count]):
                    continue
                path = self.work / f"{place}.safetensors"
                path.write_bytes(safetensors_file(its))
                files[path.name] = path.read_bytes()
                handle = stack.enter_context(path.open("rb"))
                opened.append(TensorFileOnDisk(path.name, "model", handle, what=path.name))
            plain = (PlainFileInMemory("index.json", files["index.json"]),)
            source = Source("folder", "base", tuple(opened), plain, resources=stack.pop_all())
            self.push(source, name, external=external, files=files)

    def removed(self, place: int) -> None:
        if place < len(self.files):
            reference = sorted(self.files)[place]
            try:
                self.registry.remove(reference)
            except InUse:  # another came from it
                return
            del self.files[reference]

    def check(self) -> None:
        report = check_store(self.work / "r")
        assert (report.problems, report.state) == ([], catalog_state(self.registry))
        for reference, files in self.files.items():
            if reference not in self.external:
                target = Path(tempfile.mkdtemp(dir=self.work)) / "pulled"
                pulled = self.registry.pull(reference, target).path
                for path, data in files.items():
                    assert (pulled / path if path else pulled).read_bytes() == data


@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(WHOLE | MIXED | SHARDS | GONE, NAMES), min_size=1, max_size=6))
def test_any_pushes_leave_a_store_that_proves_itself(operations: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as temporary, Registry.init(Path(temporary) / "r") as registry:
        made = Registered(registry, Path(temporary))
        for (what, *rest), name in operations:
            if what == "removed":
                made.removed(*rest)
            elif what == "collected":
                registry.gc(grace=timedelta(0))
            else:
                getattr(made, what)(name, *rest)
        made.check()
        registry.gc(grace=timedelta(0))
        made.check()
        assert check_store(Path(temporary) / "r").orphans == []
