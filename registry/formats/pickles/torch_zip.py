"""torch.save since 1.6: a zip with one folder, in it the pickle `data.pkl` and each storage as `data/KEY`."""

from __future__ import annotations

from registry.core.errors import InvalidInput
from registry.core.layout import DTYPE_BITS
from registry.core.reference import shown
from registry.formats.pickles.context import Context, described
from registry.formats.pickles.known import is_size
from registry.formats.pickles.known_torch import storage_dtype
from registry.formats.pickles.machine import Machine
from registry.formats.pickles.sources import Source, Stream
from registry.formats.pickles.tensors import StorageRef, StorageTensor
from registry.formats.pickles.zip_archive import Record, read_records


def read_zip(source: Source, context: Context) -> object:
    """The tree of a zip of torch.save.

    Raises:
        InvalidInput: it is none, or damaged; and what `Machine.run` raises.
    """
    records = read_records(source, context.budget)
    folders = {name.partition("/")[0] for name in records}
    folder = folders.pop() if len(folders) == 1 else ""
    if f"{folder}/constants.pkl" in records or any(name.startswith(f"{folder}/code/") for name in records):
        raise InvalidInput(
            f"{source.what}: expected a file of torch.save, found a TorchScript archive, which is a program; "
            f"save the module's state_dict() instead"
        )
    if (pickle := records.get(f"{folder}/data.pkl")) is None:
        raise InvalidInput(
            f"{source.what}: expected a file of torch.save (one folder with data.pkl in it), found a zip file of "
            f"{len(records)} other records; save it with torch.save or as safetensors"
        )
    _check_byte_order(source, records.get(f"{folder}/byteorder"))
    storages = _Storages(source, context, records, f"{folder}/data/")
    stream = Stream(source, pickle.begin, pickle.begin + pickle.size, context.budget)
    tree = Machine(stream, context, storages.find).run()
    if stream.left:
        raise context.invalid("the end of data.pkl after its pickle", f"{stream.left} bytes more")
    return tree


def _check_byte_order(source: Source, record: Record | None) -> None:
    if record is None:
        return
    order = source.read(record.begin, min(record.size, 16))
    if order != b"little":
        raise InvalidInput(
            f"{source.what}: expected little-endian storages, found the byte order "
            f"'{shown(order.decode('latin-1'))}'; load and save it on a little-endian machine"
        )


class _Storages:
    """Finds the storage that a persistent id names; each is one object, however often it is named."""

    def __init__(self, source: Source, context: Context, records: dict[str, Record], prefix: str) -> None:
        self._source = source
        self._context = context
        self._records = records
        self._prefix = prefix
        self._found: dict[str, StorageRef] = {}

    def find(self, name: object) -> StorageTensor:
        """
        Raises:
            InvalidInput: it is no storage; MalformedTensors: it is not there, or of another length.
        """
        context = self._context
        match name:
            case ("storage", cls, str(key), str(), count) if is_size(count):
                assert isinstance(count, int)
            case _:
                raise context.invalid("the persistent id of a storage", described(name))
        dtype = storage_dtype(context, cls)
        nbytes = count * DTYPE_BITS[dtype] // 8
        record = self._records.get(self._prefix + key)
        if record is None:
            raise context.malformed(f"a record of the storage '{shown(key)}'", "none")
        if record.size != nbytes:
            raise context.malformed(f"{nbytes} bytes in the storage '{shown(key)}'", str(record.size))
        if (storage := self._found.get(key)) is None:
            storage = self._found[key] = self._source.storage(key, record.begin, nbytes)
            context.budget.add_storage(nbytes)
        return StorageTensor(storage, dtype, (count,), (1,), 0)
