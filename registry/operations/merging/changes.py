"""What differs between a base and a checkpoint, by digests alone: weights that an adapter can change, and tensors that
are left out, each with the reason. No byte of a tensor is read here."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import Connection

from registry.catalog.contents import StoredComponent, read_contents
from registry.catalog.descriptions import descriptions_of
from registry.catalog.versions import VersionRecord, records, resolve
from registry.compat.case import ModelSide, Weights
from registry.core.adapter_names import is_adapter_tensor
from registry.core.errors import InvalidInput, NotStored, ShapeMismatch
from registry.core.layout import TensorSpec
from registry.core.model_form import LIVE_NAMES, ModelForm, Module
from registry.core.reference import parse_reference, shown
from registry.merge.extraction import WEIGHTS, Shape, update_shape_of
from registry.operations.context import Context
from registry.operations.merging.adapters import TORCH_DTYPES
from registry.operations.merging.extracted import ExtractRequest, is_selected
from registry.operations.merging.into_base import saved_names
from registry.operations.reading import blob_bytes
from registry.operations.sides import Sides

_EMBEDDING_NAME = re.compile(r"(?i)emb|^(wte|wpe|shared)$")
"""Modules of which only a matrix is known, and that are embeddings by their names."""


@dataclass(frozen=True)
class Compared:
    """One of the two versions.

    Attributes:
        saved: name in the state dict by live name, of tensors that are one tensor there.
    """

    record: VersionRecord
    side: ModelSide
    weights: Weights
    component: StoredComponent
    saved: Mapping[str, str]

    @property
    def reference(self) -> str:
        return self.record.reference

    def spec(self, live: str) -> TensorSpec | None:
        return self.component.layout.by_name.get(self.saved.get(live, ""))


@dataclass(frozen=True)
class Wanted:
    """A module whose weight differs and can be extracted."""

    path: str
    tensor: str
    shape: Shape


@dataclass(frozen=True)
class Left:
    """A tensor that differs and cannot; `readable` where both sides have one of the same shape."""

    tensor: str
    why: str
    readable: bool


# ---------------------------------------------------------------- the two versions


def two_models(
    context: Context, connection: Connection, base: str | None, checkpoint: str
) -> tuple[Compared, Compared]:
    """The base and the checkpoint, from one snapshot.

    Raises:
        InvalidInput: an adapter, a checkpoint without a base, or one that is its own.
        NotStored: one is recorded without its bytes.
        InvalidReference, NotFound
    """
    sides = Sides(context, connection)
    key = resolve(connection, parse_reference(checkpoint))
    if base is not None:
        base_id: int | None = resolve(connection, parse_reference(base)).id
    else:
        base_id = sides.base(key.id)
    tuned = _model(context, connection, sides, key.id)
    if base_id is None:
        raise InvalidInput(
            f"{tuned.reference} does not say which base it was trained on; name it (--base), as it was before training"
        )
    found = _model(context, connection, sides, base_id)
    if found.record.digest == tuned.record.digest or found.record.content_digest == tuned.record.content_digest:
        raise InvalidInput(
            f"{tuned.reference} and its base {found.reference} have the same content, so there is nothing to extract; "
            "give the checkpoint after training, and the base before it"
        )
    return found, tuned


def _model(context: Context, connection: Connection, sides: Sides, version_id: int) -> Compared:
    record = records(connection, [version_id])[0]
    if record.kind == "adapter":
        raise InvalidInput(
            f"{record.reference} is an adapter already; an extraction takes two models: the checkpoint after training, "
            "and the base before it"
        )
    contents = read_contents(connection, version_id)
    if contents.external:
        raise NotStored(
            f"{record.reference} is recorded without its bytes, which an extraction reads; push it again without "
            "--external"
        )
    side = sides.model(version_id)
    component = contents.components["model"]
    held = next((spec.name for spec in component.layout if is_adapter_tensor(spec.name)), None)
    if held is not None or side.weights is None:
        raise InvalidInput(
            f"{record.reference} holds an adapter beside its weights ({shown(str(held), 200)}); push that adapter by "
            "itself, or the model after merge_and_unload"
        )
    live_names = descriptions_of(connection, version_id).get(LIVE_NAMES)
    document = None if live_names is None else blob_bytes(context.store.blobs, live_names)
    return Compared(record, side, side.weights, component, saved_names(component.layout, document))


def form_of(base: Compared, tuned: Compared, notes: list[str]) -> ModelForm:
    """The modules of the two, from the one of which the model itself was seen."""
    form = next((one.side.form for one in (base, tuned) if one.side.form.exact), base.side.form)
    if not form.exact:
        notes.append(
            f"the modules of {base.reference} are known from names and shapes alone: a matrix was taken for a linear, "
            "a convolution for one without groups; push the base as a live model to be sure"
        )
    return form


def refuse_unknown(request: ExtractRequest, form: ModelForm, base: str) -> None:
    """
    Raises:
        InvalidInput: a pattern that is for no module.
    """
    for pattern in request.modules:
        if not any(is_selected(module.path, pattern) for module in form.modules):
            near = difflib.get_close_matches(pattern, [module.path for module in form.modules], n=3, cutoff=0.3)
            hint = f"; near it: {shown(', '.join(near), 200)}" if near else ""
            raise InvalidInput(f"no module of {base} is called '{shown(pattern, 200)}'{hint}")


# ---------------------------------------------------------------- what differs


def compare(
    base: Compared, tuned: Compared, form: ModelForm, request: ExtractRequest, notes: list[str]
) -> tuple[list[Wanted], list[Left]]:
    """What differs, by digests alone: modules to extract, in order of path, and tensors that are left out."""
    wanted: list[Wanted] = []
    left: list[Left] = []
    ours, theirs = base.weights, tuned.weights
    cast = 0
    for name in sorted(ours.digests.keys() | theirs.digests.keys()):
        if ours.digests.get(name) == theirs.digests.get(name):
            continue
        path, _, leaf = name.rpartition(".")
        module = form.by_path.get(path)
        owner = "" if module is None or module.tied_to is None else f"{module.tied_to}.{leaf}"
        if owner in ours.digests and theirs.digests.get(name) in (None, theirs.digests.get(owner)):
            continue  # in both the same tensor as its owner's, which is reported
        rounded = ours.rounded.get(name)
        if rounded is not None and rounded == theirs.rounded.get(name) and ours.dtypes[name] != theirs.dtypes[name]:
            cast += 1
            continue
        why, readable = _obstacle(name, base, tuned)
        if readable and not why:
            why, shape = _module_obstacle(path, leaf, module, form, request)
            if shape is not None:
                wanted.append(Wanted(path, name, shape))
                continue
        left.append(Left(name, why, readable))
    if cast:
        notes.append(f"{cast} tensors differ by the cast to bfloat16 alone, and count as equal")
    return wanted, left


def _obstacle(name: str, base: Compared, tuned: Compared) -> tuple[str, bool]:
    """Why two tensors cannot be subtracted, and whether they can."""
    for one, other in ((base, tuned), (tuned, base)):
        if name not in one.weights.digests:
            return f"only {other.reference} has it", False
    ours, theirs = base.spec(name), tuned.spec(name)
    if ours is None or theirs is None:
        return "it is made of several saved tensors when the model is loaded", False
    if ours.shape != theirs.shape:
        return f"its shape is {list(ours.shape)} in the base and {list(theirs.shape)} in the checkpoint", False
    for spec in (ours, theirs):
        if spec.dtype not in TORCH_DTYPES:
            return f"its dtype is {spec.dtype}", False
    return "", True


def _module_obstacle(
    path: str, leaf: str, module: Module | None, form: ModelForm, request: ExtractRequest
) -> tuple[str, Shape | None]:
    """Why the tensor is not extracted; or the shape of its update."""
    if module is None or WEIGHTS.get(module.kind) != leaf:
        return "no weight of a linear, a convolution or an embedding", None
    if path in form.ties:
        others = ", ".join(one for one in form.ties[path] if one != path)
        return f"tied: it is the weight of {others} as well, and an adapter would change one of them", None
    if not path:
        return "it is the model itself, which PEFT does not wrap", None
    if module.kind == "matrix" and _EMBEDDING_NAME.search(path.rpartition(".")[2]):
        return "by its name an embedding, and no form of the base says so; push the base as a live model", None
    if not request.selects(path):
        return "not among the modules that were asked for", None
    owner = form.by_path.get(path.rpartition(".")[0])
    attention_out = owner is not None and owner.kind == "attention" and path.endswith(".out_proj")
    if attention_out and request.attention_out is None:
        return (
            "the out_proj of a MultiheadAttention, whose update PEFT up to 0.21 adds twice; say attention_out=2 for "
            "such a PEFT, 1 for a later one",
            None,
        )
    try:
        return "", update_shape_of(module, attention_out=attention_out)
    except ShapeMismatch as error:
        return str(error), None
