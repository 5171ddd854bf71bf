"""The probe as a document: what is written comes back, and nothing else is taken."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from registry.core.errors import InvalidInput, RegistryError
from registry.core.layout import Layout, TensorSpec
from registry.core.safetensors_header import build_header
from registry.formats.probe import MAX_BLOB_BYTES, MAX_TENSOR_BYTES, Probe, read_probe
from registry.formats.probe_tree import LeftOut


def probe(**changes: Any) -> Probe:
    obs = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    fields = {
        "args": ({"obs": obs, "goal": None}, 3, 2.0),
        "kwargs": {"mask": torch.tensor([True, False]), "mode": "fast", "a.b/c": [1, (2, torch.tensor(5))]},
        "outputs": {"action": obs + 1, "extras": (math.nan, LeftOut("DynamicCache"), None, True)},
        "subject": "model",
        "adapter": False,
        "seed": None,
        "dtype": "float32",
        "coarsest": "float32",
        "device": "cpu",
        "torch_version": "2.6.0",
    }
    return Probe(**(fields | changes))


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert sorted(one) == sorted(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, tuple | list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    else:
        assert repr(one) == repr(other)


def test_a_probe_comes_back_as_it_was() -> None:
    written = probe()
    read = read_probe(written.to_bytes(), "blob")
    assert_same(read.args, written.args)
    assert_same(read.kwargs, written.kwargs)
    assert_same(read.outputs, written.outputs)
    for name in ("subject", "adapter", "seed", "dtype", "coarsest", "device", "torch_version", "made"):
        assert getattr(read, name) == getattr(written, name)
    assert read.to_bytes() == written.to_bytes()


SCALARS = st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.floats() | st.text("aé$.", max_size=5)
TENSORS = st.sampled_from((torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64)).flatmap(
    lambda dtype: st.integers(0, 3).map(lambda size: torch.ones(size, 2).to(dtype))
)
TREES = st.recursive(
    SCALARS | TENSORS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text("a$.é", max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(arguments=st.lists(TREES, max_size=3), outputs=TREES)
def test_every_tree_comes_back_as_it_was(arguments: list[Any], outputs: Any) -> None:
    written = probe(args=tuple(arguments), kwargs={}, outputs=[torch.zeros(1), outputs])
    read = read_probe(written.to_bytes(), "blob")
    assert_same(read.args, written.args)
    assert_same(read.outputs, written.outputs)


def test_it_is_one_safetensors_file_of_inputs_and_outputs(tmp_path: Path) -> None:
    (tmp_path / "probe").write_bytes(probe().to_bytes())
    with safe_open(tmp_path / "probe", framework="pt") as file:
        assert sorted(file.keys()) == ["inputs#2", "inputs.0.obs", "inputs.mask", "outputs.action"]
        assert torch.equal(file.get_tensor("outputs.action"), torch.arange(6.0).reshape(2, 3) + 1)
        assert json.loads(file.metadata()["probe"])["inputs"] == "given"


def test_equal_probes_have_equal_bytes() -> None:
    assert probe().to_bytes() == probe().to_bytes()


def test_members_keep_their_order_because_a_model_may_go_through_them() -> None:
    written = probe(args=({"b": torch.zeros(1), "a": torch.ones(1)},))
    assert list(read_probe(written.to_bytes(), "blob").args[0]) == ["b", "a"]


def test_arguments_may_be_nested_as_deep_as_a_probe_takes_them() -> None:
    from registry.formats.probe_tree import MAX_DEPTH, plain_inputs

    tree: Any = torch.zeros(1)
    for _ in range(MAX_DEPTH + 1):
        tree = {"a": tree}
    written = probe(kwargs=plain_inputs(tree, "probe"))
    assert_same(read_probe(written.to_bytes(), "blob").kwargs, tree)
    with pytest.raises(InvalidInput, match="levels"):
        plain_inputs([tree], "probe")


def test_a_probe_of_too_many_bytes_is_not_written() -> None:
    with pytest.raises(InvalidInput, match=str(MAX_TENSOR_BYTES)):
        probe(outputs=torch.zeros(MAX_TENSOR_BYTES // 4 + 1)).to_bytes()


# ---------------------------------------------------------------- what is refused


def blob(document: object, tensors: dict[str, tuple[str, tuple[int, ...], bytes]] | None = None) -> bytes:
    """A safetensors file with any text under `probe`."""
    specs = [TensorSpec(name, dtype, shape) for name, (dtype, shape, _) in (tensors or {}).items()]
    text = document if isinstance(document, str) else json.dumps(document, sort_keys=True, separators=(",", ":"))
    return build_header(Layout(tuple(specs)), {"probe": text}) + b"".join(data for *_, data in (tensors or {}).values())


def plain(**changes: Any) -> dict[str, Any]:
    """The document of the smallest probe."""
    document = {
        "format": 1,
        "subject": "model",
        "args": [],
        "kwargs": {"$dict": []},
        "outputs": {"$tensor": "outputs"},
        "inputs": "given",
        "seed": None,
        "training": False,
        "adapter": False,
        "dtype": "float32",
        "coarsest": "float32",
        "device": "cpu",
        "torch": "2.6.0",
    }
    return {key: value for key, value in (document | changes).items() if value is not ...}


OUTPUT = {"outputs": ("F32", (1,), b"\0\0\0\0")}


def test_the_smallest_probe_is_read() -> None:
    assert read_probe(blob(plain(), OUTPUT), "blob").outputs.tolist() == [0.0]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"format": 2}, "upgrade the program"),
        ({"format": ...}, "format"),
        ({"extra": 1}, "members"),
        ({"torch": ...}, "members"),
        ({"subject": "os"}, "subject"),
        ({"training": True}, "training"),
        ({"training": 0}, "training"),
        ({"adapter": "default"}, "adapter"),
        ({"inputs": "made"}, "seed"),
        ({"seed": 3}, "seed"),
        ({"inputs": "made", "seed": True}, "seed"),
        ({"inputs": None}, "inputs"),
        ({"dtype": "__class__.__base__"}, "dtype"),
        ({"device": "cuda:0"}, "device"),
        ({"torch": "2\n3"}, "torch"),
        ({"args": {}}, "inputs"),
        ({"kwargs": []}, "kwargs"),
        ({"kwargs": {"$tuple": []}}, "kwargs"),
        ({"kwargs": {"$dict": {}}}, "dict"),
        ({"kwargs": {"$dict": [["a"]]}}, "pairs"),
        ({"kwargs": {"$dict": [["a", 1], ["a", 2]]}}, "pairs"),
        ({"kwargs": {"$dict": [[1, 2]]}}, "pairs"),
        ({"kwargs": {"$dict": [["a\nb", 1]]}}, "pairs"),
        ({"kwargs": {}}, "dict"),
        ({"args": [{"$tensor": "other"}]}, "other"),
        ({"args": [{"$tensor": "outputs"}]}, "outputs"),
        ({"args": [{"$tensor": 1}]}, "tensor"),
        ({"args": [{"$import": "os"}]}, "import"),
        ({"args": [{"$float": "0x10"}]}, "float"),
        ({"args": [{"$float": "1" * 400}]}, "float"),
        ({"args": [{"$tuple": {}}]}, "tuple"),
        ({"args": [{"$left_out": 1}]}, "left_out"),
        ({"outputs": {"$sample": ["outputs", 1]}}, "elements of a larger tensor"),
        ({"outputs": {"$sample": ["outputs", 2**40]}}, "elements of a larger tensor"),
        ({"outputs": {"$sample": []}}, "sample"),
        ({"args": [{"$tuple": [], "$dict": []}]}, "found"),
        ({"args": [1.5]}, "1.5"),
        ({"args": ["\x1b[31m"]}, "inputs.0"),
        ({"args": ["x" * 5000]}, "inputs.0"),
        ({"args": [2**60]}, "canonical"),
        ({"args": [0] * 1001}, "values"),
        ({"outputs": None}, "tensors"),
    ],
    ids=str,
)
def test_a_document_that_breaks_a_rule_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidInput, match=named) as refused:
        read_probe(blob(plain(**changes), OUTPUT), "the probe of walk/perturb@1")
    assert "\n" not in str(refused.value)
    assert "\x1b" not in str(refused.value)


def test_outputs_without_a_tensor_prove_nothing_and_are_refused() -> None:
    with pytest.raises(InvalidInput, match="outputs"):
        read_probe(blob(plain(outputs=[1, {"$left_out": "Cache"}])), "blob")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04cos\nsystem\n(S'true'\ntR.",
        blob("["),
        blob("[1,2]"),
        blob(""),
        blob("[" * 100_000),
        blob('{"a":' * 100_000),
        blob(json.dumps(plain()), OUTPUT),
        blob('{"format":1,"format":1}'),
        build_header(Layout(()), {"other": "{}"}),
        build_header(Layout(()), None),
        blob(plain(), {"outputs": ("F4", (2,), b"\0")}),
        blob(plain(), {"outputs": ("F8_E8M0", (1,), b"\0")}),
        blob(plain(), {"outputs": ("BOOL", (1,), b"\2")}),
        blob(plain(), OUTPUT | {"more": ("F32", (1,), b"\0\0\0\0")}),
        blob(plain(), OUTPUT)[:-1],
        blob(plain(), OUTPUT) + b"\0",
    ],
    ids=lambda data: repr(data[:30]),
)
def test_bytes_that_are_no_probe_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidInput):
        read_probe(data, "blob")


def test_a_blob_over_the_limit_is_refused_before_it_is_read() -> None:
    with pytest.raises(InvalidInput, match=str(MAX_BLOB_BYTES)):
        read_probe(bytes(MAX_BLOB_BYTES + 1), "blob")


@pytest.mark.parametrize("damage", [lambda r: r.randrange(256), lambda r: ord(r.choice('"{}[]$,:0')), lambda _: 0])
def test_a_damaged_blob_is_read_or_refused_and_nothing_else(damage: Callable[[random.Random], int]) -> None:
    whole = probe().to_bytes()
    generator = random.Random(0)
    for _ in range(1500):
        data = bytearray(whole)
        for _ in range(generator.randrange(1, 4)):
            data[generator.randrange(len(data))] = damage(generator)
        with suppress(RegistryError):
            assert read_probe(bytes(data), "blob").to_bytes()


def test_names_of_types_in_it_stay_text() -> None:
    read = read_probe(blob(plain(outputs=[{"$tensor": "outputs"}, {"$left_out": "os.system"}]), OUTPUT), "blob")
    assert read.outputs[1] == LeftOut("os.system")
