"""Digests after a cast to bfloat16, held against torch's own cast."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from registry.core.digest import DIGEST_BYTES, tensor_hasher, unpack_digests
from registry.core.layout import TensorSpec
from registry.core.model_form import ROUNDED as ROLE
from registry.formats.live import flat_bytes, tensor_file
from registry.formats.paths import read_path
from registry.formats.rounding import can_be_rounded, rounded_digest, rounded_digests, to_bfloat16
from registry.formats.source import Source
from registry.operations.forms import add_rounded


def bits_of(words: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.array(words, dtype=np.uint32).view(np.float32))


TIES = [0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0xBF808000, 0xBF818000]
CASES = {
    "ties": bits_of(TIES),
    "denormal": bits_of([1, 0x8000, 0x8001, 0x18000, 0x007FFFFF, 0x807FFFFF, 0x80000001]),
    "zero": bits_of([0, 0x80000000]),
    "inf": bits_of([0x7F800000, 0xFF800000]),
    "too large": bits_of([0x7F7FFFFF, 0xFF7FFFFF, 0x7F7F7FFF, 0x7F7F8000]),
    "normal": torch.randn(100_001, generator=torch.Generator().manual_seed(0)),
    "any bits": bits_of(np.random.default_rng(0).integers(0, 1 << 32, 300_000, dtype=np.uint32).tolist()),
}


@pytest.mark.parametrize("name", CASES)
def test_rounding_is_that_of_torch(name: str) -> None:
    values = CASES[name]
    ours = to_bfloat16(values.numpy())
    theirs = values.to(torch.bfloat16).view(torch.uint16).numpy()
    numbers = ~values.isnan().numpy()
    assert np.array_equal(ours[numbers], theirs[numbers])
    assert np.isnan(torch.from_numpy(ours).view(torch.bfloat16).float().numpy()[~numbers]).all()


@pytest.mark.skipif("AVX" not in torch.backends.cpu.get_cpu_capability(), reason="another processor keeps other bits")
def test_nan_becomes_the_one_that_torch_makes() -> None:
    values = bits_of([0x7FC00000, 0x7F800001, 0xFFC00000, 0xFFFFFFFF] * 20)
    theirs = values.to(torch.bfloat16).view(torch.uint16).numpy()
    assert np.array_equal(to_bfloat16(values.numpy()), theirs)


def test_doubles_are_rounded_twice_as_by_torch() -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hard = torch.tensor([1 + 2**-8 + 2**-40, 1e300, -1e300, 1e-300, float("inf"), 2.0**-140], dtype=torch.float64)
    for one in (values, hard):
        assert np.array_equal(to_bfloat16(one.numpy()), one.to(torch.bfloat16).view(torch.uint16).numpy())


def digest_of(tensor: torch.Tensor) -> str:
    hasher = tensor_hasher({torch.bfloat16: "BF16", torch.float32: "F32"}[tensor.dtype], tensor.shape)
    hasher.update(flat_bytes(tensor).numpy().data)
    return str(hasher.hexdigest())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rounded_digest_is_that_of_the_cast_tensor(dtype: torch.dtype) -> None:
    tensor = torch.randn(300, 501, generator=torch.Generator().manual_seed(0), dtype=dtype)
    data = memoryview(tensor.numpy()).cast("B")
    spec = TensorSpec("w", "F32" if dtype == torch.float32 else "F64", (300, 501))
    expected = digest_of(tensor.to(torch.bfloat16))
    assert rounded_digest(spec, [data]) == expected
    assert rounded_digest(spec, [data[:8], data[8:80_000], data[80_000:]]) == expected


def test_empty_and_scalar_tensors_have_one_too() -> None:
    for tensor in (torch.empty(0, 3), torch.tensor(1.5)):
        spec = TensorSpec("w", "F32", tuple(tensor.shape))
        assert rounded_digest(spec, [flat_bytes(tensor).numpy().data]) == digest_of(tensor.to(torch.bfloat16))


TENSORS = {
    "b": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
    "a": torch.ones(2, dtype=torch.float16),
    "c": torch.ones(2, 2),
    "i": torch.arange(3),
}


def test_the_document_is_in_the_order_of_the_layout() -> None:
    files = [tensor_file("model.safetensors", "model", TENSORS), tensor_file("more", "other", {"x": torch.ones(2)})]
    packed = rounded_digests(files)
    assert len(packed) == DIGEST_BYTES * len(TENSORS)
    names = [spec.name for spec in files[0].layout]
    found = dict(zip(names, unpack_digests(packed), strict=True))
    assert found["b"] == digest_of(TENSORS["b"].to(torch.bfloat16))
    assert found["c"] == digest_of(TENSORS["c"].to(torch.bfloat16))
    assert found["a"] == found["i"] == "0" * 64


def test_shards_follow_each_other() -> None:
    first, second = ({name: TENSORS[name]} for name in ("b", "c"))
    files = [tensor_file("1.safetensors", "model", first), tensor_file("2.safetensors", "model", second)]
    assert unpack_digests(rounded_digests(files)) == tuple(digest_of(TENSORS[n].to(torch.bfloat16)) for n in "bc")


def test_only_a_base_with_wide_floats_is_rounded(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3, 3)}, tmp_path / "wide.safetensors")
    save_file({"w": torch.ones(3, 3, dtype=torch.bfloat16)}, tmp_path / "narrow.safetensors")
    for name, kind, expected in (
        ("wide", "base", True),
        ("wide", "checkpoint", False),
        ("narrow", "base", False),
    ):
        with read_path(tmp_path / f"{name}.safetensors") as source:
            add_rounded(source, kind)
            assert (ROLE in source.described_later) is expected
            if expected:
                data = source.described_later[ROLE]().data
                assert data == bytes.fromhex(digest_of(torch.ones(3, 3, dtype=torch.bfloat16)))


def test_another_component_alone_is_not_rounded() -> None:
    file = tensor_file("unet.safetensors", "unet", TENSORS)
    assert not can_be_rounded([file])
    source = Source("a pipeline", "base", (file,))
    add_rounded(source, "base")
    assert source.described_later == {}


def test_a_file_without_its_bytes_is_not_read() -> None:
    from registry.formats.source import KnownDigests

    file = tensor_file("model.safetensors", "model", TENSORS)
    file.known = KnownDigests("0" * 64, ("0" * 64,) * 4, ())
    assert not can_be_rounded([file])
