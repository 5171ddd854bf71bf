"""torch.save before 1.6, in its two forms: pickles one after the other and then the storages' bytes; and,
before 0.2, the same as members of a tar.

Source: `_legacy_save` and `_legacy_load` in torch/serialization.py."""

from __future__ import annotations

from registry.core.errors import InvalidInput
from registry.core.layout import DTYPE_BITS
from registry.core.reference import shown
from registry.formats.pickles.context import Context, described
from registry.formats.pickles.known import is_size
from registry.formats.pickles.known_torch import storage_dtype, view
from registry.formats.pickles.machine import Machine
from registry.formats.pickles.sources import Source, Stream
from registry.formats.pickles.tar_archive import read_members
from registry.formats.pickles.tensors import StorageRef, StorageTensor, TensorRef
from registry.formats.pickles.values import OpaqueGlobal

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001


def read_legacy(source: Source, stream: Stream, context: Context) -> object:
    """The tree of an older file.

    Args:
        stream: stands behind the pickle of the magic number.

    Raises:
        InvalidInput, MalformedTensors; and what `Machine.run` raises.
    """
    if (version := Machine(stream, context, None).run()) != _PROTOCOL:
        raise context.invalid(f"protocol {_PROTOCOL} of torch.save", described(version))
    _check_system(context, Machine(stream, context, None).run())
    storages = _Storages(source, context)
    tree = Machine(stream, context, storages.find).run()
    keys = Machine(stream, context, None).run()
    if not isinstance(keys, list):
        raise context.invalid("the list of storages", described(keys))
    storages.place(keys, stream.position)
    return tree


def _check_system(context: Context, system: object) -> None:
    if not isinstance(system, dict) or system.get("little_endian", True) is not True:
        raise context.invalid(
            "a file of a little-endian machine", described(system), "load and save it on a little-endian machine"
        )


class _Storages:
    """Storages of an older file: their lengths are known from the pickle, their places only afterwards."""

    def __init__(self, source: Source, context: Context) -> None:
        self._source = source
        self._context = context
        self._found: dict[str, tuple[StorageRef, str]] = {}

    def find(self, name: object) -> object:
        """What a persistent id names.

        Raises:
            InvalidInput, MalformedTensors
        """
        context = self._context
        match name:
            case ("module", OpaqueGlobal() as cls, _, _):
                return cls  # with the source code of its module, which is left out
            case ("storage", cls, key, str(), count, part) if isinstance(key, str | int) and is_size(count):
                assert isinstance(count, int)
            case _:
                raise context.invalid("the persistent id of a storage", described(name))
        dtype = storage_dtype(context, cls)
        nbytes = count * DTYPE_BITS[dtype] // 8
        key = str(key)
        if nbytes > self._source.size:
            raise context.malformed(f"a storage of at most {self._source.size} bytes", str(nbytes))
        if key not in self._found:
            context.budget.spend_records(1)
            context.budget.add_storage(nbytes)
            self._found[key] = StorageRef(key, None, nbytes, None), dtype
        storage, first_dtype = self._found[key]
        if storage.nbytes != nbytes or (first_dtype != dtype and nbytes):
            raise context.malformed(f"{storage.nbytes} bytes of {first_dtype} in storage '{shown(key)}'", f"{nbytes}")
        begin, length = _part(context, part, count)
        return StorageTensor(storage, dtype, (length,), (1,), begin)

    def place(self, keys: list[object], position: int) -> None:
        """Finds out where the storages lie: one after the other, each after its length in 8 bytes.

        Raises:
            InvalidInput, MalformedTensors
        """
        context, missing = self._context, dict(self._found)
        for key in keys:
            entry = missing.pop(key, None) if isinstance(key, str) else None
            if entry is None:
                raise context.malformed("storages that the pickle names, each once", described(key))
            storage, dtype = entry
            position = place(self._source, context, storage, dtype, position)
        if missing:
            raise context.malformed(f"the storage '{shown(next(iter(missing)))}'", "none")


def _part(context: Context, part: object, count: int) -> tuple[int, int]:
    """Begin and length, in elements, of the part of a storage that is meant."""
    match part:
        case None:
            return 0, count
        case (_, begin, length) if is_size(begin) and is_size(length):
            assert isinstance(begin, int)
            assert isinstance(length, int)
            if begin + length <= count:
                return begin, length
    raise context.malformed(f"a part of a storage of {count} elements", described(part))


def place(source: Source, context: Context, storage: StorageRef, dtype: str, position: int) -> int:
    """Gives a storage its place in the file: 8 bytes before its first there is the number of its elements.

    Returns:
        The byte behind the storage.

    Raises:
        InvalidInput: the file ends before; MalformedTensors: it has another length.
    """
    context.at = position
    count = int.from_bytes(source.read(position, 8), "little", signed=True)
    if count * DTYPE_BITS[dtype] // 8 != storage.nbytes:
        raise context.malformed(f"{storage.nbytes} bytes of {dtype} in storage '{shown(storage.key)}'", str(count))
    begin = position + 8
    if begin + storage.nbytes > source.size:
        raise context.malformed(f"{storage.nbytes} bytes in storage '{shown(storage.key)}'", "the end of the file")
    placed = source.storage(storage.key, begin, storage.nbytes)
    # Frozen for everybody else: tensors hold this very object, and nobody has seen them yet.
    object.__setattr__(storage, "begin", placed.begin)
    object.__setattr__(storage, "data", placed.data)
    return begin + storage.nbytes


# ------------------------------------------------------------------------------------------- tar


def read_tar(source: Source, context: Context) -> object:
    """The tree of a tar of torch.save.

    Raises:
        InvalidInput, MalformedTensors; and what `Machine.run` raises.
    """
    members = read_members(source, context.budget)
    for name in ("storages", "tensors", "pickle"):
        if name not in members:
            raise InvalidInput(
                f"{source.what}: expected a tar of torch.save with the member '{name}', found "
                f"{', '.join(shown(found) for found in list(members)[:8]) or 'none'}; unpack it and give its files"
            )
    if "sys_info" in members:
        _check_system(context, Machine(_member(source, context, members["sys_info"]), context, None).run())
    values: dict[int, TensorRef] = {}
    _read_storages(source, context, _member(source, context, members["storages"]), values)
    _read_tensors(source, context, _member(source, context, members["tensors"]), values)

    def find(name: object) -> object:
        match name:
            case (OpaqueGlobal() as cls, *_):
                return cls
            case str() if name.isascii() and name.isdigit() and len(name) <= 20 and int(name) in values:
                return values[int(name)]
            case int() if name in values:
                return values[name]
        raise context.invalid("the number of a tensor or storage", described(name))

    return Machine(_member(source, context, members["pickle"]), context, find).run()


def _member(source: Source, context: Context, span: tuple[int, int]) -> Stream:
    return Stream(source, *span, context.budget)


def _count(context: Context, value: object) -> int:
    if type(value) is not int or not isinstance(value, int) or value < 0:
        raise context.invalid("a number of pickles", described(value))
    context.budget.spend_records(value)
    return value


def _read_storages(source: Source, context: Context, stream: Stream, values: dict[int, TensorRef]) -> None:
    for _ in range(_count(context, Machine(stream, context, None).run())):
        match Machine(stream, context, None).run():
            case (int(key), str(), cls):
                dtype = storage_dtype(context, cls)
            case other:
                raise context.invalid("key, place and class of a storage", described(other))
        at = stream.position
        count = int.from_bytes(stream.read(8), "little", signed=True)
        nbytes = count * DTYPE_BITS[dtype] // 8
        if not 0 <= nbytes <= stream.left:
            raise context.malformed(f"a storage of at most {stream.left} bytes", str(nbytes))
        storage = StorageRef(str(key), None, nbytes, None)
        context.budget.add_storage(nbytes)
        stream.seek(place(source, context, storage, dtype, at))
        values[key] = StorageTensor(storage, dtype, (count,), (1,), 0)
    views = Machine(stream, context, None).run()
    if not isinstance(views, list):
        raise context.invalid("the list of parts of storages", described(views))
    for part in views:
        match part:
            case (int(key), int(root), begin, length) if isinstance(whole := values.get(root), StorageTensor):
                begin, length = _part(context, (key, begin, length), whole.elements)
                values[key] = StorageTensor(whole.storage, whole.dtype, (length,), (1,), whole.offset + begin)
            case other:
                raise context.malformed("a part of a storage", described(other))


def _read_tensors(source: Source, context: Context, stream: Stream, values: dict[int, TensorRef]) -> None:
    for _ in range(_count(context, Machine(stream, context, None).run())):
        match Machine(stream, context, None).run():
            case (int(key), int(storage), OpaqueGlobal()) if storage in values:
                pass
            case other:
                raise context.malformed("key, storage and class of a tensor", described(other))
        dimensions = int.from_bytes(stream.read(4), "little", signed=True)
        stream.read(4)  # written as 8 bytes, of which 4 were read
        if not 0 <= dimensions <= context.budget.limits.dimensions:
            raise context.malformed(f"at most {context.budget.limits.dimensions} dimensions", str(dimensions))
        shape, stride = ([_signed(stream) for _ in range(dimensions)] for _ in range(2))
        values[key] = view(context, values[storage], _signed(stream), shape, stride)


def _signed(stream: Stream) -> int:
    return int.from_bytes(stream.read(8), "little", signed=True)
