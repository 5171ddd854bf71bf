"""A recipe computed once more, and held against the version that it made: bit-equal, or how far off. Nothing is
stored."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, select

from registry.catalog.contents import Contents, read_contents
from registry.catalog.journal_rows import events_of
from registry.catalog.lineage import references
from registry.catalog.tables import version
from registry.catalog.versions import resolve
from registry.core.errors import InvalidInput, VersionNotFound
from registry.core.reference import parse_reference, shown
from registry.operations.context import Context
from registry.operations.environment import capture
from registry.operations.merging.merge import compute
from registry.operations.merging.plan import MergePlan, plan_merge
from registry.operations.merging.recipe import read_recipe, request_of
from registry.operations.merging.report import Remerged
from registry.operations.merging.request import check_device
from registry.operations.reading import BlobReader

if TYPE_CHECKING:
    from torch import Tensor


def remerge(context: Context, reference: str, *, device: str = "cpu") -> Remerged:
    """Computes a merge again; see `Registry.remerge`."""
    import torch

    from registry.formats.live import flat_bytes

    begin = time.perf_counter()
    check_device(device)
    parsed = parse_reference(reference)
    with context.reading() as connection:
        key = resolve(connection, parsed)
        pinned = references(connection, [key.id])[key.id]
        recipe = read_recipe(context.store.blobs, key.digest)
        if recipe is None:
            raise InvalidInput(f"{pinned} was not made by a recipe; 'registry log {pinned}' says what it came from")
        plan = _plan(context, connection, recipe, pinned, device)
        contents = read_contents(connection, key.id)
        events = events_of(connection, parsed.namespace, parsed.name, version_id=key.id)
        pushed = next((one.payload.get("environment") for one in events if one.kind == "pushed"), None)
    source, _ = compute(context, plan, [])
    equal = total = 0
    squares = [0.0, 0.0]
    worst: tuple[str, float] | None = None
    role = "model" if plan.into_base else "adapter"
    with source, BlobReader(context.store.blobs) as reader:
        for name, again, stored in _pairs(source, reader, contents, role):
            total += 1
            if again is None:
                equal += 1
                continue
            if (again.dtype, again.shape) != (stored.dtype, stored.shape):
                raise InvalidInput(
                    f"the recipe gives {shown(name, 200)} as {again.dtype} {list(again.shape)}, and {pinned} has "
                    f"{stored.dtype} {list(stored.shape)}: it was not made by it"
                )
            if torch.equal(flat_bytes(again), flat_bytes(stored)):
                equal += 1
                continue
            one, other = again.double(), stored.double()
            apart, size = float((one - other).norm()), float(other.norm())
            squares = [squares[0] + apart**2, squares[1] + size**2]
            if apart and (worst is None or apart > worst[1] * size):
                worst = (name, apart / size if size else math.inf)
    difference = math.sqrt(squares[0] / squares[1]) if squares[1] else math.sqrt(squares[0])
    changed = _changed(pushed if isinstance(pushed, Mapping) else {})
    return Remerged(pinned, total, equal, difference, worst, changed, time.perf_counter() - begin)


def _plan(context: Context, connection: Connection, recipe: Mapping[str, Any], what: str, device: str) -> MergePlan:
    request, digests, weights = request_of(recipe, what)
    found = [_by_digest(connection, one, what) for one in digests]
    base = recipe.get("base")
    return plan_merge(
        context,
        connection,
        replace(request, device=device),
        given=found,
        where=(),
        weights=weights,
        base=None if base is None else _by_digest(connection, str(base), what),
        into_base=bool(recipe["into_base"]),
    )


def _by_digest(connection: Connection, digest: str, what: str) -> str:
    """The reference of a version that is there, of any name.

    Raises:
        VersionNotFound
    """
    found = connection.execute(
        select(version.c.id)
        .where(version.c.manifest_digest == digest, version.c.state == "present")
        .order_by(version.c.id)
    ).scalars()
    first = next(iter(found), None)
    if first is None:
        raise VersionNotFound(
            f"{what} was made of the version sha256:{digest[:12]}, which is not here; restore it, or import it"
        )
    return references(connection, [first])[first]


def _pairs(source: Any, reader: BlobReader, contents: Contents, role: str) -> Iterator[tuple[str, Tensor | None, Any]]:
    """Name, the tensor made again, and the stored one; None twice for what is the base's own by its digest."""
    from registry.operations.load import read_tensors
    from registry.operations.merging.sources import only

    if role not in contents.components:
        raise InvalidInput(f"the recipe makes a component {role}, and the version has {', '.join(contents.components)}")
    component = contents.components[role]
    digests = {spec.name: digest for spec, digest in zip(component.layout, component.tensors, strict=True)}
    (file,) = source.tensor_files
    stored_at = getattr(file, "stored", {})
    names = {spec.name for spec in file.layout}
    if names != set(digests):
        raise InvalidInput(f"the recipe gives other tensors than the version has: {min(names ^ set(digests))}")
    for ordinal, spec in enumerate(file.layout):
        if ordinal in stored_at and stored_at[ordinal].tensor == digests[spec.name]:
            yield spec.name, None, None
            continue
        again = _tensor(spec, b"".join(bytes(chunk) for chunk in file.tensor(ordinal)))
        yield spec.name, again, read_tensors(reader, only(component, {spec.name}))[spec.name]


def _tensor(spec: Any, data: bytes) -> Tensor:
    import torch

    from registry.operations.merging.adapters import TORCH_DTYPES

    if spec.dtype not in TORCH_DTYPES:
        raise InvalidInput(f"{spec.name} is {spec.dtype}, which no merge makes")
    if not data:
        return torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype])
    return torch.frombuffer(bytearray(data), dtype=TORCH_DTYPES[spec.dtype]).reshape(spec.shape)


def _changed(then: Mapping[str, Any]) -> tuple[str, ...]:
    """What may explain a difference: versions of then and now."""
    now = capture().to_json()
    said = []
    for key in ("torch_version", "python_version", "platform"):
        if then.get(key) != now.get(key):
            said.append(f"{key} was {then.get(key)}, is {now.get(key)}")
    return tuple(said)
