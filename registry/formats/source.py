"""What a push reads, whatever the artifact looked like outside: tensor files and plain files."""

from __future__ import annotations

import errno
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from registry.core.adapter_config import AdapterConfig
from registry.core.errors import InvalidInput, RegistryError, SourceNotFound, StorageError
from registry.core.layout import Layout
from registry.core.reference import shown
from registry.core.safetensors_header import Header, build_header, read_header

CHUNK_BYTES = 4 << 20


class TensorFile(ABC):
    """One safetensors file, on disk or about to exist.

    Attributes:
        path: where it stands in the version, relative, with `/`.
        role: component that it carries.
        head: the first 8 + N bytes.
        header: the same, parsed.
    """

    def __init__(self, path: str, role: str, header: Header, head: bytes) -> None:
        self.path = path
        self.role = role
        self.header = header
        self.head = head

    @property
    def size(self) -> int:
        return self.header.file_size

    @property
    def layout(self) -> Layout:
        return self.header.layout

    @abstractmethod
    def tensor(self, ordinal: int) -> Iterator[memoryview]:
        """Bytes of one tensor in chunks of whole elements, which stay valid until the next one is asked for."""

    def chunks(self) -> Iterator[memoryview]:
        """The bytes of the whole file."""
        yield memoryview(self.head)
        for ordinal in range(len(self.layout)):
            yield from self.tensor(ordinal)

    def is_unchanged(self) -> bool:
        """Whether nobody seems to have written to it since it was opened."""
        return True


class TensorFileOnDisk(TensorFile):
    """A file that somebody gave; only its open descriptor is used, so that a rename does no harm."""

    def __init__(self, path: str, role: str, file: BinaryIO, *, what: str) -> None:
        self._opened = os.fstat(file.fileno())
        header, head = read_header(file, file_size=self._opened.st_size, what=what)
        super().__init__(path, role, header, head)
        self._file = file
        self._what = what

    def tensor(self, ordinal: int) -> Iterator[memoryview]:
        begin, end = self.header.offsets[ordinal]
        position, stop = self.header.size + begin, self.header.size + end
        buffer = memoryview(bytearray(min(CHUNK_BYTES, stop - position)))
        while position < stop:
            wanted = min(len(buffer), stop - position)
            filled = 0
            while filled < wanted:
                try:
                    read = os.preadv(self._file.fileno(), [buffer[filled:wanted]], position + filled)
                except OSError as error:
                    raise StorageError(error.errno, f"cannot read {self._what}: {error.strerror}") from error
                if read == 0:
                    raise InvalidInput(f"{self._what} became shorter while it was read; push it when nobody writes it")
                filled += read
            position += wanted
            yield buffer[:wanted]

    def is_unchanged(self) -> bool:
        now = os.fstat(self._file.fileno())
        return (now.st_size, now.st_mtime_ns) == (self._opened.st_size, self._opened.st_mtime_ns)


class TensorFileInMemory(TensorFile):
    """Tensors that are written as a safetensors file of our own making.

    A tensor's bytes are made when they are asked for, so that a model on an accelerator is never copied as a whole.
    """

    def __init__(self, path: str, role: str, layout: Layout, tensors: Sequence[Callable[[], memoryview]]) -> None:
        """
        Args:
            tensors: for each tensor of the layout what gives its row-major little-endian bytes.
        """
        head = build_header(layout, {"format": "pt"})
        offsets, position = [], 0
        for spec in layout:
            offsets.append((position, position + spec.nbytes))
            position += spec.nbytes
        super().__init__(path, role, Header(layout, tuple(offsets), {"format": "pt"}, len(head)), head)
        self._tensors = tensors

    def tensor(self, ordinal: int) -> Iterator[memoryview]:
        view = self._tensors[ordinal]()
        for start in range(0, len(view), CHUNK_BYTES):
            yield view[start : start + CHUNK_BYTES]


@dataclass(frozen=True)
class PlainFile:
    """A file that is kept as it is, without a look inside."""

    path: str
    data: bytes


@dataclass
class Source:
    """An artifact, open for reading; close it after the push.

    Attributes:
        form: what it was, for messages: `PEFT folder`, `safetensors file`, `live PeftModel`, ...
        kind: adapter, base or checkpoint, as its tensors say.
        config: adapter configuration, if it has one.
        peft_version: that wrote it; None: unknown.
        notes: what the user should know, such as files that were left out.
    """

    form: str
    kind: str
    tensor_files: tuple[TensorFile, ...]
    plain_files: tuple[PlainFile, ...] = ()
    config: AdapterConfig | None = None
    peft_version: str | None = None
    notes: tuple[str, ...] = ()
    resources: ExitStack = field(default_factory=ExitStack)

    def close(self) -> None:
        self.resources.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@contextmanager
def source_errors(path: Path) -> Iterator[None]:
    """Turns what the system says about a source that was given into errors of our tree.

    Raises:
        SourceNotFound, InvalidInput (no path at all, a loop of links), StorageError
    """
    try:
        yield
    except RegistryError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SourceNotFound(f"no such file or folder: {shown(str(path), 200)}") from error
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            raise InvalidInput(f"{shown(str(path), 200)}: {error.strerror}") from error
        raise StorageError(error.errno, f"cannot read {shown(str(path), 200)}: {error.strerror}") from error


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file to read; a link is followed (a hub cache is made of them).

    Raises:
        SourceNotFound, InvalidInput (a folder, a device), StorageError
    """
    with source_errors(path):
        if not stat.S_ISREG(os.stat(path).st_mode):
            kind = "a folder" if path.is_dir() else "not a regular file"
            raise InvalidInput(f"{shown(str(path), 200)} is {kind}; expected a file")
        return path.open("rb")


def read_small(path: Path, limit: int = 16 << 20) -> bytes:
    """All bytes of a small file.

    Raises:
        InvalidInput: larger than `limit`; and what `open_regular` raises.
    """
    with open_regular(path) as file, source_errors(path):
        data = file.read(limit + 1)
    if len(data) > limit:
        raise InvalidInput(f"{shown(str(path), 200)} has over {limit} bytes; expected a small file")
    return data
