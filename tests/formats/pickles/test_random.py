"""Whatever bytes come, the answer is a tree or a refusal of ours; and nothing runs."""

from __future__ import annotations

import io
import pickle
from functools import cache
from pathlib import Path

import numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.core.errors import RegistryError
from registry.formats.pickles import Limits, TensorRef, read_pickle_bytes, walk
from tests.formats.pickles import assembler as asm
from tests.formats.pickles.test_torch_files import tar_of

LEGACY = Path(__file__).parents[1] / "legacy"
SMALL = Limits(pickle_bytes=1 << 22, opcodes=200_000, items=200_000, depth=100)
CODES = b"(.012FIJKLMNPQRSTUVXabcde}dghijl]opqrstu)GBC" + bytes(range(0x80, 0x99))


@cache
def valid() -> list[bytes]:
    """Files of every form, small."""
    files = []
    tree = {"a": torch.ones(2, 3).t(), "b": [torch.nn.Parameter(torch.zeros(2)), (1, 2.5, "x", b"y", None, {3})]}
    for new in (True, False):
        buffer = io.BytesIO()
        torch.save(tree, buffer, _use_new_zipfile_serialization=new)
        files.append(buffer.getvalue())
    for protocol in range(6):
        files.append(pickle.dumps({"n": numpy.ones(2), "s": {1, 2}, "f": 0.5, "t": ("ä", b"\xff")}, protocol))
    files.append(tar_of([asm.persistent("200"), asm.persistent("201")]))
    files.append((LEGACY / "forward.pth").read_bytes())
    files.append((LEGACY / "workspace.ckpt").read_bytes())  # of which the first 20 kB hold OmegaConf's objects
    return files


def check(raw: bytes) -> None:
    try:
        tree = read_pickle_bytes(raw, what="random", limits=SMALL).tree
        for _, value in walk(tree, what="random", limits=SMALL, into_opaque=True):
            if isinstance(value, TensorRef) and value.nbytes < 1 << 20:
                assert sum(map(len, value.chunks(io.BytesIO()))) == value.nbytes
    except RegistryError as error:
        message = str(error)
    else:
        return
    assert message.isprintable()  # one line, and nothing that a terminal obeys


@given(st.binary(max_size=300))
@settings(max_examples=500)
def test_random_bytes(raw: bytes) -> None:
    check(raw)


@given(st.lists(st.one_of(st.sampled_from(CODES).map(lambda code: bytes([code])), st.binary(max_size=4)), max_size=60))
@settings(max_examples=500)
def test_random_instructions(parts: list[bytes]) -> None:
    check(b"\x80\x04" + b"".join(parts) + b".")


ARGUMENTS = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.floats(),
        st.text(max_size=5).filter(str.isprintable),
        st.binary(max_size=12),
        st.sampled_from(
            [
                asm.storage(4),
                asm.name("torch", "float32"),
                asm.name("torch", "Tensor"),
                asm.name("numpy", "ndarray"),
                asm.name("builtins", "object"),
                asm.name("mypkg", "Model"),
                asm.build(asm.call(asm.name("numpy", "dtype"), "f4"), (3, "<", None, None, None, -1, -1, 0)),
                asm.tensor(asm.storage(4), 0, (2, 2), (1, 2)),
            ]
        ),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=5).map(tuple),
        st.dictionaries(st.text(max_size=2).filter(str.isprintable), inner, max_size=3),
    ),
    max_leaves=8,
)


@given(st.data())
@settings(max_examples=500)
def test_every_known_name_with_any_arguments(data: st.DataObject) -> None:
    from registry.formats.pickles.known_globals import _KNOWN

    function = asm.name(*data.draw(st.sampled_from(sorted(_KNOWN))))
    arguments = data.draw(st.lists(ARGUMENTS, max_size=7))
    how = data.draw(st.sampled_from([asm.call, asm.new, asm.obj]))
    code = how(function, *arguments)
    if data.draw(st.booleans()):
        code = asm.build(code, data.draw(ARGUMENTS))
    check(asm.torch_zip([code, {"again": code}]))


@given(st.data())
@settings(max_examples=500)
def test_damaged_files(data: st.DataObject) -> None:
    raw = bytearray(data.draw(st.sampled_from(valid())))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(len(raw), 25_000) - 1) | st.integers(0, len(raw) - 1))
        match data.draw(st.integers(0, 3)):
            case 0:
                raw[at] = data.draw(st.integers(0, 255))
            case 1:
                del raw[at : at + data.draw(st.integers(1, 20))]
            case 2:
                raw[at:at] = data.draw(st.binary(min_size=1, max_size=8))
            case 3:
                raw[at : at + 8] = data.draw(st.sampled_from([b"\xff" * 8, bytes(8), b"\xff" * 7 + b"\x7f"]))
        if not raw:
            break
    check(bytes(raw))


def test_the_files_are_valid_before_they_are_damaged() -> None:
    for raw in valid():
        read_pickle_bytes(raw, what="valid", limits=SMALL)
