"""Where the bytes of a tensor lie, and those bytes in row-major order. Values of metadata only: bytes are
read when they are asked for."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, BinaryIO

from registry.core.errors import InvalidInput, StorageError
from registry.core.layout import DTYPE_BITS

if TYPE_CHECKING:
    import numpy

CHUNK_BYTES = 4 << 20
_UNSIGNED = {1: "<u1", 2: "<u2", 4: "<u4", 8: "<u8"}


@dataclass(frozen=True, slots=True, eq=False)
class StorageRef:
    """A stretch of bytes that tensors are views of. Tensors that share one have this very object in common.

    Attributes:
        key: its name in the file, unique there unless pickles are nested.
        begin: the first byte in the file; None where the bytes are in memory.
        nbytes: length.
        data: the bytes, where they are in memory.
    """

    key: str
    begin: int | None
    nbytes: int
    data: bytes | None = field(repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class TensorRef:
    """A tensor as a view of a storage; known to lie inside it.

    Attributes:
        dtype: safetensors code, a key of `DTYPE_BITS`, of whole bytes.
        shape: sizes, not negative; () for a single number.
        stride: elements from one index to the next, for each dimension; not negative.
        offset: elements from the storage's first byte.
    """

    storage: StorageRef
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def itemsize(self) -> int:
        return DTYPE_BITS[self.dtype] // 8

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in row-major order, without gaps."""
        return self.elements * self.itemsize

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie one after the other in row-major order; dimensions of size 1 do not matter."""
        expected = 1
        if not self.elements:
            return True
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True

    def span(self) -> tuple[int, int] | None:
        """[begin, end) in the file, where the tensor lies there as it would in a safetensors file; else None."""
        if self.storage.begin is None or not self.is_contiguous:
            return None
        if not self.elements:
            return self.storage.begin, self.storage.begin
        begin = self.storage.begin + self.offset * self.itemsize
        return begin, begin + self.nbytes

    def chunks(self, file: BinaryIO) -> Iterator[memoryview]:
        """The bytes in row-major order, little-endian, in chunks of about 4 MiB of whole elements.

        A contiguous tensor needs one chunk of memory; another one holds its stretch of the storage.

        Args:
            file: the file that it was read from; threads may share it. Not touched where the bytes are in memory.

        Raises:
            InvalidInput: the file became shorter; StorageError: it cannot be read.
        """
        if not self.elements:
            return
        if not self.is_contiguous:
            yield from _blocks(self._strided(file))
            return
        position, stop = self.offset * self.itemsize, self.offset * self.itemsize + self.nbytes
        while position < stop:
            count = min(CHUNK_BYTES, stop - position)
            yield self._bytes(file, position, count)
            position += count

    def _bytes(self, file: BinaryIO, begin: int, count: int) -> memoryview:
        if self.storage.begin is None:
            return memoryview(self.storage.data or b"")[begin : begin + count]
        buffer = memoryview(bytearray(count))
        filled = 0
        while filled < count:
            try:
                read = os.preadv(file.fileno(), [buffer[filled:]], self.storage.begin + begin + filled)
            except OSError as error:
                raise StorageError(error.errno, f"cannot read storage {self.storage.key}: {error.strerror}") from error
            if read == 0:
                raise InvalidInput(
                    f"the file became shorter while storage {self.storage.key} was read; push it when nobody writes it"
                )
            filled += read
        return buffer.toreadonly()

    def _strided(self, file: BinaryIO) -> numpy.ndarray[Any, Any]:
        import numpy

        item = self.itemsize
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        stretch = self._bytes(file, self.offset * item, (last + 1) * item)
        # numpy knows fewer dtypes: elements are moved as unsigned numbers of the same size.
        strides = tuple(stride * item for stride in self.stride)
        return numpy.ndarray(self.shape, _UNSIGNED[item], stretch, 0, strides)


class StorageTensor(TensorRef):
    """A storage by itself, as the flat tensor of all its elements; U8 where it has no dtype."""

    __slots__ = ()


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a tensor without gaps."""
    return tuple(math.prod(shape[index + 1 :]) for index in range(len(shape)))


def _blocks(array: numpy.ndarray[Any, Any]) -> Iterator[memoryview]:
    import numpy

    if array.nbytes <= CHUNK_BYTES or array.ndim == 0:
        yield memoryview(numpy.ascontiguousarray(array).tobytes())
        return
    rows = max(1, CHUNK_BYTES * len(array) // array.nbytes)
    bounds = [*range(0, len(array), rows), len(array)]
    for begin, end in pairwise(bounds):
        if rows == 1:
            yield from _blocks(array[begin])
        else:
            yield memoryview(numpy.ascontiguousarray(array[begin:end]).tobytes())
