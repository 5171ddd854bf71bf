"""A training checkpoint as one `.safetensors` file: its header has the state document of the whole tree, in which each
tensor stands by the name that it has in the file. Any reader of safetensors opens it as a flat file; this module writes
such files, and reads them as the same trees that pickles give."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, BinaryIO

from registry.core.errors import InvalidInput, InvalidManifest, MalformedTensors, UnsupportedTensor
from registry.core.layout import DTYPE_BITS
from registry.core.reference import shown
from registry.core.safetensors_header import Header
from registry.core.state_document import MAX_DEPTH, Inert, read_state, state_document
from registry.formats.pickles import LIMITS, Budget, PickleFile, StorageRef, TensorRef
from registry.formats.pickles.tensors import row_major

if TYPE_CHECKING:
    import torch

STATE = "state"
"""The key of `__metadata__` under which the state document stands."""
FORM = "safetensors"


def write_safetensors_tree(tree: Any, file: BinaryIO) -> None:
    """Writes plain data with tensors in it as one safetensors file. A tensor is named by its keys, joined by dots; one
    that stands in several places is written once.

    Args:
        tree: None, numbers, text, bytes, lists, tuples, sets, dicts and tensors, on any device.
        file: written to from where it stands.

    Raises:
        InvalidInput: a value that is neither plain nor a tensor, a cycle, or data nested too deeply.
        UnsupportedTensor, MalformedTensors: safetensors cannot hold a tensor, or a name.
    """
    from registry.formats.live import tensor_file

    names = _Names()
    names.collect(tree, "", 0)
    document = state_document(tree, tensor_name=names.of, what="the checkpoint").decode("utf-8")
    file.writelines(tensor_file("checkpoint.safetensors", "", names.tensors, {STATE: document}).chunks())


class _Names:
    """Names for the tensors of a tree.

    Attributes:
        tensors: each once, by name.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._by_place: dict[object, str] = {}

    def collect(self, value: Any, path: str, depth: int) -> None:
        import torch

        if depth > MAX_DEPTH:
            raise InvalidInput(f"the checkpoint is nested over {MAX_DEPTH} deep, at {shown(path)}; save less of it")
        if isinstance(value, torch.Tensor):
            self._add(path or "tensor", value)
        elif isinstance(value, dict):
            for key, item in value.items():
                self.collect(item, f"{path}.{key}" if path else str(key), depth + 1)
        elif isinstance(value, list | tuple):
            for place, item in enumerate(value):
                self.collect(item, f"{path}.{place}" if path else str(place), depth + 1)
        elif isinstance(value, Inert):
            self.collect(value.arguments, path, depth + 1)
            self.collect(value.state, path, depth + 1)

    def _add(self, path: str, tensor: torch.Tensor) -> None:
        from registry.formats.live import tensor_spec

        spec = tensor_spec(path, tensor)
        if DTYPE_BITS[spec.dtype] < 8:
            raise UnsupportedTensor(f"{shown(path)}: a checkpoint holds no packed {spec.dtype}; unpack it first")
        place = _place(tensor)
        if place in self._by_place:
            return
        name, again = path, 1
        while name in self.tensors:
            again += 1
            name = f"{path}#{again}"
        self.tensors[name] = tensor
        self._by_place[place] = name

    def of(self, value: Any) -> str | None:
        import torch

        return self._by_place.get(_place(value)) if isinstance(value, torch.Tensor) else None


def _place(tensor: torch.Tensor) -> object:
    """Equal for two views of the same elements."""
    if not tensor.numel():
        return id(tensor)
    where = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
    return (*where, tensor.is_conj(), tensor.is_neg())


def read_tree(header: Header, what: str) -> tuple[PickleFile, dict[int, int]]:
    """The tree of a file whose header has a state document.

    Args:
        what: names the file in errors.

    Returns:
        the tree in the form of a pickle's, and for the id of each of its tensors the ordinal in the file.

    Raises:
        MalformedTensors: no such document, or one that names other tensors than the file has.
        UnsupportedTensor: a tensor of less than a byte an element.
    """
    refs = refs_of(header, what)
    asked = _Asked(refs)
    try:
        tree = read_state(header.metadata[STATE].encode("utf-8"), asked)
    except InvalidManifest as error:
        raise MalformedTensors(
            f"{what}: expected a state document as '{STATE}' in its header, found another text ({error}); "
            "the file is damaged: save it again"
        ) from error
    left = next((name for name in refs if name not in asked.names), None)
    if left is not None:
        raise MalformedTensors(
            f"{what}: expected every tensor in the state document of its header, {shown(left)} is not in it; "
            f"save the checkpoint again, or the tensors without '{STATE}'"
        )
    ordinals = {id(refs[spec.name]): ordinal for ordinal, spec in enumerate(header.layout)}
    return PickleFile(tree, FORM, (), Budget(LIMITS, what)), ordinals


def refs_of(header: Header, what: str) -> dict[str, TensorRef]:
    """The tensors of a file as places in it, by name.

    Raises:
        UnsupportedTensor: less than a byte an element.
    """
    refs: dict[str, TensorRef] = {}
    for spec, (begin, end) in zip(header.layout, header.offsets, strict=True):
        if DTYPE_BITS[spec.dtype] % 8:
            raise UnsupportedTensor(f"{what}: {shown(spec.name)} is {spec.dtype}, which has no whole bytes; unpack it")
        storage = StorageRef(spec.name, header.size + begin, end - begin, None)
        refs[spec.name] = TensorRef(storage, spec.dtype, spec.shape, row_major(spec.shape), 0)
    return refs


class _Asked(dict[str, TensorRef]):
    """Tensors by name, and which of them were asked for."""

    def __init__(self, tensors: dict[str, TensorRef]) -> None:
        super().__init__(tensors)
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> TensorRef:
        found = super().__getitem__(name)
        self.names.add(name)
        return found
