"""Reading tensors once: BLAKE3 of each, sha256 of the file and a look for NaN and Inf, side by side in
threads that hold no lock while they work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from blake3 import blake3

from registry.core.digest import tensor_hasher
from registry.core.errors import DigestMismatch
from registry.formats.source import MadeFile, TensorFile

INLINE_BYTES = 1 << 16
"""Chunks below this are hashed where they are: handing them to a thread costs more."""


@dataclass(frozen=True)
class FileDigests:
    """What one pass over a tensor file found.

    Attributes:
        sha256: of the whole file; empty where it was not asked for.
        tensors: digest of each tensor, in layout order.
        nonfinite: ordinals of tensors that hold NaN or Inf.
    """

    sha256: str
    tensors: tuple[str, ...]
    nonfinite: tuple[int, ...]


class FileHasher:
    """Hashes a tensor file while somebody else takes its chunks; `digests` is set when `chunks` is used up.

    Args:
        whole: compute the sha256 of the file too; a caller that hands the chunks to a store gets it there.
    """

    def __init__(self, file: TensorFile, *, whole: bool) -> None:
        self._file = file
        self._whole = sha256() if whole else None
        self._digests: FileDigests | None = None

    @property
    def digests(self) -> FileDigests:
        if self._digests is None:
            raise RuntimeError("the file was not read to its end")
        return self._digests

    def chunks(self) -> Iterator[memoryview]:
        """The bytes of the whole file. While a large chunk is with the caller it is hashed and looked at
        in threads, and both are waited for before the next chunk is read. Tensors that do not stand in the file as
        they are come last, and are not given out."""
        file = self._file
        tensors = [""] * len(file.layout)
        nonfinite: list[int] = []
        with ThreadPoolExecutor(max_workers=2, thread_name_prefix="registry-hash") as pool:
            for piece in file.pieces():
                if not isinstance(piece, int):
                    for chunk in file.skeleton(*piece):
                        if self._whole is not None:
                            self._whole.update(chunk)
                        yield chunk
                    continue
                spec = file.layout.tensors[piece]
                hasher = tensor_hasher(spec.dtype, spec.shape)
                suspicious = nonfinite_test(spec.dtype)
                found = False
                for chunk in file.tensor(piece):
                    if len(chunk) < INLINE_BYTES:
                        self._hash(hasher, chunk)
                        found = found or (suspicious is not None and suspicious(chunk))
                        yield chunk
                        continue
                    hashing = pool.submit(self._hash, hasher, chunk)
                    looking = pool.submit(suspicious, chunk) if suspicious and not found else None
                    try:
                        yield chunk
                    finally:
                        hashing.result()
                        found = found or (looking is not None and looking.result())
                tensors[piece] = hasher.hexdigest()
                if found:
                    nonfinite.append(piece)
        for ordinal in [ordinal for ordinal, digest in enumerate(tensors) if not digest]:
            suspicious = nonfinite_test(file.layout.tensors[ordinal].dtype)
            tensors[ordinal] = hash_tensor(file, ordinal)
            if suspicious is not None and any(map(suspicious, file.tensor(ordinal))):
                nonfinite.append(ordinal)
        whole = self._whole.hexdigest() if self._whole is not None else ""
        self._digests = FileDigests(whole, tuple(tensors), tuple(sorted(nonfinite)))

    def _hash(self, hasher: blake3, chunk: memoryview) -> None:
        hasher.update(chunk)
        if self._whole is not None:
            self._whole.update(chunk)


class MadeHasher:
    """Hashes a file of which some tensors are made, while a store takes these; `digests` is set when `chunks` is used
    up. Of what is stored already the bytes are held against their digests.

    Args:
        head: what comes before the made tensors.
    """

    def __init__(self, file: MadeFile, head: bytes) -> None:
        self._file = file
        self._head = head
        self._digests: FileDigests | None = None

    @property
    def digests(self) -> FileDigests:
        if self._digests is None:
            raise RuntimeError("the file was not read to its end")
        return self._digests

    def chunks(self) -> Iterator[memoryview]:
        """The head, and the made tensors in their order.

        Raises:
            DigestMismatch: a stored tensor is damaged.
        """
        from registry.formats.rounding import ROUNDED_DTYPES, RoundedHasher

        file = self._file
        whole = sha256(file.head)
        tensors: list[str] = []
        nonfinite = []
        yield memoryview(self._head)
        with ThreadPoolExecutor(max_workers=2, thread_name_prefix="registry-hash") as pool:
            for ordinal, spec in enumerate(file.layout):
                hasher = tensor_hasher(spec.dtype, spec.shape)
                stored = file.stored.get(ordinal)
                suspicious = nonfinite_test(spec.dtype)
                rounded = RoundedHasher(spec) if stored is None and spec.dtype in ROUNDED_DTYPES else None
                found = False
                for chunk in file.tensor(ordinal):
                    hashers: list[Any] = [whole, hasher, *([] if rounded is None else [rounded])]
                    working: list[Future[object]] = [pool.submit(one.update, chunk) for one in hashers]
                    try:
                        found = found or (suspicious is not None and suspicious(chunk))
                        if stored is None:
                            yield chunk
                    finally:
                        for one in working:
                            one.result()
                tensors.append(hasher.hexdigest())
                if stored is not None and stored.tensor != tensors[-1]:
                    what = f"tensor {spec.name} in blob {stored.blob}"
                    raise DigestMismatch(what, expected=stored.tensor, actual=tensors[-1])
                if rounded is not None:
                    file.rounded[ordinal] = rounded.hexdigest()
                if found:
                    nonfinite.append(ordinal)
        self._digests = FileDigests(whole.hexdigest(), tuple(tensors), tuple(nonfinite))


def hash_file(file: TensorFile) -> FileDigests:
    """Reads a file once, keeping nothing of it."""
    hasher = FileHasher(file, whole=True)
    for _ in hasher.chunks():
        pass
    return hasher.digests


def hash_tensor(file: TensorFile, ordinal: int) -> str:
    """BLAKE3 of one tensor alone."""
    spec = file.layout.tensors[ordinal]
    hasher = tensor_hasher(spec.dtype, spec.shape)
    for chunk in file.tensor(ordinal):
        hasher.update(chunk)
    return str(hasher.hexdigest())


def nonfinite_test(dtype: str) -> Callable[[memoryview], bool] | None:
    """A test for NaN or Inf in a chunk of whole elements; None for dtypes that have neither.

    A value is not finite where its exponent bits are all ones; the 8-bit floats without Inf have their
    own patterns (OCP 8-bit floating point specification 1.0, and the FNUZ variants' single NaN).
    """
    import numpy

    exponent: dict[str, tuple[str, int]] = {
        "F64": ("<u8", 0x7FF0_0000_0000_0000),
        "F32": ("<u4", 0x7F80_0000),
        "C64": ("<u4", 0x7F80_0000),
        "F16": ("<u2", 0x7C00),
        "BF16": ("<u2", 0x7F80),
        "F8_E5M2": ("u1", 0x7C),
        "F8_E4M3": ("u1", 0x7F),
        "F8_E8M0": ("u1", 0xFF),
    }
    if dtype in ("F8_E4M3FNUZ", "F8_E5M2FNUZ"):
        return lambda chunk: bool((numpy.frombuffer(chunk, "u1") == 0x80).any())
    if dtype not in exponent:
        return None
    word, mask = exponent[dtype]
    bits = numpy.dtype(word).type(mask)
    return lambda chunk: bool(((numpy.frombuffer(chunk, word) & bits) == bits).any())
