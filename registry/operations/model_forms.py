"""Which form of a model a version gets: the one that describes it, else what the layout of its model tells under its
live names. A push and a replay ask the same function, so that a rebuilt catalog has the same rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from registry.core.digest import sha256_hex
from registry.core.errors import BlobNotFound, Corrupt, InvalidInput
from registry.core.layout import Layout
from registry.core.model_form import LIVE_NAMES, MAX_BYTES, ModelForm, form_of_layout, read_model_form
from registry.core.model_form import ROLE as MODULES
from registry.operations.base_fit import live_names_by_component
from registry.operations.holdings import Holdings
from registry.operations.reading import blob_bytes

MODEL = "model"
"""The component whose tensors are a model's own."""
ROLES = (MODULES, LIVE_NAMES)
"""What describes a version and decides about its form."""


@dataclass(frozen=True)
class VersionForm:
    """The form of a version's model.

    Attributes:
        follows_from: digests of the documents that it was made of, by role; None: there was none. It is no longer the
            version's form once another is described.
    """

    form: ModelForm
    follows_from: Mapping[str, str | None]


def version_form(kind: str, layouts: Mapping[str, Layout], documents: Mapping[str, bytes]) -> VersionForm | None:
    """The form that a version has by what is known of it; None where there is no model in it and none is described.

    Args:
        documents: what describes it, by role; only `ROLES` count.

    Raises:
        InvalidInput: the document of its modules cannot be read: it is none, or a newer program's.
    """
    if (modules := documents.get(MODULES)) is not None:
        form = read_model_form(modules, f"the document '{MODULES}'")
        return VersionForm(_written(form), {MODULES: sha256_hex(modules)})
    layout = layouts.get(MODEL)
    if kind == "adapter" or layout is None:
        return None
    described = documents.get(LIVE_NAMES)
    derived = _form_of_layout(layout, described)
    follows_from = {MODULES: None, LIVE_NAMES: None if described is None else sha256_hex(described)}
    return None if derived is None else VersionForm(derived, follows_from)


def _form_of_layout(layout: Layout, described: bytes | None) -> ModelForm | None:
    """What a layout tells; None where its names are such that no form can hold them. A map of live names is help from
    outside: one that leads to no form is as good as none."""
    if described is not None:
        try:
            return _written(form_of_layout(layout, live_names_by_component(described).get(MODEL)))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):  # InvalidInput is a ValueError
            pass
    try:
        return _written(form_of_layout(layout))
    except InvalidInput:
        return None


def _written(form: ModelForm) -> ModelForm:
    """The form, once it is sure that its document can be written and read again.

    Raises:
        InvalidInput
    """
    read_model_form(form.document, "the form of the model")
    return form


def recorded_form(
    kind: str, layouts: Mapping[str, Layout], holdings: Holdings, described: Mapping[str, str]
) -> ModelForm | None:
    """The form of a version as the store has it, for a catalog that is made again.

    None also where a document is missing or damaged, and where it is a newer program's. The form only follows from
    what is kept, so the version stays, and whoever asks for its form makes one of the layout. Rows made of the layout
    here would contradict those of the program that can read the document.

    Args:
        described: digests of what describes it, by role.
    """
    documents: dict[str, bytes] = {}
    for role in (MODULES,) if MODULES in described else (LIVE_NAMES,):
        if (digest := described.get(role)) is None:
            continue
        try:
            if (size := holdings.store.blobs.size(digest)) > MAX_BYTES:
                raise Corrupt(f"blob {digest} ({role}) has {size} bytes; expected at most {MAX_BYTES}")
            documents[role] = blob_bytes(holdings.store.blobs, digest)
        except (BlobNotFound, Corrupt) as error:
            holdings.unreadable.setdefault(digest, str(error))
            return None
    try:
        found = version_form(kind, layouts, documents)
    except InvalidInput:
        return None
    return None if found is None else found.form
