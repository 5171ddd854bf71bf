"""Files that torch writes here and now, in both of its forms, and what it wrote long ago, made by hand."""

from __future__ import annotations

import io
import pickle
import struct
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import pytest
import torch

from registry.core.errors import InvalidInput, MalformedTensors, UnsupportedTensor
from registry.formats.pickles import Opaque, Ordered, TensorRef, is_pickle, read_pickle_bytes, walk
from tests.formats.pickles import assembler as asm
from tests.formats.pickles.compare import CODES, assert_reads_like_torch, assert_same, bytes_of, read

FORMS = {"torch zip": True, "torch legacy": False}
NEWER = [dtype for dtype, code in CODES.items() if code.startswith("F8") or code in ("U16", "U32", "U64")]
form = pytest.mark.parametrize("form", FORMS)


def saved(folder: Path, tree: object, form: str = "torch zip", **more: object) -> Path:
    path = folder / "file.pt"
    torch.save(tree, path, _use_new_zipfile_serialization=FORMS[form], **more)
    assert is_pickle(path.read_bytes()[:512])
    return path


def some(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    count = torch.empty(shape, dtype=dtype).numel() * dtype.itemsize
    raw = torch.arange(count, dtype=torch.int64).mul(37).remainder(2 if dtype is torch.bool else 251).to(torch.uint8)
    return raw.view(dtype).reshape(shape)


@form
@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_every_dtype_of_safetensors(tmp_path: Path, dtype: torch.dtype, form: str) -> None:
    tree = {"a": some(dtype, 3, 8), "b": some(dtype, 8)}
    path = saved(tmp_path, tree, form)
    result = read(path)
    assert result.form == form
    with path.open("rb") as file:
        assert_same(result.tree, tree, file)
    if form == "torch zip" or dtype not in NEWER:  # which torch itself writes in the older form, and cannot read
        assert_reads_like_torch(path)


@form
def test_views_of_every_kind(tmp_path: Path, form: str) -> None:
    base = some(torch.float32, 4, 6, 8)
    tree = {
        "contiguous": base,
        "transposed": base.transpose(0, 2),
        "sliced": base[1:3, ::2, 3:],
        "row": base[2],
        "one column": base[:, :, 5],
        "expanded": base[0, 0, :1].expand(5, 3),
        "windows": base.reshape(-1).unfold(0, 4, 2),
        "channels last": torch.empty(2, 3, 4, 5)
        .copy_(some(torch.float32, 2, 3, 4, 5))
        .to(memory_format=torch.channels_last),
        "0-d": base[1, 2, 3],
        "of size 1": base[:1].transpose(0, 1)[:1],
        "flags": some(torch.bool, 6, 4).t(),
        "small": some(torch.float8_e5m2, 6, 4).t(),
        "bytes": some(torch.uint8, 3, 3).t(),
    }
    path = saved(tmp_path, tree, form)
    result = read(path)
    with path.open("rb") as file:
        assert_same(result.tree, tree, file)
    assert isinstance(result.tree, dict)
    spans = {name: tensor.span() is not None for name, tensor in result.tree.items()}
    assert [name for name, there in spans.items() if there] == ["contiguous", "row", "0-d", "of size 1"]
    views = list(result.tree)[:7]
    assert len({id(result.tree[name].storage) for name in views}) == 1


@form
def test_empty_and_scalar_tensors(tmp_path: Path, form: str) -> None:
    tree = [torch.empty(0), torch.empty(3, 0, 2), torch.tensor(1.5), torch.tensor(True), torch.empty(5)[5:]]
    assert_reads_like_torch(saved(tmp_path, tree, form))


@form
def test_tied_tensors_share_their_storage_and_other_ones_do_not(tmp_path: Path, form: str) -> None:
    weight = torch.nn.Parameter(torch.ones(3, 3))
    tree = read(saved(tmp_path, {"a": weight, "b": weight, "c": torch.ones(3, 3), "d": weight[1]}, form)).tree
    assert isinstance(tree, dict)
    assert tree["a"] is tree["b"]
    assert tree["a"].storage is tree["d"].storage
    assert tree["a"].storage is not tree["c"].storage


@form
def test_parameters_and_storages(tmp_path: Path, form: str) -> None:
    with_state = torch.nn.Parameter(torch.ones(2))
    with_state.note = "kept by torch"
    attributed = torch.ones(2)
    attributed.note = "kept by torch"
    tree = {"plain": torch.nn.Parameter(torch.ones(2, 2)), "frozen": torch.nn.Parameter(torch.ones(2), False)}
    assert_reads_like_torch(saved(tmp_path, tree | {"with state": with_state, "attributed": attributed}, form))
    stored = read(saved(tmp_path, {"storage": torch.ones(3).untyped_storage()}, form)).tree
    assert isinstance(stored, dict)
    assert (stored["storage"].dtype, stored["storage"].shape) == ("U8", (12,))


@form
def test_state_of_model_optimizer_and_scheduler(tmp_path: Path, form: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.LSTM(3, 2))
    optimizer = torch.optim.AdamW(
        [{"params": model[0].parameters(), "weight_decay": 0.1}, {"params": model[1].parameters(), "lr": 1e-4}], lr=1e-3
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    for _ in range(2):
        optimizer.zero_grad()
        model[1](model[0](torch.ones(5, 4))).square().sum().backward()
        optimizer.step()
        scheduler.step()
    tree = {
        "epoch": 3,
        "global_step": 1200,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": model.state_dict(),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'val_loss'}": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [scheduler.state_dict()],
        "hparams_name": "kwargs",
        "hyper_parameters": OrderedDict(lr=1e-3, betas=(0.9, 0.999), size=torch.Size([2, 3]), nan=float("nan")),
        "device": torch.device("cuda:1"),
        "big": 2**70,
        "none": None,
        "bytes": b"\x00\xff",
        "text": "grüße \U0001f600",
        "numbers": {1, 2},
    }
    path = saved(tmp_path, tree, form)
    found = read(path).tree
    assert isinstance(found, dict)
    assert found["device"] == "cuda:1"
    assert found["hyper_parameters"]["size"] == (2, 3)
    assert isinstance(found["state_dict"], Ordered)
    assert found["state_dict"].attributes["_metadata"] == model.state_dict()._metadata
    tree["device"] = "cuda:1"
    with path.open("rb") as file:
        assert_same(found, tree, file)


@form
def test_a_dtype_and_a_layout_are_names(tmp_path: Path, form: str) -> None:
    result = read(saved(tmp_path, {"dtype": torch.bfloat16, "layout": torch.strided}, form))
    assert result.opaque == ()
    assert isinstance(result.tree, dict)
    assert {key: str(name) for key, name in result.tree.items()} == {
        "dtype": "torch.bfloat16",
        "layout": "torch.strided",
    }


@form
def test_a_whole_module_is_inert_data_and_is_reported(tmp_path: Path, form: str) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.GELU())
    result = read(saved(tmp_path, module, form))
    assert isinstance(result.tree, Opaque)
    names = ("torch.nn.modules.activation.GELU", "torch.nn.modules.container.Sequential")
    assert result.opaque == (*names, "torch.nn.modules.linear.Linear")
    inside = dict(walk(result.tree, what="module", into_opaque=True))
    assert sum(isinstance(value, TensorRef) for value in inside.values()) == 2
    assert not any(isinstance(value, TensorRef) for _, value in walk(result.tree, what="module"))


UNSUPPORTED = {
    "complex128": lambda: torch.ones(2, dtype=torch.complex128),
    "complex32": lambda: torch.ones(2, dtype=torch.complex32),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "meta": lambda: torch.empty(3, device="meta"),
    "a conjugate": lambda: torch.ones(2, dtype=torch.complex64).conj(),
    "a negated view": lambda: torch.ones(2, dtype=torch.complex64).conj().imag,
    "two in a byte": lambda: torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
}


@form
@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype:UserWarning")
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_a_tensor_that_safetensors_cannot_hold_is_refused_by_its_kind(tmp_path: Path, kind: str, form: str) -> None:
    path = saved(tmp_path, {"a": UNSUPPORTED[kind]()}, form)
    with pytest.raises(UnsupportedTensor, match="save"):
        read(path)


def test_a_quantised_tensor_is_refused(tmp_path: Path) -> None:
    raw = asm.torch_zip(asm.call(asm.name("torch._utils", "_rebuild_qtensor"), 1, 2, 3))
    with pytest.raises(UnsupportedTensor, match="_rebuild_qtensor"):
        read_pickle_bytes(raw, what="q")
    with pytest.raises(UnsupportedTensor, match="qint8"):
        read_pickle_bytes(asm.torch_zip(asm.storage(cls=asm.name("torch", "QInt8Storage"))), what="q")


def test_tensors_pickled_without_torch_save_lie_in_memory(tmp_path: Path) -> None:
    weight = some(torch.float32, 6, 4)
    tree = {"a": weight, "b": weight.t(), "same": weight, "half": some(torch.bfloat16, 3)}
    path = tmp_path / "plain.pkl"
    for protocol in range(2, 6):
        path.write_bytes(pickle.dumps(tree, protocol=protocol))
        result = read(path)
        assert result.form == "pickle"
        assert isinstance(result.tree, dict)
        assert result.tree["a"].span() is None
        assert result.tree["a"] is result.tree["same"]
        with path.open("rb") as file:
            assert_same(result.tree, tree, file)


def test_bytes_of_a_file_read_as_the_file_does() -> None:
    for new in (True, False):
        buffer = io.BytesIO()
        tensor = some(torch.int32, 5, 2)
        torch.save({"a": tensor.t()}, buffer, _use_new_zipfile_serialization=new)
        result = read_pickle_bytes(buffer.getvalue(), what="bytes")
        assert isinstance(result.tree, dict)
        assert_same(result.tree, {"a": tensor.t()}, io.BytesIO())


def test_a_large_tensor_comes_in_chunks_and_threads_may_share_the_file(tmp_path: Path) -> None:
    large = torch.arange(3 << 20, dtype=torch.int64).to(torch.float32).reshape(3 << 10, 1 << 10)
    tree = {"plain": large, "turned": large.t(), "repeated": large[:1, :7].expand(300_000, 7), "row": large[7:9, ::2]}
    path = saved(tmp_path, tree)
    found = read(path).tree
    assert isinstance(found, dict)
    with path.open("rb") as file:

        def bytes_found(name: str) -> bytes:
            chunks = [bytes(chunk) for chunk in found[name].chunks(file)]
            assert max(map(len, chunks)) <= 4 << 20
            return b"".join(chunks)

        with ThreadPoolExecutor(4) as threads:
            for name, raw in zip(tree, threads.map(bytes_found, tree), strict=True):
                assert raw == bytes_of(tree[name])


# ------------------------------------------------------------------------------------------- long ago


def signed(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}q", *numbers)


def tar_of(tree: object, tensors: bytes | None = None, storages: bytes | None = None, **more: bytes) -> bytes:
    values = numpy.arange(12, dtype="<f4").tobytes()
    if storages is None:
        storages = (
            asm.pickle(1)
            + asm.pickle((100, "cpu", asm.name("torch", "FloatStorage")))
            + signed(12)
            + values
            + asm.pickle([(101, 100, 4, 8)])
        )
    if tensors is None:
        header = asm.pickle((200, 100, asm.name("torch", "FloatTensor")))
        view = asm.pickle((201, 101, asm.name("torch", "FloatTensor")))
        tensors = (
            asm.pickle(2)
            + header
            + struct.pack("<ii", 2, 0)
            + signed(3, 4, 4, 1, 0)
            + view
            + struct.pack("<ii", 2, 0)
            + signed(2, 2, 1, 4, 1)
        )
    parts = {"sys_info": asm.pickle(asm.SYSTEM), "pickle": asm.pickle(tree), "tensors": tensors, "storages": storages}
    return asm.torch_tar(**(parts | more))


def test_the_tar_of_the_first_releases(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    tree = {"whole": asm.persistent("200"), "part": asm.persistent("201"), "again": asm.persistent("200"), "epoch": 7}
    path.write_bytes(tar_of(tree))
    assert is_pickle(path.read_bytes()[:512])
    result = read(path)
    assert result.form == "torch tar"
    assert isinstance(result.tree, dict)
    whole, part = result.tree["whole"], result.tree["part"]
    assert result.tree["again"] is whole
    assert result.tree["epoch"] == 7
    assert whole.span() is not None
    assert part.storage is whole.storage
    values = torch.arange(12, dtype=torch.float32)
    with path.open("rb") as file:
        assert_same(whole, values.reshape(3, 4), file)
        assert_same(part, values[4:].as_strided((2, 2), (1, 4), 5), file)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (tar_of(asm.persistent("300")), "number of a tensor"),
        (tar_of(asm.persistent("9" * 400)), "number of a tensor"),
        (tar_of(1, tensors=asm.pickle(10**9)), "records"),
        (tar_of(1, tensors=asm.pickle(-1)), "number of pickles"),
        (tar_of(1, tensors=asm.pickle(1) + asm.pickle((1, 9, asm.name("torch", "FloatTensor")))), "storage and class"),
        (tar_of(1, storages=asm.pickle(1) + asm.pickle((1, "cpu", 2))), "class of storages"),
        (
            tar_of(
                1, storages=asm.pickle(1) + asm.pickle((1, "cpu", asm.name("torch", "LongStorage"))) + signed(2**60)
            ),
            "at most 0 bytes",
        ),
        (
            tar_of(1, storages=asm.pickle(1) + asm.pickle((1, "cpu", asm.name("torch", "LongStorage"))) + signed(-1)),
            "found -8",
        ),
        (tar_of(1, sys_info=asm.pickle({"little_endian": False})), "little-endian"),
        (asm.torch_tar(readme=b"hello"), "member 'storages'"),
    ],
)
def test_a_damaged_tar_is_refused(raw: bytes, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        read_pickle_bytes(raw, what="old.pt")


def test_parts_of_storages_of_the_older_form() -> None:
    part = asm.old_storage(8, part=("view", 2, 4))
    raw = asm.legacy(
        {"part": asm.tensor(part, 1, (3,), (1,)), "all": asm.tensor(asm.old_storage(8), 0, (8,), (1,))},
        storages=signed(8) + numpy.arange(8, dtype="<f4").tobytes(),
    )
    tree = read_pickle_bytes(raw, what="view").tree
    assert isinstance(tree, dict)
    assert_same(tree, {"part": torch.tensor([3.0, 4.0, 5.0]), "all": torch.arange(8.0)}, io.BytesIO())
    assert tree["part"].storage is tree["all"].storage
    with pytest.raises(MalformedTensors, match="needs 5 elements"):
        read_pickle_bytes(asm.legacy(asm.tensor(part, 1, (4,), (1,))), what="view")
    with pytest.raises(MalformedTensors, match="a part of a storage"):
        read_pickle_bytes(asm.legacy(asm.old_storage(8, part=("view", 6, 4))), what="view")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (asm.legacy(asm.old_storage(), keys=()), "storage '0', found none"),
        (asm.legacy(asm.old_storage(), keys=("0", "0")), "each once"),
        (asm.legacy(asm.old_storage(), keys=("0", "1")), "each once"),
        (asm.legacy(asm.old_storage(), keys=[["0"]]), "each once"),
        (asm.legacy(asm.old_storage(), keys={"0": 1}), "list of storages"),
        (asm.legacy(asm.old_storage(), storages=signed(5) + bytes(20)), "16 bytes of F32"),
        (asm.legacy(asm.old_storage(), storages=signed(4) + bytes(15)), "the end of the file"),
        (asm.legacy(asm.old_storage(), storages=signed(4)[:5]), "truncated"),
        (asm.legacy(asm.old_storage(2**50)), "at most"),
        (asm.legacy(asm.old_storage(-1)), "persistent id"),
        (asm.legacy([asm.old_storage(4), asm.old_storage(3)]), "storage '0'"),
        (asm.legacy(1, system={"little_endian": False}), "little-endian"),
        (asm.legacy(1, system=[]), "little-endian"),
        (asm.pickle(asm.MAGIC) + asm.pickle(1000), "protocol 1001"),
        (asm.pickle(asm.MAGIC), "found 0 before the end"),
    ],
)
def test_a_damaged_older_file_is_refused(raw: bytes, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        read_pickle_bytes(raw, what="old.pt")


def test_an_old_style_class_is_inert_data() -> None:
    raw = pickle.dumps(Point(3), protocol=1)
    assert b"_reconstructor" in raw
    result = read_pickle_bytes(raw, what="point")
    assert isinstance(result.tree, Opaque)
    assert result.tree.state == {"x": 3}
    assert result.opaque == (f"{__name__}.Point",)


class Point:
    def __init__(self, x: int) -> None:
        self.x = x
