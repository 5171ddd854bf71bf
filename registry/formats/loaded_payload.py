"""A checkpoint file in memory: what was saved as plain Python data with torch tensors in it, taken apart into state
dicts by what they are. The machine of `pickles` reads pickles, so nothing of a file is run; torch.load is not used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from registry.core.errors import InvalidInput, UnsupportedTensor
from registry.core.layout import Layout, TensorSpec
from registry.core.reference import shown
from registry.core.safetensors_header import read_header
from registry.formats.kinds import kind_of
from registry.formats.paths import is_safetensors
from registry.formats.payloads import Payload, take_apart
from registry.formats.pickled import PlainData, opaque_note
from registry.formats.pickles import LIMITS, Budget, PickleFile, TensorRef, read_pickle_file
from registry.formats.pickles.known_torch import DTYPES
from registry.formats.safetensors_tree import FORM, STATE, read_tree, refs_of
from registry.formats.source import OpenFile, open_regular, source_errors

if TYPE_CHECKING:
    import torch

_TORCH_NAMES = {code: name for name, code in DTYPES.items()}


@dataclass(frozen=True)
class LoadedPayload:
    """What a checkpoint file holds. Its tensors lie on the CPU in memory of their own, which may be written to; a
    tensor that stands in several places is one object.

    Attributes:
        tree: the whole of what was saved, pickles within it read in their places. An object of a class that is not
            rebuilt is an `Inert`.
        state_dicts: by what they are: `model`, `adapter`, `ema`, `optimizer`, `scheduler`, or under their own names.
        settings: of a LoRA, as pdp saves them (formats.guide_config); None where there are none.
        training: all that is no state dict: `epoch`, `cfg`, `metadata`, ...
        header: `__metadata__` of a safetensors file, without the state document; empty for other files.
        form: `torch zip`, `torch legacy`, `torch tar`, `pickle` or `safetensors`.
        notes: what was left out, and which classes are kept as plain data.
    """

    tree: Any
    state_dicts: dict[str, Any]
    settings: dict[Any, Any] | None
    training: dict[Any, Any]
    header: Mapping[str, str] = field(default_factory=dict)
    form: str = ""
    notes: tuple[str, ...] = ()


def load_payload(path: Path) -> LoadedPayload:
    """Reads a file of torch.save, a pickle, or a safetensors file (tensors alone, or a checkpoint of
    `write_safetensors_tree`).

    Unlike a push it takes what has no model, such as an optimizer alone. A file of adapter tensors alone gives the
    state dict `adapter`, as a push of it would.

    Raises:
        SourceNotFound: there is no such file.
        UnsafePickle: it would call something.
        InvalidInput, MalformedTensors: it is torn or of another kind, or has two state dicts of one kind.
        UnsupportedTensor: torch, or safetensors, has no such tensor.
        StorageError: it cannot be read.
    """
    what = shown(str(path), 200)
    if "\0" in str(path):
        raise InvalidInput(f"{what}: a path has no NUL in it")
    with open_regular(path) as file, source_errors(path):
        head = file.read(512)
        file.seek(0)
        header: dict[str, str] = {}
        if is_safetensors(path, head):
            found, header = _read_safetensors(file, what)
        else:
            found = read_pickle_file(file, size=OpenFile(file, what).size, what=what)
        payload = take_apart(found, what)
        _name_adapter(payload)
        tensors = _Tensors(file, what)
        # Counted apart: the parts are the whole once more.
        tree = PlainData(what, tensors.of).of(payload.tree)
        parts = PlainData(what, tensors.of)
        return LoadedPayload(
            tree=tree,
            state_dicts={role: parts.of(state) for role, (_, state) in payload.state_dicts.items()},
            settings=None if payload.settings is None else parts.of(payload.settings),
            training=parts.of(payload.training),
            header=header,
            form=found.form,
            notes=(*opaque_note(found), *payload.notes),
        )


def _read_safetensors(file: BinaryIO, what: str) -> tuple[PickleFile, dict[str, str]]:
    header, _ = read_header(file, file_size=OpenFile(file, what).size, what=what)
    said = {key: text for key, text in header.metadata.items() if key != STATE}
    if STATE in header.metadata:
        return read_tree(header, what)[0], said
    return PickleFile(refs_of(header, what), FORM, (), Budget(LIMITS, what)), said


def _name_adapter(payload: Payload) -> None:
    """Calls a state dict that holds an adapter and no base by what it is."""
    if payload.state_dicts.keys() != {"model"}:
        return
    key, tree = payload.state_dicts["model"]
    named = tree.items() if isinstance(tree, dict) else ()
    specs = [TensorSpec(str(name), ref.dtype, ref.shape) for name, ref in named if isinstance(ref, TensorRef)]
    if specs and kind_of(Layout(tuple(specs))) == "adapter":
        payload.state_dicts = {"adapter": (key, tree)}


class _Tensors:
    """Makes torch tensors of places in an open file, each once."""

    def __init__(self, file: BinaryIO, what: str) -> None:
        self._file = file
        self._what = what
        self._made: dict[object, torch.Tensor] = {}

    def of(self, ref: TensorRef) -> torch.Tensor:
        key = (id(ref.storage), ref.offset, ref.shape, ref.stride, ref.dtype)
        if key not in self._made:
            self._made[key] = self._read(ref)
        return self._made[key]

    def _read(self, ref: TensorRef) -> torch.Tensor:
        import torch

        name = _TORCH_NAMES.get(ref.dtype, "")
        dtype = getattr(torch, name, None)
        if not isinstance(dtype, torch.dtype):
            raise UnsupportedTensor(f"{self._what}: torch has no dtype for a tensor of {ref.dtype}; save it in another")
        tensor = torch.empty(ref.shape, dtype=dtype)
        if not ref.elements:
            return tensor
        # Written through a view of bytes, so that the tensor is the owner of its memory.
        memory = tensor.reshape(-1).view(torch.uint8).numpy().data.cast("B")
        filled = 0
        for chunk in ref.chunks(self._file):
            memory[filled : filled + len(chunk)] = chunk
            filled += len(chunk)
        return tensor
