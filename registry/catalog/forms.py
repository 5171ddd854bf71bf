"""Forms of models as rows, content-addressed: a thousand fine-tunes of one model share one row of `architecture` and
its modules. The form itself is read from the row's document; the rows of `module` are what `fitting.py` joins with."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Lock
from typing import Any

from sqlalchemy import Connection, select, update

from registry.catalog.rows import batches, ids_by_digest, insert_missing
from registry.catalog.tables import architecture, module, version
from registry.core.errors import Corrupt, InvalidInput
from registry.core.layout import NOT_IN_A_NAME
from registry.core.model_form import ModelForm, Module, read_model_form

KEPT = 16
"""Forms that stay in mind by their digests: reading one of 300 modules takes as long as ten statements."""
_kept: dict[str, ModelForm] = {}
_keeping = Lock()


def register_form(connection: Connection, form: ModelForm) -> int:
    """Row id of a form; a new one gets its modules.

    Of two that register the same form at once the second waits for the first and takes its row, so a transaction
    registers after all else for which others may wait.

    Raises:
        InvalidInput: it cannot be written as a document.
    """
    known = ids_by_digest(connection, architecture, [form.digest])
    if form.digest in known:
        return known[form.digest]
    row = {
        "digest": form.digest,
        "source_fingerprint": form.fingerprint,
        "class_name": _text(form.class_name),
        "exact": form.exact,
        "document": form.document.decode(),
    }
    insert_missing(connection, architecture, [row])
    form_id = ids_by_digest(connection, architecture, [form.digest])[form.digest]
    for batch in batches(form.modules):
        insert_missing(connection, module, [{"architecture_id": form_id, **module_row(one)} for one in batch])
    return form_id


def _text(name: str | None) -> str | None:
    """A name that every database holds."""
    return None if name is None or NOT_IN_A_NAME.search(name) else name


def module_row(one: Module) -> dict[str, Any]:
    """What the columns of `module` say, but whose it is."""
    rows, columns = weight_sizes(one)
    return {
        "path": one.path,
        "kind": one.kind,
        "in_features": one.in_features,
        "out_features": one.out_features,
        "groups": one.groups,
        "rows": rows,
        "columns": columns,
        "bias": one.bias,
        "tied_to": one.tied_to,
    }


def weight_sizes(one: Module) -> tuple[int | None, int | None]:
    """The first two dimensions of its weight (of an attention: of the fused projection), as far as there are any."""
    weight = one.parameter("weight") or one.parameter("in_proj_weight")
    shape = () if weight is None else weight.shape
    return (shape[0] if shape else None, shape[1] if len(shape) > 1 else None)


def set_form(connection: Connection, version_id: int, form_id: int) -> None:
    """Says what model a version is, or is for; of an older form only the row stays."""
    connection.execute(update(version).where(version.c.id == version_id).values(architecture_id=form_id))


def form_of_version(connection: Connection, version_id: int) -> tuple[int, ModelForm] | None:
    """Row id and form of a version's model. None: an adapter that came alone, or a version of a catalog that had no
    forms yet; of its layout the caller can derive one.

    Raises:
        Corrupt: the row's document cannot be read.
    """
    return next(iter(forms_of_versions(connection, [version_id]).values()), None)


def forms_of_versions(connection: Connection, version_ids: list[int]) -> dict[int, tuple[int, ModelForm]]:
    """The same of many, by version; those that share a form get one value.

    Raises:
        Corrupt
    """
    ids: dict[int, int] = {}
    for batch in batches(version_ids):
        rows = connection.execute(
            select(version.c.id, version.c.architecture_id).where(
                version.c.id.in_(batch), version.c.architecture_id.is_not(None)
            )
        )
        ids.update((row.id, row.architecture_id) for row in rows)
    forms = dict(_read(connection, sorted(set(ids.values()))))
    return {version_id: (form_id, forms[form_id]) for version_id, form_id in ids.items()}


def read_form(connection: Connection, form_id: int) -> ModelForm:
    """The form with this row id.

    Raises:
        Corrupt
    """
    return dict(_read(connection, [form_id]))[form_id]


def _read(connection: Connection, form_ids: list[int]) -> Iterator[tuple[int, ModelForm]]:
    for form_id in form_ids:
        digest: str = connection.execute(select(architecture.c.digest).where(architecture.c.id == form_id)).scalar_one()
        yield form_id, _kept.get(digest) or _read_one(connection, digest)


def _read_one(connection: Connection, digest: str) -> ModelForm:
    of_digest = select(architecture.c.document).where(architecture.c.digest == digest)
    document: str = connection.execute(of_digest).scalar_one()
    try:
        form = read_model_form(document.encode(), f"the form {digest}")
    except InvalidInput as error:
        raise Corrupt(f"{error}; 'registry reindex' makes it again") from error
    with _keeping:
        _kept[digest] = form
        while len(_kept) > KEPT:
            del _kept[next(iter(_kept))]
    return form
