"""What a few bytes ask for is counted before it is given: time, memory, depth, repetition."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from registry.core.errors import InvalidInput, MalformedTensors
from registry.formats.pickles import LIMITS, Limits, TensorRef, read_pickle_bytes, walk
from tests.formats.pickles import assembler as asm

FLOATS = asm.name("torch", "FloatStorage")
ARRAY = asm.name("numpy.core.multiarray", "_reconstruct")


@pytest.fixture(autouse=True)
def quickly() -> Iterator[None]:
    """No case takes long, whatever the machine: each would take hours or all memory without its limit."""
    begin = time.monotonic()
    yield
    assert time.monotonic() - begin < 20


def view(count: int, offset: object, shape: object, stride: object) -> bytes:
    return asm.torch_zip(asm.tensor(asm.storage(count), offset, shape, stride), {"0": bytes(4 * count)})


def array(shape: object, data: object, *, kind: object = "f4", state: object = None, cls: object = None) -> asm.Code:
    dtype = asm.call(asm.name("numpy", "dtype"), kind, False, True)
    if state is None:
        state = (3, "<", None, None, None, -1, -1, 0)
    built = asm.build(dtype, state)
    made = asm.call(ARRAY, cls or asm.name("numpy", "ndarray"), (0,), b"b")
    return asm.build(made, (1, shape, built, False, data))


BOMBS: dict[str, tuple[bytes, str]] = {
    "BINBYTES8 of 2**60": (b"\x80\x04\x8e" + (2**60).to_bytes(8, "little") + b".", "bytes"),
    "BINBYTES8 of 2**64 - 1": (b"\x80\x04\x8e" + b"\xff" * 8 + b".", "bytes"),
    "BYTEARRAY8 of 2**60": (b"\x80\x05\x96" + (2**60).to_bytes(8, "little") + b".", "bytes"),
    "BINUNICODE8 of 2**60": (b"\x80\x04\x8d" + (2**60).to_bytes(8, "little") + b".", "bytes in one text"),
    "BINUNICODE of 4 GB": (b"\x80\x02X\xff\xff\xff\xff.", "bytes in one text"),
    "BINBYTES that is cut": (b"\x80\x03B\x10\x00\x00\x00abc.", "expected 16 bytes more at byte 7, found 4"),
    "a frame of 2**62": (b"\x80\x04\x95" + (2**62).to_bytes(8, "little") + b"N.", "a frame of"),
    "LONG4 of 2 GB": (b"\x80\x02\x8b\xff\xff\xff\x7f.", "bytes in one integer"),
    "LONG4 of negative length": (b"\x80\x02\x8b\xff\xff\xff\xff.", "bytes in one integer"),
    "LONG of a million digits": (b"L" + b"9" * 1_000_000 + b"L\n.", "a line of at most"),
    "INT of 4000 digits": (b"I" + b"9" * 4000 + b"\n.", "a decimal integer"),
    "PUT of a million digits": (b"Np" + b"9" * 1_000_000 + b"\n.", "a line of at most"),
    "an endless line": (b"c" + b"o" * 5_000_000, "a line of at most"),
    "a name of 1000 characters": (b"c" + b"o" * 1000 + b"\nx\n.", "a line of at most"),
    "a mark without end": (b"(" * 3_000_000 + b".", "values waiting"),
    "values without end": (b"N" * 3_000_000 + b".", "values waiting"),
    "lists within lists": (b"\x80\x02" + b"](" * 5000 + b"e" * 5000 + b".", "levels"),
    "tuples within tuples": (b"\x80\x02)" + b"\x85" * 100_000 + b".", "levels"),
    "dicts within dicts": (b"\x80\x02" + b"}K\x01" * 5000 + b"N" + b"s" * 5000 + b".", "levels"),
    "states within states": (
        b"\x80\x02" + b"cmypkg\nA\n)\x81" * 5000 + b"N" + b"b" * 5000 + b".",
        "levels",
    ),
    "a deep tuple as a key": (b"\x80\x02})" + b"\x85" * 100_000 + b"Ns.", "a key"),
    "a doubled tuple as a key": (b"\x80\x02})" + b"2\x86" * 200 + b"Ns.", "a key"),
    "a list as a key": (b"\x80\x02}]Ns.", "a key"),
    "a dict in a set": (b"\x80\x04\x8f(}\x90.", "a key"),
    "a dict in a frozenset": (b"\x80\x04(}\x91.", "a key"),
    "tensors and tuples as keys without end": (
        b"\x80\x02}(" + b"".join(asm.value((n,)) + b"N" for n in range(10_001)) + b"u.",
        "keys that are neither",
    ),
    "integers of one hash as keys": (
        b"\x80\x02}(" + b"".join(asm.value(n * (2**61 - 1)) + b"N" for n in range(1, 10_002)) + b"u.",
        "keys that are neither",
    ),
    "a list copied again and again": (
        b"\x80\x02" + asm.value([7] * 10_000) + b"q\x000cbuiltins\nlist\nq\x010(" + b"h\x01h\x00\x85R" * 2001 + b"l.",
        "elements",
    ),
    "a text encoded again and again": (
        b"\x80\x02" + asm.value("a" * 1_000_000) + b"X\x06\x00\x00\x00latin1\x86q\x000c_codecs\nencode\nq\x01("
        + b"h\x01h\x00R" * 600 + b"l.",
        "bytes",
    ),
    "a file in a storage's bytes again and again": (
        b"\x80\x02ctorch.storage\n_load_from_bytes\nq\x000("
        + asm.value(asm.pickle(b"x" * 1_000_000)) + b"\x85q\x01" + b"0(h\x00h\x01R" * 1100 + b"l.",
        "bytes",
    ),
    "a range made a list": (
        asm.pickle(asm.call(asm.name("builtins", "list"), asm.call(asm.name("builtins", "range"), 0, 2**50, 1))),
        "one container for list",
    ),
    "a bytearray of a number": (asm.pickle(asm.call(asm.name("builtins", "bytearray"), 2**40)), "expected bytes"),
    "bytes of a number": (asm.pickle(asm.call(asm.name("builtins", "bytes"), 2**40)), "expected bytes"),
    "an int of many digits": (asm.pickle(asm.call(asm.name("builtins", "int"), "9" * 5000)), "a number for int"),
    "an array of 2**60": (asm.pickle(array((2**50, 2**10), b"")), "bytes for an array"),
    "an array of a huge dtype": (asm.pickle(array((1,), b"", kind="S9999999")), "numpy dtype"),
}  # fmt: skip


@pytest.mark.parametrize("case", BOMBS)
def test_a_bomb_is_refused_before_it_goes_off(case: str) -> None:
    raw, message = BOMBS[case]
    with pytest.raises(InvalidInput) as refused:
        read_pickle_bytes(raw, what="bomb.pkl")
    assert type(refused.value) in (InvalidInput, MalformedTensors) or "dtype" in message
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith("bomb.pkl")


def test_pickles_within_pickles_end_somewhere() -> None:
    raw = asm.pickle(1)
    for _ in range(LIMITS.nested):
        raw = asm.pickle(asm.call(asm.name("torch.storage", "_load_from_bytes"), raw))
    assert read_pickle_bytes(raw, what="nested").tree == 1
    with pytest.raises(InvalidInput, match="pickles inside pickles"):
        read_pickle_bytes(asm.pickle(asm.call(asm.name("torch.storage", "_load_from_bytes"), raw)), what="nested")


@pytest.mark.parametrize(
    ("limits", "raw", "message"),
    [
        (Limits(opcodes=10), b"\x80\x02" + b"N0" * 6 + b"N.", "10 instructions"),
        (Limits(memo=3), b"\x80\x04N\x94\x94\x94\x94.", "3 memo entries"),
        (Limits(memo=3), b"\x80\x02Nq\x00q\x01r\x00\x00\x00\x10p9\n.", "3 memo entries"),
        (Limits(pickle_bytes=10), asm.pickle(b"a" * 11), "10 bytes"),
        (Limits(stack=5), asm.pickle((1, 2, 3, 4, 5, 6)), "5 values waiting"),
        (Limits(depth=3), asm.pickle([[[[1]]]]), "3 levels"),
        (Limits(text_bytes=3), asm.pickle("four"), "3 bytes in one text"),
        (Limits(integer_bytes=4), asm.pickle(2**40), "4 bytes in one integer"),
        (Limits(items=4), asm.pickle(asm.call(asm.name("builtins", "set"), [1, 2, 3, 4, 5])), "4 elements"),
        (Limits(records=3), asm.torch_zip(1), "3 records"),
        (Limits(dimensions=2), view(4, 0, (1, 2, 2), (4, 2, 1)), "at most 2 dimensions"),
    ],
)
def test_every_limit_is_kept(limits: Limits, raw: bytes, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        read_pickle_bytes(raw, what="limited", limits=limits)


def test_memo_entries_are_sparse() -> None:
    assert read_pickle_bytes(b"\x80\x02Nr\xff\xff\xff\xff0j\xff\xff\xff\xff.", what="sparse").tree is None


# ------------------------------------------------------------------------------------------- trees without end


def laughs(levels: int = 60) -> bytes:
    """A list of the same list twice, and so on: 2**60 elements in 400 bytes."""
    raw = b"\x80\x02]q\x00"
    for level in range(1, levels):
        raw += b"0]" + b"h" + bytes([level - 1]) + b"ah" + bytes([level - 1]) + b"aq" + bytes([level])
    return raw + b"."


def test_a_tree_that_shares_without_end_reads_and_is_counted_where_it_is_walked() -> None:
    tree = read_pickle_bytes(laughs(), what="laughs").tree
    with pytest.raises(InvalidInput, match="at most 100000 values with shared ones counted each time"):
        for _ in walk(tree, what="laughs", limits=Limits(items=100_000)):
            pass


def test_tuples_that_share_without_end_read() -> None:
    assert isinstance(read_pickle_bytes(b"\x80\x02)" + b"2\x86" * 400 + b".", what="laughs").tree, tuple)


CIRCLES = {
    "a list in itself": b"\x80\x02]q\x00h\x00a.",
    "a dict in itself": b"\x80\x02}q\x00K\x01h\x00s.",
    "a tuple in a list in itself": b"\x80\x02]q\x00h\x00\x85a.",
    "two lists in each other": b"\x80\x02]q\x00]q\x01h\x00aa.",
}


@pytest.mark.parametrize("case", CIRCLES)
def test_a_circle_reads_and_is_refused_where_it_is_walked(case: str) -> None:
    tree = read_pickle_bytes(CIRCLES[case], what="circle").tree
    with pytest.raises(InvalidInput, match="contains itself"):
        list(walk(tree, what="circle"))


def test_unknown_data_may_lead_back_to_itself_as_objects_do() -> None:
    raw = b"\x80\x02cmypkg\nNode\n)\x81q\x00}X\x06\x00\x00\x00parenth\x00sb."
    result = read_pickle_bytes(raw, what="node")
    assert list(walk(result.tree, what="node")) == [((), result.tree)]
    with pytest.raises(InvalidInput, match="contains itself"):
        list(walk(result.tree, what="node", into_opaque=True))


def test_a_walk_names_the_way_to_every_value() -> None:
    tree = read_pickle_bytes(asm.pickle({"a": [1, (2,)], "b": {}}), what="tree").tree
    assert [(path, value) for path, value in walk(tree, what="tree") if not isinstance(value, dict | list | tuple)] == [
        (("a", 0), 1),
        (("a", 1, 0), 2),
    ]
    with pytest.raises(InvalidInput, match="levels"):
        list(walk([[[]]], what="tree", limits=Limits(depth=2)))


# ------------------------------------------------------------------------------------------- tensors outside of it

OUTSIDE = {
    "too long": (0, (5,), (1,)),
    "an offset too far": (1, (4,), (1,)),
    "an offset far outside": (2**53 - 1, (1,), (1,)),
    "strides too far": (0, (2, 2), (3, 1)),
    "a huge stride": (0, (2,), (2**53 - 1,)),
    "a negative offset": (-1, (1,), (1,)),
    "a negative size": (0, (-1,), (1,)),
    "two negative sizes": (0, (-2, -2), (1, 1)),
    "a negative stride": (3, (4,), (-1,)),
    "a size of 2**62": (0, (2**62, 0), (1, 1)),
    "a size over 64 bits": (0, (2**70,), (1,)),
    "a size that is a text": (0, ("4",), (1,)),
    "a size that is a float": (0, (4.0,), (1,)),
    "a size that is True": (0, (True,), (1,)),
    "an offset that is None": (None, (4,), (1,)),
    "more sizes than strides": (0, (2, 2), (1,)),
    "a shape that is a number": (0, 4, 1),
    "65 dimensions": (0, (1,) * 65, (1,) * 65),
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_a_tensor_outside_its_storage_is_malformed(case: str) -> None:
    with pytest.raises(MalformedTensors, match=r"tensor|dimensions"):
        read_pickle_bytes(view(4, *OUTSIDE[case]), what="outside.pt")


STORAGES = {
    "longer than its record": asm.torch_zip(asm.storage(5)),
    "shorter than its record": asm.torch_zip(asm.storage(3)),
    "of another type": asm.torch_zip(asm.storage(4, cls=asm.name("torch", "DoubleStorage"))),
    "that is not there": asm.torch_zip(asm.storage(4, "1")),
    "with a path for a key": asm.torch_zip(asm.storage(4, "../data.pkl")),
    "in place of which there is a text": asm.torch_zip(asm.tensor("storage", 0, (4,), (1,))),
    "in place of which there is a tensor": asm.torch_zip(
        asm.tensor(asm.tensor(asm.storage(), 0, (4,), (1,)), 0, (4,), (1,))
    ),
    "with the wrong number of arguments": asm.torch_zip(asm.call(asm.name("torch._utils", "_rebuild_tensor_v2"), 1)),
    "of no tensor": asm.torch_zip(asm.call(asm.name("torch._utils", "_rebuild_parameter"), 1, True, None)),
}


@pytest.mark.parametrize("case", STORAGES)
def test_a_storage_that_does_not_fit_is_malformed(case: str) -> None:
    with pytest.raises(MalformedTensors):
        read_pickle_bytes(STORAGES[case], what="storage.pt")


def test_repeating_one_element_without_end_is_refused_and_a_little_of_it_is_not() -> None:
    tree = read_pickle_bytes(view(1, 0, (1000, 1000), (0, 0)), what="expanded").tree
    assert isinstance(tree, TensorRef)
    with pytest.raises(MalformedTensors, match="views repeat them"):
        read_pickle_bytes(view(1, 0, (2**20, 2**20), (0, 0)), what="expanded")
    many = [asm.tensor(asm.storage(1), 0, (1000, 1000), (0, 0))] * 70
    with pytest.raises(MalformedTensors, match="views repeat them"):
        read_pickle_bytes(asm.torch_zip(many, {"0": bytes(4)}), what="expanded")


def test_an_empty_tensor_may_have_any_strides(tmp_path: Path) -> None:
    tree = read_pickle_bytes(view(0, 5, (0, 2**40), (2**50, 1)), what="empty").tree
    assert isinstance(tree, TensorRef)
    with (tmp_path / "none").open("w+b") as file:
        assert list(tree.chunks(file)) == []
