"""The adapters that go into a merge: resolved in one snapshot of the catalog, their modules with factors, and what they
bring beside these (whole copies of modules, trained tokens). Their tensors are mapped and proven when they are asked
for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from sqlalchemy import Connection

from registry.catalog.contents import Contents, StoredComponent, read_contents
from registry.catalog.lineage import references as references_of
from registry.catalog.lineage import walk
from registry.catalog.search import Search, find_ids
from registry.catalog.versions import VersionRecord, records, resolve
from registry.compat.case import AdapterSide
from registry.core.adapter_names import Target, canonical_name
from registry.core.errors import InvalidInput, NotStored
from registry.core.layout import Layout
from registry.core.query import parse_where
from registry.core.reference import parse_reference, shown
from registry.merge.lora_modules import LoraModule, lora_modules
from registry.operations.context import Context
from registry.operations.reading import BlobReader
from registry.operations.sides import Sides
from registry.store.interface import BlobStore

if TYPE_CHECKING:
    from torch import Tensor

MOST_SOURCES = 1000


@dataclass(frozen=True)
class MergeSource:
    """One adapter of a merge.

    Attributes:
        side: as the rules of `registry.compat` see it.
        base_id: row id of the base that it was trained on; None: not recorded.
    """

    record: VersionRecord
    side: AdapterSide
    contents: Contents
    base_id: int | None

    @property
    def reference(self) -> str:
        return self.record.reference

    @cached_property
    def modules(self) -> Mapping[str, LoraModule]:
        return lora_modules(self.side.layout, self.side.config)

    @cached_property
    def component(self) -> StoredComponent:
        """The state dict that has the adapter's tensors."""
        found = self.contents.components
        return found["adapter"] if "adapter" in found else found["model"]

    @cached_property
    def beside(self) -> Layout:
        """Tensors that belong to no module with factors: whole copies, biases, trained tokens."""
        taken = {name for module in self.modules.values() for name in module.tensors}
        return Layout(
            tuple(spec for spec in self.side.layout if spec.name not in taken and not self._is_the_bases(spec.name))
        )

    def _is_the_bases(self, name: str) -> bool:
        """Whether a tensor is the base's own, as PEFT saves it beside a LoRA on an embedding "
        "(save_embedding_layers)."""
        own = canonical_name(name)
        if self.side.weights is None or ".base_layer." not in own:
            return False
        digests = {
            spec.name: digest for spec, digest in zip(self.component.layout, self.component.tensors, strict=True)
        }
        return self.side.weights.digests.get(own.replace(".base_layer.", ".")) == digests[name]

    @cached_property
    def copies(self) -> tuple[Target, ...]:
        """The targets that these tensors are of."""
        return tuple(one for one in self.side.targets if not one.rank or "+full" in one.kind)


def find_sources(
    connection: Connection,
    references: Sequence[str],
    where: Sequence[str],
    *,
    output: tuple[str, str] | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> list[int]:
    """Row ids of the sources, by reference and by query, in this order. A query leaves out what was merged of other
    versions that it finds, and versions of the result's own name: else it would feed on itself.

    Args:
        output: namespace and name of the result; None: there is none, and nothing is left out.
        note: told what was left out.

    Raises:
        InvalidInput: there are none, too many, or one is given twice.
        InvalidQuery, InvalidReference, NotFound
    """
    ids: dict[int, str] = {}
    for reference in references:
        key = resolve(connection, parse_reference(reference))
        if key.id in ids:
            raise InvalidInput(
                f"{shown(reference, 200)} and {shown(ids[key.id], 200)} are one version; give it once (in a merge "
                "with the sum of its weights)"
            )
        ids[key.id] = reference
    if where:
        found = find_ids(connection, Search(kind="adapter", where=parse_where(where), limit=MOST_SOURCES + 1))
        if not found:
            raise InvalidInput(
                f"no adapter satisfies {shown(' and '.join(where), 300)}; 'registry list' takes the same"
            )
        left_out = set() if output is None else _fed_by(connection, found, output)
        if left_out:
            named = references_of(connection, sorted(left_out))
            note(
                f"left out of the query, as merged of others in it or of the result's name: {', '.join(named.values())}"
            )
        for one in found:
            if one not in left_out:
                ids.setdefault(one, "the query")
    if not ids:
        raise InvalidInput("no source: give references, or a query with --where")
    if len(ids) > MOST_SOURCES:
        raise InvalidInput(f"{len(ids)} sources; {MOST_SOURCES} is the most: narrow the query down")
    return list(ids)


def _fed_by(connection: Connection, found: Sequence[int], output: tuple[str, str]) -> set[int]:
    """Those versions that are merged of others among them, or of the name of the result."""
    known = set(found)
    left_out = {
        one
        for one in found
        if any(edge.relation == "merged_from" and edge.parent_id in known for edge in walk(connection, one, up=True))
    }
    own = f"{output[0]}/{output[1]}@"
    left_out.update(one for one, name in references_of(connection, list(found)).items() if name.startswith(own))
    return left_out


def read_sources(
    context: Context, connection: Connection, ids: Sequence[int], what: str = "a merge"
) -> list[MergeSource]:
    """The adapters with these row ids, in their order.

    Args:
        what: needs their bytes, for messages.

    Raises:
        InvalidInput: a version that holds no adapter.
        NotStored: one that is recorded without its bytes.
    """
    sides = Sides(context, connection)
    found = []
    for one, record in zip(ids, records(connection, ids), strict=True):
        if record.kind == "base":
            raise InvalidInput(f"{record.reference} is a base; {what} takes adapters (--into-base takes the base)")
        contents = read_contents(connection, one)
        if contents.external:
            raise NotStored(f"{record.reference} is recorded without its bytes, which {what} reads; push it again")
        found.append(MergeSource(record, sides.adapter(one), contents, sides.base(one)))
    return found


class SourceTensors:
    """The tensors of sources, mapped from their blobs and proven as they are asked for; close it after use."""

    def __init__(self, blobs: BlobStore) -> None:
        self._reader = BlobReader(blobs)

    def __enter__(self) -> SourceTensors:
        return self

    def __exit__(self, *exc: object) -> None:
        self._reader.__exit__(*exc)

    def read(self, component: StoredComponent, names: Iterable[str]) -> dict[str, Tensor]:
        """Some tensors of a component, by name.

        Raises:
            DigestMismatch, BlobNotFound, Corrupt, UnsupportedTensor
        """
        from registry.operations.load import read_tensors

        return read_tensors(self._reader, only(component, set(names)))


def only(component: StoredComponent, names: set[str]) -> StoredComponent:
    """The component less all tensors but these."""
    kept = [place for place, spec in enumerate(component.layout) if spec.name in names]
    return replace(
        component,
        layout=Layout(tuple(component.layout.tensors[place] for place in kept)),
        tensors=tuple(component.tensors[place] for place in kept),
        places=tuple(component.places[place] for place in kept),
    )
