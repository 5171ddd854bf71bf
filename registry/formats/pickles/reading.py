"""Opens a file of pickles by its content: a zip of torch.save, its older forms, or a bare pickle. Nothing
of the file is run, and no name in it is imported; see `known_globals` for what is rebuilt."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import partial
from typing import BinaryIO

from registry.core.errors import InvalidInput
from registry.core.reference import shown
from registry.formats.pickles import tar_archive, zip_archive
from registry.formats.pickles.context import Context
from registry.formats.pickles.known_globals import known
from registry.formats.pickles.limits import LIMITS, Budget, Limits
from registry.formats.pickles.machine import Machine
from registry.formats.pickles.sources import FileSource, MemorySource, Source, Stream
from registry.formats.pickles.torch_legacy import LEGACY_MAGIC, read_legacy, read_tar
from registry.formats.pickles.torch_zip import read_zip
from registry.formats.pickles.walk import opaque_names

_OLD_PICKLE = re.compile(
    rb"[\]})]q\x00|\((?:[dlt]p?[0-9]*\n|lp|dp)|c[A-Za-z_][A-Za-z0-9_.]*\r?\n[A-Za-z_][A-Za-z0-9_.]*\r?\n"
)
_OTHERS: dict[bytes, str] = {
    b"version ": "a Git LFS pointer: fetch the file itself with `git lfs pull`",
    b"<": "a web page: download the file itself",
    b"\x1f\x8b": "gzip: unpack it first",
    b"\x28\xb5\x2f\xfd": "zstd: unpack it first",
    b"\x89HDF": "an HDF5 file: save it as safetensors",
    b"\x93NUMPY": "a numpy array: save it as safetensors",
    b"GGUF": "a GGUF file: save it as safetensors",
    b"PK\x05\x06": "an empty zip file: save it again",
}


@dataclass(frozen=True)
class PickleFile:
    """What a file of pickles holds.

    Attributes:
        tree: plain Python values, with `TensorRef`, `Opaque` and `OpaqueGlobal` in them. Look into it with `walk`.
        form: `torch zip`, `torch legacy`, `torch tar` or `pickle`.
        opaque: names of the classes and functions in it that are not known, sorted: inert data, to be reported.
        budget: what is left of the limits, for pickles in it that are read later.
    """

    tree: object
    form: str
    opaque: tuple[str, ...]
    budget: Budget = field(repr=False, compare=False)


def is_pickle(head: bytes) -> bool:
    """Whether a file that begins with these bytes is one for `read_pickle_file`; 512 bytes are enough.

    True for a pickle of protocol 2 to 5, which the older form of torch.save is too, for the common beginnings of
    protocols 0 and 1, for a tar, and for every zip: only its directory, at its end, tells whose it is.
    """
    if head.startswith(zip_archive.MAGIC) or tar_archive.is_tar(head):
        return True
    return (len(head) > 1 and head[0] == 0x80 and 2 <= head[1] <= 5) or _OLD_PICKLE.match(head) is not None


def read_pickle_file(file: BinaryIO, *, size: int, what: str, limits: Limits = LIMITS) -> PickleFile:
    """Reads a file of torch.save or of pickle, by its content.

    Args:
        file: open, with a descriptor; its position is neither used nor moved. Keep it open for the tensors' bytes.
        size: of the file, in bytes.
        what: names the file in errors.

    Raises:
        UnsafePickle: it would call something that is not on the short list.
        InvalidInput: it is of another kind, damaged, or over the limits.
        MalformedTensors: a tensor does not fit its storage.
        UnsupportedTensor: safetensors cannot hold a tensor of it.
        StorageError: it cannot be read.
    """
    what = what if what.isprintable() else shown(what, 200)
    return _read(FileSource(file, size, what), Budget(limits, what))


def read_pickle_bytes(data: bytes, *, what: str, limits: Limits = LIMITS, budget: Budget | None = None) -> PickleFile:
    """Reads bytes that are a file of torch.save or of pickle; its tensors lie in memory.

    Args:
        what: names the bytes in errors.
        budget: of the file that the bytes stand in, so that both together keep its limits; else `limits`.

    Raises:
        UnsafePickle, InvalidInput, MalformedTensors, UnsupportedTensor
    """
    what = what if what.isprintable() else shown(what, 200)
    budget = budget or Budget(limits, what)
    return _read(MemorySource(data, what, budget), budget)


def _read(source: Source, budget: Budget) -> PickleFile:
    tree, form = _tree(source, budget, 0)
    names = opaque_names(tree, what=source.what, limits=budget.limits, is_known=lambda name: known(name) is not None)
    return PickleFile(tree, form, names, budget)


def _tree(source: Source, budget: Budget, nested: int) -> tuple[object, str]:
    head = source.read(0, min(512, source.size))
    _check_kind(source, head)
    context = Context(source.what, budget, nested, partial(_nested, budget))
    if head.startswith(zip_archive.MAGIC):
        return read_zip(source, context), "torch zip"
    if tar_archive.is_tar(head):
        return read_tar(source, context), "torch tar"
    stream = Stream(source, 0, source.size, budget)
    try:
        tree = Machine(stream, context, None).run()
    except InvalidInput as error:
        if type(error) is InvalidInput and not is_pickle(head):
            raise InvalidInput(
                f"{error}; its first bytes are no pickle's and not torch.save's: is it another kind of file?"
            ) from error
        raise
    if type(tree) is int and tree == LEGACY_MAGIC:
        return read_legacy(source, stream, context), "torch legacy"
    if stream.left:
        raise context.invalid("the end of the file after its pickle", f"{stream.left} bytes more")
    return tree, "pickle"


def _nested(budget: Budget, data: bytes, outer: Context) -> object:
    if outer.nested >= budget.limits.nested:
        raise budget.over(budget.limits.nested, "pickles inside pickles")
    return _tree(MemorySource(data, outer.what, budget), budget, outer.nested + 1)[0]


def _check_kind(source: Source, head: bytes) -> None:
    """
    Raises:
        InvalidInput: the file is empty, or of a kind that is known and no pickle.
    """
    if not head:
        raise InvalidInput(f"{source.what}: expected a pickle, found an empty file; copy or download it again")
    if len(head) > 8 and int.from_bytes(head[:8], "little") <= source.size and head[8:9] == b"{":
        raise InvalidInput(
            f"{source.what}: expected a pickle, found what looks like safetensors; rename it to .safetensors"
        )
    for magic, kind in _OTHERS.items():
        if head.startswith(magic):
            raise InvalidInput(f"{source.what}: expected a pickle, found {kind}")
