"""Whatever is pushed, in whatever order: the store is whole, says what the catalog says, and gives back every file."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from registry import Registry
from tests.conformance.catalog_state import catalog_state
from tests.conformance.independent_reader import check_store
from tests.vectors.tensor_bytes import Tensor, safetensors_file, stream

# A few tensors, some alike in their bytes, some of no bytes, one of less than a byte an element.
POOL: list[tuple[str, list[int], bytes]] = [
    ("F32", [8, 8], stream("x", 256)),
    ("F32", [8, 8], stream("y", 256)),
    ("I32", [8, 8], stream("x", 256)),
    ("F32", [64], stream("x", 256)),
    ("BF16", [4], stream("z", 8)),
    ("F32", [0, 3], b""),
    ("F32", [3, 0], b""),
    ("F4", [4, 2], stream("4", 4)),
    ("U8", [], b"\x07"),
]
FILES = st.lists(
    st.tuples(st.integers(0, 5), st.sampled_from(POOL)), min_size=1, max_size=6, unique_by=lambda one: one[0]
)
PUSHES = st.tuples(
    FILES, st.booleans(), st.sampled_from(["p/a", "p/b"]), st.booleans(), st.sampled_from(["", "t", "u"])
)


@settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(PUSHES, min_size=1, max_size=5))
def test_any_pushes_leave_a_store_that_proves_itself(pushes: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as temporary, Registry.init(Path(temporary) / "r") as registry:
        pushed: dict[str, bytes] = {}
        for number, (tensors, reverse, name, with_base, tag) in enumerate(pushes):
            named: list[Tensor] = [(f"t{place}", *tensor) for place, tensor in tensors]
            path = Path(temporary) / "model.safetensors"
            path.write_bytes(safetensors_file(named, {"format": "pt"} if number % 2 else None, reverse=reverse))
            found = registry.push(
                path,
                name,
                base=next(iter(pushed), None) if with_base else None,
                tags=[tag] if tag else [],
                metadata={"number": number},
            )
            pushed[found.reference] = path.read_bytes()
        for reference, data in pushed.items():
            pulled = registry.pull(reference, Path(temporary) / f"{reference.replace('/', '-')}.safetensors")
            assert pulled.path.read_bytes() == data
        report = check_store(Path(temporary) / "r")
        assert (report.problems, report.orphans) == ([], [])
        assert report.state == catalog_state(registry)
