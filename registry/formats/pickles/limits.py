"""How much a pickle may cost. A few hundred bytes can ask for any time and any memory, so all that a
file makes the reader do is counted, over the file and every pickle inside it."""

from __future__ import annotations

from dataclasses import dataclass

from registry.core.errors import InvalidInput, MalformedTensors


@dataclass(frozen=True, slots=True)
class Limits:
    """Upper bounds for one file with all that is nested in it; the largest real checkpoints stay far below.

    Attributes:
        pickle_bytes: bytes of pickle streams, and of the text and bytes that are made from them again.
        opcodes: instructions.
        memo: values that are remembered for later use.
        stack: values that are waiting to be put together.
        depth: containers within containers of what was read.
        items: elements that are copied from one container into another; and visits of one `walk`.
        odd_keys: keys of dicts and sets other than text, bytes and common numbers: their hashes can be forged,
            which makes each of them as slow as all before it together.
        text_bytes: one piece of text.
        integer_bytes: one integer.
        name_bytes: module and name of one global.
        nested: pickles inside pickles inside pickles.
        records: entries of a zip or tar, storages of a legacy file.
        dimensions: of one tensor.
        tensor_bytes_free: all tensors together, in bytes, whatever the storages hold: views may share them.
        tensor_bytes_factor: the same, for each byte of storages and pickles.
    """

    pickle_bytes: int = 1 << 30
    opcodes: int = 10_000_000
    memo: int = 5_000_000
    stack: int = 2_000_000
    depth: int = 500
    items: int = 20_000_000
    odd_keys: int = 10_000
    text_bytes: int = 64 << 20
    integer_bytes: int = 512
    name_bytes: int = 512
    nested: int = 8
    records: int = 500_000
    dimensions: int = 64
    tensor_bytes_free: int = 256 << 20
    tensor_bytes_factor: int = 64


LIMITS = Limits()


class Budget:
    """What is left of the limits, shared by a file and the pickles inside it.

    Attributes:
        limits: what there was at first.
        opcodes: instructions that are left; the machine counts them down itself, they are too many for a call each.
        pickle_bytes: the same for bytes of streams.
    """

    __slots__ = (
        "_items",
        "_memo",
        "_odd_keys",
        "_records",
        "_storages",
        "_tensors",
        "limits",
        "opcodes",
        "pickle_bytes",
        "what",
    )

    def __init__(self, limits: Limits, what: str) -> None:
        self.limits = limits
        self.what = what
        self.opcodes = limits.opcodes
        self.pickle_bytes = limits.pickle_bytes
        self._memo = limits.memo
        self._items = limits.items
        self._odd_keys = limits.odd_keys
        self._records = limits.records
        self._storages = 0
        self._tensors = 0

    def over(self, limit: int, unit: str) -> InvalidInput:
        """The refusal, to be raised by who counts."""
        return InvalidInput(
            f"{self.what}: expected a pickle of at most {limit} {unit}, found more; "
            f"save what is needed of it, as safetensors or in smaller files"
        )

    def spend_bytes(self, count: int) -> None:
        """
        Raises:
            InvalidInput: more bytes than the limit.
        """
        self.pickle_bytes -= count
        if self.pickle_bytes < 0:
            raise self.over(self.limits.pickle_bytes, "bytes")

    def spend_memo(self) -> None:
        """
        Raises:
            InvalidInput: more memo entries than the limit.
        """
        self._memo -= 1
        if self._memo < 0:
            raise self.over(self.limits.memo, "memo entries")

    def spend_items(self, count: int) -> None:
        """
        Raises:
            InvalidInput: more elements copied than the limit.
        """
        self._items -= count
        if self._items < 0:
            raise self.over(self.limits.items, "elements")

    def spend_odd_key(self) -> None:
        """
        Raises:
            InvalidInput: more keys with hashes that can be forged than the limit.
        """
        self._odd_keys -= 1
        if self._odd_keys < 0:
            raise self.over(self.limits.odd_keys, "keys that are neither text nor small numbers")

    def spend_records(self, count: int) -> None:
        """
        Raises:
            InvalidInput: more records than the limit.
        """
        self._records -= count
        if self._records < 0:
            raise self.over(self.limits.records, "records")

    def add_storage(self, nbytes: int) -> None:
        """Bytes that the file really has for its tensors."""
        self._storages += nbytes

    def spend_tensor(self, nbytes: int) -> None:
        """
        Raises:
            MalformedTensors: tensors that repeat the bytes of their storages beyond measure.
        """
        self._tensors += nbytes
        there = self._storages + self.limits.pickle_bytes - self.pickle_bytes
        allowed = self.limits.tensor_bytes_free + self.limits.tensor_bytes_factor * there
        if self._tensors > allowed:
            raise MalformedTensors(
                f"{self.what}: expected tensors of at most {allowed} bytes over {there} bytes, "
                f"found {self._tensors}: views repeat them; save them with .contiguous()"
            )
