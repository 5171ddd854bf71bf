"""What is in memory, as a safetensors file: the safetensors library itself is the truth."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from registry.core.errors import RegistryError, UnsupportedTensor
from registry.core.layout import DTYPE_BITS, TensorSpec
from registry.core.safetensors_header import parse_header
from registry.formats.live import read_live, tensor_file, tensor_spec
from registry.operations.hashing import hash_file

DTYPES = {
    "BOOL": torch.bool,
    "F4": torch.float4_e2m1fn_x2,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
NOT_IN_TORCH = {"F6_E2M3", "F6_E3M2"}


def filled(dtype: torch.dtype, *shape: int) -> Tensor:
    """A contiguous tensor whose bytes all differ from zero as far as its dtype lets them."""
    count = torch.Size(shape).numel() * dtype.itemsize
    if dtype == torch.bool:
        return torch.arange(count).remainder(2).bool().reshape(shape)
    return torch.arange(1, count + 1).remainder(100).to(torch.uint8).view(dtype).reshape(shape)


def file_bytes(tensors: Any) -> bytes:
    return b"".join(bytes(chunk) for chunk in tensor_file("model.safetensors", "model", tensors).chunks())


def one(tensor: Tensor) -> Tensor:
    """The tensor after a way through a file of ours, read by the library."""
    return loaded({"t": tensor})["t"]


def loaded(tensors: Any) -> dict[str, Tensor]:
    with tempfile.NamedTemporaryFile() as file:
        file.write(file_bytes(tensors))
        file.flush()
        return load_file(file.name)


def assert_bits(actual: Tensor, expected: Tensor) -> None:
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    flat = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (actual, expected)]
    assert torch.equal(*flat)


# ---------------------------------------------------------------- what is held


def test_every_dtype_of_safetensors_is_known_here() -> None:
    assert DTYPES.keys() | NOT_IN_TORCH == DTYPE_BITS.keys()


def test_the_file_is_the_one_that_the_library_writes() -> None:
    tensors = {f"{place % 3}.{code}": filled(dtype, 2, 4) for place, (code, dtype) in enumerate(DTYPES.items())}
    tensors |= {"ü": filled(torch.float32, 3), "empty": torch.empty(0, 3), "scalar": torch.tensor(2.0)}
    assert file_bytes(tensors) == save(tensors, metadata={"format": "pt"})


@pytest.mark.parametrize("code", DTYPES)
def test_a_tensor_of_each_dtype_comes_back_bit_for_bit(code: str) -> None:
    dtype = DTYPES[code]
    tensor = filled(dtype, 4, 6)
    expected = (4, 12) if code == "F4" else (4, 6)
    assert tensor_spec("t", tensor) == TensorSpec("t", code, expected)
    assert_bits(one(tensor), tensor)
    assert_bits(one(filled(dtype, 0, 4)), filled(dtype, 0, 4))
    assert_bits(one(filled(dtype, 1)), filled(dtype, 1))


@pytest.mark.parametrize("code", DTYPES)
def test_a_strided_tensor_is_what_its_copy_is(code: str) -> None:
    tensor = filled(DTYPES[code], 6, 4)
    for view in (tensor.t(), tensor[::2], tensor[:, 1:3], tensor[1:].t()[1:]):
        assert not view.is_contiguous()
        assert_bits(one(view), view.contiguous())
    # Its bytes are those of the copy, so its digest is.
    first, second = (hash_file(tensor_file("t", "m", {"t": t})).tensors for t in (tensor.t(), tensor.t().contiguous()))
    assert first == second


@pytest.mark.parametrize("code", sorted(DTYPES.keys() - {"F4"}))
def test_a_scalar_comes_back(code: str) -> None:
    tensor = filled(DTYPES[code], 1).reshape(())
    assert tensor_spec("t", tensor).shape == ()
    assert_bits(one(tensor), tensor)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.arange(6.0).expand(4, 6),
        lambda: torch.zeros(1).expand(5),
        lambda: torch.arange(6.0).as_strided((3, 3), (1, 1)),
        lambda: torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
        lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        lambda: torch.arange(6.0).requires_grad_(),
        lambda: nn.Parameter(torch.arange(6.0)),
        lambda: (torch.arange(6.0, requires_grad=True) * 2)[1:],
        lambda: torch.randn(3, 4, dtype=torch.complex64).conj(),
        lambda: torch.randn(3, 4, dtype=torch.complex64).mH,
        lambda: torch.randn(3, dtype=torch.complex64).conj().imag,
        lambda: torch._neg_view(torch.arange(4.0)),
        lambda: torch.tensor([float("nan"), float("inf"), -0.0]),
    ],
)
def test_a_view_of_any_kind_is_the_values_that_it_shows(make: Callable[[], Tensor]) -> None:
    tensor = make()
    shown = torch.tensor(tensor.tolist(), dtype=tensor.dtype)
    back = one(tensor)
    assert torch.equal(back.nan_to_num(7.0), shown.nan_to_num(7.0))
    assert_bits(back, tensor.detach().resolve_conj().resolve_neg().contiguous())


def test_nothing_is_done_to_the_tensors() -> None:
    tensor = torch.arange(6.0, requires_grad=True)
    view = tensor.reshape(2, 3).t()
    before = (view._version, tensor._version, view.stride(), tensor.requires_grad)
    file_bytes({"t": view, "u": tensor})
    assert before == (view._version, tensor._version, view.stride(), tensor.requires_grad)


def test_shared_tensors_are_written_under_every_name() -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    back = loaded({"a": tensor, "b": tensor, "c": tensor.t(), "d": tensor[1]})
    assert torch.equal(back["a"], tensor)
    assert torch.equal(back["b"], tensor)
    assert torch.equal(back["c"], tensor.t())
    assert torch.equal(back["d"], tensor[1])
    digests = hash_file(tensor_file("t", "m", {"a": tensor, "b": tensor.clone(), "c": tensor.t()})).tensors
    assert digests[0] == digests[1] != digests[2]


def test_a_tensor_that_only_adds_methods_is_a_plain_one() -> None:
    class Named(Tensor):
        def cpu(self, *args: Any, **keywords: Any) -> Any:
            raise AssertionError("a method of the user's class ran")

    tensor = torch.arange(6.0).as_subclass(Named)
    assert_bits(one(tensor), torch.arange(6.0))


def test_our_reader_of_headers_reads_it() -> None:
    file = tensor_file("m", "m", {"b": torch.zeros(3), "a": torch.zeros(0), "c": torch.zeros(2, dtype=torch.int8)})
    header = parse_header(file.head, file_size=file.size, what="ours")
    assert header == file.header
    assert file.size == len(b"".join(bytes(chunk) for chunk in file.chunks()))


# ---------------------------------------------------------------- what is refused


class TwoTensors(Tensor):
    """A wrapper whose own memory is empty, as DTensor's and torchao's is."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> TwoTensors:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("nothing is computed with it")


class TwoTensorsFlat(TwoTensors):
    def __tensor_flatten__(self) -> Any:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, *_: Any) -> Any:
        return TwoTensorsFlat(inner["inner"])


def csr() -> Tensor:
    with pytest.warns(UserWarning, match="beta state"):
        return torch.eye(2).to_sparse_csr()


def fake() -> Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.zeros(2)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.zeros(2, dtype=torch.complex128), "dtype torch.complex128; convert it"),
        (lambda: torch.zeros(2, device="meta"), "a meta tensor without data; load the weights first"),
        (lambda: torch.eye(2).to_sparse(), "a torch.sparse_coo tensor; turn it into a dense tensor"),
        (csr, "a torch.sparse_csr tensor"),
        (lambda: torch.zeros(2).to_mkldnn(), "a torch._mkldnn tensor"),
        (lambda: torch.zeros(2, dtype=torch.uint8).view(torch.bits8), "dtype torch.bits8"),
        (lambda: TwoTensors(torch.zeros(2)), "a TwoTensors; turn it into a plain tensor"),
        (lambda: TwoTensorsFlat(torch.zeros(2)), "a TwoTensorsFlat"),
        (fake, "a FakeTensor"),
        (lambda: nn.LazyLinear(2).weight, "a parameter that has no shape yet; run the model once"),
        (lambda: nn.LazyBatchNorm1d().running_mean, "a parameter that has no shape yet"),
        (
            lambda: torch.zeros(1, dtype=torch.uint8).view(torch.float4_e2m1fn_x2).reshape(()),
            "a scalar of packed 4-bit",
        ),
        (lambda: torch.zeros(2).numpy(), "expected a tensor, found ndarray"),
    ],
)
def test_what_safetensors_cannot_hold_is_refused_by_name(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(UnsupportedTensor, match=rf"model\.layer\.w.*{words}"):
        tensor_file("model.safetensors", "model", {"fine": torch.zeros(1), "model.layer.w": make()})


@pytest.mark.filterwarnings("ignore")  # torch says that its own quantised and nested tensors are going
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8), "quantised tensor.*dequantize"),
        (lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]), "a nested tensor"),
        (lambda: torch.nested.nested_tensor([torch.zeros(2)], layout=torch.jagged), "NestedTensor"),
    ],
)
def test_what_torch_itself_gives_up_is_refused_by_name(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(UnsupportedTensor, match=rf"w.*{words}"):
        tensor_file("model.safetensors", "model", {"w": make()})


def test_a_module_with_such_a_tensor_is_refused_before_anything_is_read() -> None:
    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls += "aten.detach" not in str(function)
            return function(*args, **(kwargs or {}))

    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2))
    with Count() as mode, pytest.raises(RegistryError, match=r"1\.bias|1\.weight"):
        read_live(model)
    assert mode.calls == 0
