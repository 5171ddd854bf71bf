"""Recipes: how a version was computed of others, in its manifest. A recipe names sources by manifest digest and holds
all that decides about the result, so the same recipe is found instead of computed again, and `remerge` can compute it
once more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection

from registry.catalog.journal_rows import events_of
from registry.catalog.lineage import references
from registry.catalog.merging import made_of
from registry.core.canonical_json import canonical_json
from registry.core.digest import is_digest
from registry.core.errors import Corrupt, InvalidInput
from registry.core.manifest import Manifest
from registry.core.reference import parse_reference, shown
from registry.operations.merging.request import MergeRequest, check_merge
from registry.operations.merging.sources import MOST_SOURCES
from registry.operations.reading import blob_bytes
from registry.store.interface import BlobStore

FORMAT = 1


def merge_recipe(
    request: MergeRequest,
    digests: Sequence[str],
    weights: Sequence[float],
    *,
    base: str | None,
    into_base: bool,
    dtype: str | None,
) -> dict[str, Any]:
    """The recipe of a merge.

    Args:
        digests: manifest digests of the sources, in the order of computation.
        base: manifest digest of the base.
        dtype: safetensors code of an adapter's tensors.
    """
    return {
        "format": FORMAT,
        "operation": "merge",
        "into_base": into_base,
        "base": base,
        "sources": [{"digest": one, "weight": weight} for one, weight in zip(digests, weights, strict=True)],
        "module_weights": [[pattern, list(given)] for pattern, given in request.module_weights],
        "method": request.method,
        "options": dict(request.options),
        "rank": request.rank,
        "energy": request.energy,
        "saved": request.saved,
        "attention_out": request.attention_out,
        "arithmetic": "F64" if request.precise else "F32",
        "dtype": dtype,
    }


def find_made(
    connection: Connection, blobs: BlobStore, parent_ids: Sequence[int], recipe: Mapping[str, Any], relation: str
) -> tuple[int, str] | None:
    """The oldest present version that was made by this recipe, in this registry: (row id, reference). What was imported
    says only that it was made so; it is computed here once more."""
    wanted = canonical_json(dict(recipe), "the recipe")
    for version_id, digest in made_of(connection, parent_ids, relation):
        if recipe_bytes(blobs, digest) != wanted:
            continue
        reference = references(connection, [version_id])[version_id]
        name = parse_reference(reference)
        events = events_of(connection, name.namespace, name.name, version_id=version_id)
        origin = next((one.payload.get("origin") for one in events if one.kind == "pushed"), None)
        if not (isinstance(origin, Mapping) and "registry" in origin):
            return version_id, reference
    return None


def recipe_bytes(blobs: BlobStore, manifest: str) -> bytes | None:
    """The recipe in a manifest, in canonical form; None where it has none."""
    found = read_recipe(blobs, manifest)
    return None if found is None else canonical_json(dict(found), "the recipe")


def read_recipe(blobs: BlobStore, manifest: str) -> Mapping[str, Any] | None:
    """The recipe in a manifest.

    Raises:
        BlobNotFound, DigestMismatch, InvalidManifest
    """
    return Manifest.from_document(blob_bytes(blobs, manifest)).recipe


def request_of(recipe: Mapping[str, Any], what: str) -> tuple[MergeRequest, tuple[str, ...], tuple[float, ...]]:
    """The request that a recipe of a merge holds, with the digests of its sources and their weights.

    Raises:
        InvalidInput: a recipe of another kind, or of a newer program.
        Corrupt: it is none.
    """
    operation, number = recipe.get("operation"), recipe.get("format")
    if operation != "merge" or type(number) is not int or number != FORMAT:
        raise InvalidInput(
            f"{what} was made by a recipe of operation {shown(repr(operation), 80)}, format {shown(repr(number), 80)}; "
            f"expected a merge of format {FORMAT}: a newer lora-registry may compute it"
        )
    wrong = _wrong_member(recipe)
    if wrong:
        raise Corrupt(f"the recipe of {what} cannot be read: {wrong}")
    try:
        options = recipe["options"]
        checked = check_merge(
            method=recipe["method"],
            rank=recipe["rank"],
            energy=recipe["energy"],
            density=options.get("density"),
            majority=options.get("majority"),
            inner=options.get("inner"),
            seed=options.get("seed"),
            module_weights={str(one): given for one, given in recipe["module_weights"]},
            saved=recipe["saved"],
            precise=recipe["arithmetic"] == "F64",
            attention_out=recipe["attention_out"],
            force=True,  # it was made, and said so then
            into_base=recipe["into_base"],
        )
        request = replace(checked, dtype=recipe["dtype"])
        sources = [(str(one["digest"]), float(one["weight"])) for one in recipe["sources"]]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:  # InvalidInput is a ValueError
        raise Corrupt(f"the recipe of {what} cannot be read: {type(error).__name__}: {error}"[:300]) from error
    return request, tuple(one for one, _ in sources), tuple(weight for _, weight in sources)


def _wrong_member(recipe: Mapping[str, Any]) -> str:
    """The first member that no merge writes; empty where there is none."""
    sources = recipe.get("sources")
    if not isinstance(sources, list) or not 0 < len(sources) <= MOST_SOURCES:
        return f"sources: expected a list of 1 to {MOST_SOURCES}"
    digests = [one.get("digest") if isinstance(one, Mapping) else None for one in sources]
    if not all(isinstance(one, str) and is_digest(one) for one in digests) or len(set(digests)) != len(digests):
        return "sources: expected distinct digests of 64 hex digits"
    base, saved = recipe.get("base"), recipe.get("saved")
    for name, right in (
        ("base", base is None or (isinstance(base, str) and is_digest(base))),
        ("saved", saved is None or isinstance(saved, str)),
        ("dtype", _text(recipe.get("dtype")) in (None, "F64", "F32", "BF16", "F16")),
        ("arithmetic", _text(recipe.get("arithmetic")) in ("F32", "F64")),
        ("into_base", isinstance(recipe.get("into_base"), bool)),
        ("options", isinstance(recipe.get("options"), Mapping)),
        ("module_weights", isinstance(recipe.get("module_weights"), list)),
        ("method", isinstance(recipe.get("method"), str)),
    ):
        if not right:
            return f"{name}: found {shown(repr(recipe.get(name)), 80)}"
    return ""


def _text(value: object) -> str | None:
    """The value where it is text or None; else a text that nothing is equal to."""
    return value if value is None or isinstance(value, str) else repr(type(value))
