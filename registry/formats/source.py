"""What a push reads, whatever the artifact looked like outside: tensor files and plain files."""

from __future__ import annotations

import errno
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, NamedTuple

from registry.core.adapter_config import AdapterConfig
from registry.core.annotations import MetadataValue, MetricValue
from registry.core.errors import InvalidInput, MalformedTensors, RegistryError, SourceNotFound, StorageError
from registry.core.layout import Layout
from registry.core.reference import shown
from registry.core.safetensors_header import Header, build_header, read_header

CHUNK_BYTES = 4 << 20


class KnownDigests(NamedTuple):
    """Digests of a tensor file whose bytes are not here.

    Attributes:
        sha256: of the whole file.
        tensors: of each tensor, in layout order.
        nonfinite: ordinals of tensors that hold NaN or Inf.
    """

    sha256: str
    tensors: tuple[str, ...]
    nonfinite: tuple[int, ...]


@dataclass(frozen=True)
class Said:
    """What was said of an artifact in the registry that it comes from, at one time."""

    metadata: Mapping[str, MetadataValue] = field(default_factory=dict)
    metrics: Mapping[str, MetricValue] = field(default_factory=dict)
    step: int | None = None
    note: str | None = None


class TensorFile(ABC):
    """A file with tensors in it, on disk or about to exist: a skeleton, and tensors that come into it.

    Attributes:
        path: where it stands in the version, relative, with `/`.
        size: bytes of the whole file.
        layout: its tensors, each once, in the order of the file, under names that are unique within it.
        entries: component -> (name there, ordinal in `layout`), in the component's order. One tensor may have several
            names, and one component several files.
        inserts: (byte of the skeleton, ordinal), ascending: where which tensor comes. A tensor that does not stand in
            the file as its plain bytes is in none of them; the skeleton then has what the file has in its place.
        skeleton_size: bytes of the file that are no inserted tensor.
        known: its digests where its bytes are not here; asked for only where a version is recorded without its bytes.
    """

    path: str
    size: int
    layout: Layout
    entries: dict[str, tuple[tuple[str, int], ...]]
    inserts: Sequence[tuple[int, int]]
    skeleton_size: int
    known: KnownDigests | None = None
    rounded: Mapping[int, str] = MappingProxyType({})
    """Digests after a cast to bfloat16 (formats.rounding), by ordinal, as far as they are known without a look."""

    @abstractmethod
    def tensor(self, ordinal: int) -> Iterator[memoryview]:
        """Bytes of one tensor in chunks of whole elements, which stay valid until the next one is asked for."""

    @abstractmethod
    def skeleton(self, begin: int, end: int) -> Iterator[memoryview]:
        """A part of the skeleton's bytes, in chunks of the same kind."""

    @property
    def safetensors_head(self) -> bytes | None:
        """The first 8 + N bytes of a safetensors file, which can lie in the store as it is; None for other files."""
        return None

    @property
    def can_be_external(self) -> bool:
        """Whether it can be recorded without its bytes: a safetensors file in which tensors have the names that they
        have in their component, so that names, dtypes and shapes of its tensors are known without it."""
        named = (one for entries in self.entries.values() for one in entries)
        return self.safetensors_head is not None and all(self.layout.tensors[at].name == name for name, at in named)

    def pieces(self) -> Iterator[tuple[int, int] | int]:
        """The file from its begin to its end: (begin, end) of the skeleton, or the ordinal of a tensor."""
        done = 0
        for at, ordinal in self.inserts:
            if at > done:
                yield done, at
            done = at
            yield ordinal
        if done < self.skeleton_size:
            yield done, self.skeleton_size

    def chunks(self) -> Iterator[memoryview]:
        """The bytes of the whole file."""
        for piece in self.pieces():
            yield from self.tensor(piece) if isinstance(piece, int) else self.skeleton(*piece)

    def rename_component(self, old: str, new: str) -> None:
        self.entries = {new if role == old else role: named for role, named in self.entries.items()}

    def is_unchanged(self) -> bool:
        """Whether nobody seems to have written to it since it was opened."""
        return True


class SafetensorsFile(TensorFile):
    """A safetensors file: its header is the skeleton, and it carries one component or a part of one; a checkpoint of
    several (formats.safetensors_tree) gets its `entries` later.

    Attributes:
        header: parsed.
        head: the first 8 + N bytes.
    """

    def __init__(self, path: str, role: str, header: Header, head: bytes) -> None:
        self.path = path
        self.size = header.file_size
        self.layout = header.layout
        self.header = header
        self.head = head
        self.entries = {role: tuple((spec.name, ordinal) for ordinal, spec in enumerate(header.layout))}
        self.inserts = [(len(head), ordinal) for ordinal in range(len(header.layout))]
        self.skeleton_size = len(head)

    @property
    def role(self) -> str:
        """The component that it is part of."""
        return next(iter(self.entries))

    @property
    def safetensors_head(self) -> bytes | None:
        return self.head

    def skeleton(self, begin: int, end: int) -> Iterator[memoryview]:
        yield memoryview(self.head)[begin:end]


class OpenFile:
    """A regular file that somebody gave, open; only its descriptor is used, so that a rename does no harm."""

    def __init__(self, file: BinaryIO, what: str) -> None:
        """
        Args:
            what: names the file in errors.
        """
        self._file = file
        self.what = what
        self._opened = os.fstat(file.fileno())
        self.size = self._opened.st_size

    def read(self, begin: int, end: int) -> Iterator[memoryview]:
        """The bytes from `begin` to `end`, in chunks that stay valid until the next one is asked for.

        Raises:
            StorageError, InvalidInput: it became shorter.
        """
        buffer = memoryview(bytearray(min(CHUNK_BYTES, end - begin)))
        while begin < end:
            wanted = min(len(buffer), end - begin)
            filled = 0
            while filled < wanted:
                try:
                    read = os.preadv(self._file.fileno(), [buffer[filled:wanted]], begin + filled)
                except OSError as error:
                    raise StorageError(error.errno, f"cannot read {self.what}: {error.strerror}") from error
                if read == 0:
                    raise InvalidInput(f"{self.what} became shorter while it was read; push it when nobody writes it")
                filled += read
            begin += wanted
            yield buffer[:wanted]

    def is_unchanged(self) -> bool:
        now = os.fstat(self._file.fileno())
        return (now.st_size, now.st_mtime_ns) == (self._opened.st_size, self._opened.st_mtime_ns)


class TensorFileOnDisk(SafetensorsFile):
    """A safetensors file that somebody gave."""

    def __init__(self, path: str, role: str, file: BinaryIO, *, what: str) -> None:
        self._open = OpenFile(file, what)
        header, head = read_header(file, file_size=self._open.size, what=what)
        super().__init__(path, role, header, head)

    def tensor(self, ordinal: int) -> Iterator[memoryview]:
        begin, end = self.header.offsets[ordinal]
        yield from self._open.read(self.header.size + begin, self.header.size + end)

    def is_unchanged(self) -> bool:
        return self._open.is_unchanged()


class TensorFileInMemory(SafetensorsFile):
    """Tensors that are written as a safetensors file of our own making.

    A tensor's bytes are made when they are asked for, so that a model on an accelerator is never copied as a whole.
    """

    def __init__(
        self,
        path: str,
        role: str,
        layout: Layout,
        tensors: Sequence[Callable[[], memoryview]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            tensors: for each tensor of the layout what gives its row-major little-endian bytes.
            metadata: for the header, beside its `format`.
        """
        said = {"format": "pt", **(metadata or {})}
        head = build_header(layout, said)
        offsets, position = [], 0
        for spec in layout:
            offsets.append((position, position + spec.nbytes))
            position += spec.nbytes
        super().__init__(path, role, Header(layout, tuple(offsets), said, len(head)), head)
        self._tensors = tensors

    def tensor(self, ordinal: int) -> Iterator[memoryview]:
        view = self._tensors[ordinal]()
        for start in range(0, len(view), CHUNK_BYTES):
            yield view[start : start + CHUNK_BYTES]


class Stored(NamedTuple):
    """A tensor of a file that lies in a blob already."""

    tensor: str
    blob: str
    ordinal: int
    blob_size: int


class MadeFile(SafetensorsFile):
    """A safetensors file of which some tensors lie in blobs, and the others are made when they are asked for: at a
    cost, so a push asks for each once, in their order, and writes it in that same pass.

    Attributes:
        stored: where those lie that are not made, by ordinal.
    """

    def __init__(
        self,
        path: str,
        role: str,
        layout: Layout,
        *,
        stored: Mapping[int, Stored],
        read: Callable[[int], Iterator[memoryview]],
        metadata: Mapping[str, str],
    ) -> None:
        """
        Args:
            read: the bytes of a tensor in chunks of whole elements, made or stored.
        """
        head = build_header(layout, dict(metadata))
        offsets, position = [], 0
        for spec in layout:
            offsets.append((position, position + spec.nbytes))
            position += spec.nbytes
        super().__init__(path, role, Header(layout, tuple(offsets), dict(metadata), len(head)), head)
        self.stored = stored
        self.rounded: dict[int, str] = {}
        self._read = read

    def tensor(self, ordinal: int) -> Iterator[memoryview]:
        return self._read(ordinal)


class PlainFile(ABC):
    """A file that is kept as it is, without a look inside."""

    path: str

    @abstractmethod
    def chunks(self) -> Iterator[bytes | memoryview]:
        """Its bytes, from the begin, each time."""

    def is_unchanged(self) -> bool:
        return True


class PlainFileInMemory(PlainFile):
    """One whose bytes are known."""

    def __init__(self, path: str, data: bytes) -> None:
        self.path = path
        self.data = data

    def chunks(self) -> Iterator[bytes | memoryview]:
        yield self.data


class PlainFileOnDisk(PlainFile):
    """One that is streamed."""

    def __init__(self, path: str, file: BinaryIO, *, what: str) -> None:
        self.path = path
        self._open = OpenFile(file, what)
        self.size = self._open.size

    def chunks(self) -> Iterator[bytes | memoryview]:
        yield from self._open.read(0, self.size)

    def is_unchanged(self) -> bool:
        return self._open.is_unchanged()


class Described(NamedTuple):
    """What was found out for one role of what is kept beside a version.

    Attributes:
        data: the blob's bytes; None: there is none.
        notes: why not, or what the user should know of it.
    """

    data: bytes | None
    notes: tuple[str, ...] = ()


@dataclass
class Source:
    """An artifact, open for reading; close it after the push.

    Attributes:
        form: what it was, for messages: `PEFT folder`, `safetensors file`, `live PeftModel`, ...
        kind: adapter, base or checkpoint, as its tensors say.
        config: adapter configuration, if it has one.
        peft_version: that wrote it; None: unknown.
        data: state documents (core.state_document) by component, for those that hold more than tensors. A component
            without a tensor stands here alone.
        metadata: what the artifact says of itself and users ask for, such as its epoch.
        described: what is kept beside the version, by role (`probe`, `architecture`, `history`): blobs that an event
            names.
        described_later: the same for what takes seconds to find out (`live_names`): asked for by a push whose version
            has none yet.
        origin: where it came from, plain data for the `pushed` event: `path`, `hub_id`, `revision`.
        notes: what the user should know, such as files that were left out.
        digest: of the manifest that must come of it, where the artifact was a version before.
        environment: that it was pushed in, where that was another one than this.
        said: what was said of it before, oldest first; said again of the version that is made of it.
        recipe: how it was computed of other versions; part of the manifest.
        is_unchanged: whether what was listed when it was opened is there still; asked after everything was read.
    """

    form: str
    kind: str
    tensor_files: tuple[TensorFile, ...]
    plain_files: tuple[PlainFile, ...] = ()
    config: AdapterConfig | None = None
    peft_version: str | None = None
    data: Mapping[str, bytes] = field(default_factory=dict)
    metadata: Mapping[str, object] = field(default_factory=dict)
    described: Mapping[str, bytes] = field(default_factory=dict)
    described_later: Mapping[str, Callable[[], Described]] = field(default_factory=dict)
    origin: Mapping[str, str] | None = None
    notes: tuple[str, ...] = ()
    digest: str | None = None
    environment: Mapping[str, object] | None = None
    said: tuple[Said, ...] = ()
    recipe: Mapping[str, object] | None = None
    is_unchanged: Callable[[], bool] = lambda: True
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


def open_tensors(path: Path, name: str, role: str, resources: ExitStack) -> TensorFileOnDisk:
    """Opens a safetensors file.

    Args:
        name: where it stands in the version.
        resources: closes it.

    Raises:
        MalformedTensors: also for a file without a tensor; and what `open_regular` raises.
    """
    file = resources.enter_context(open_regular(path))
    with source_errors(path):
        tensors = TensorFileOnDisk(name, role, file, what=shown(str(path), 200))
    if not tensors.layout.tensors:
        raise MalformedTensors(f"{shown(str(path), 200)} holds no tensors; there is nothing to keep")
    return tensors


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
