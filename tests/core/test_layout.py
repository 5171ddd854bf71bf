from __future__ import annotations

import pytest
import safetensors
from safetensors.torch import save

from registry.core.digest import sha256_hex
from registry.core.errors import InvalidManifest
from registry.core.layout import DTYPE_BITS, Layout, TensorSpec, layout_of

A = TensorSpec("a", "F32", (2, 3))
B = TensorSpec("b", "BF16", ())
C = TensorSpec("c", "F4", (4, 2))


def test_a_layout_counts_elements_and_bytes() -> None:
    layout = layout_of([A, B, C, TensorSpec("none", "F64", (0, 7))])
    assert [spec.elements for spec in layout] == [6, 1, 8, 0]
    assert [spec.nbytes for spec in layout] == [24, 2, 4, 0]
    assert (len(layout), layout.parameters, layout.nbytes) == (4, 15, 30)


def test_a_layout_finds_tensors_by_name() -> None:
    layout = layout_of([B, A])
    assert layout.by_name == {"a": A, "b": B}
    assert layout.position == {"b": 0, "a": 1}


def test_the_document_is_canonical_json_in_the_order_of_the_file() -> None:
    assert layout_of([B, A]).document == b'[["b","BF16",[]],["a","F32",[2,3]]]'
    assert layout_of([B, A]).digest == sha256_hex(layout_of([B, A]).document)


def test_order_name_dtype_and_shape_all_count() -> None:
    layouts = [
        layout_of([A, B]),
        layout_of([B, A]),
        layout_of([A]),
        layout_of([A, TensorSpec("c", "BF16", ())]),
        layout_of([A, TensorSpec("b", "F16", ())]),
        layout_of([A, TensorSpec("b", "BF16", (1,))]),
        layout_of([]),
    ]
    assert len({layout.digest for layout in layouts}) == len(layouts)


def test_a_document_is_read_back() -> None:
    for layout in (layout_of([]), layout_of([A, B, C]), layout_of([TensorSpec('ü 😀 \\ "', "U8", (2**53 - 1, 0))])):
        assert Layout.from_document(layout.document) == layout


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        (b'[["a","F32",[1]],["a","F32",[1]]]', "twice"),
        (b'[["a","F32",[1]],["b","F32",[ 1]]]', "canonical"),
        (b'[["a","F32",[1]]]\n', "canonical"),
        (b'[["\\u0061","F32",[1]]]', "canonical"),
        (b'[["a","F4",[3]]]', "whole number of bytes"),
        (b'[["a","F6_E2M3",[2]]]', "whole number of bytes"),
        (b'[["a","FLOAT",[1]]]', "not a tensor"),
        (b'[["a",["F32"],[1]]]', "unhashable"),
        (b'["abc"]', "not a tensor"),
        (b'[["a","F32",[9007199254740992]]]', "not a shape"),
        (b'[["a","F32",[1e400]]]', "too large"),
        (b'[["a","F32",{"0":1}]]', "not a tensor"),
        (b'[["\\u0000","F32",[1]]]', "control character"),
        (b'[["\\ud800","F32",[1]]]', "surrogate"),
        (b"{}", "canonical"),
        (b"[[[[", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
    ],
)
def test_a_bad_document_is_refused_and_says_why(document: bytes, reason: str) -> None:
    with pytest.raises(InvalidManifest, match=reason) as caught:
        Layout.from_document(document)
    assert len(str(caught.value)) < 400


def test_the_bits_of_every_dtype_are_those_of_safetensors() -> None:
    """A file with a tensor of 8 elements of each dtype is as long as we say, or Rust would refuse it."""
    import json

    for dtype, bits in DTYPE_BITS.items():
        entry = {"x": {"dtype": dtype, "shape": [8], "data_offsets": [0, bits]}}
        head = json.dumps(entry).encode()
        raw = len(head).to_bytes(8, "little") + head + bytes(bits)
        ((name, found),) = safetensors.deserialize(raw)
        assert (name, found["shape"], len(found["data"])) == ("x", [8], TensorSpec("x", dtype, (8,)).nbytes)


def test_a_file_of_torch_has_the_layout_that_its_tensors_have() -> None:
    import io

    import torch

    from registry.core.safetensors_header import read_header

    raw = save({"b": torch.zeros(2, dtype=torch.bfloat16), "a": torch.zeros(3, 1)})
    header, _ = read_header(io.BytesIO(raw), file_size=len(raw), what="x")
    assert header.layout == layout_of([TensorSpec("a", "F32", (3, 1)), TensorSpec("b", "BF16", (2,))])
