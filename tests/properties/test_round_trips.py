"""Values of the core written and read back, by us and by the reader that was written from docs/format.md alone."""

from __future__ import annotations

import math
import string
import struct
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from registry.core.annotations import MetadataValue, parse_metadata_text, read_metadata, read_metrics
from registry.core.canonical_json import MAX_INTEGER, canonical_json, parse_json
from registry.core.digest import index_prefix, pack_digests, unpack_digests
from registry.core.errors import InvalidManifest, InvalidQuery, InvalidReference
from registry.core.event import Event, format_moment, number_from_json, number_to_json, payload_text, read_payload
from registry.core.layout import DTYPE_BITS, Layout, TensorSpec
from registry.core.manifest import KINDS, RELATIONS, Component, File, Manifest, Parent
from registry.core.placement import ROLES, FilePlacement, Placement, Splice, pack_entries, unpack_entries
from registry.core.query import Condition, parse_where
from registry.core.reference import Reference, parse_reference
from registry.core.safetensors_header import build_header, parse_header
from tests.conformance import independent_documents as independent
from tests.conformance import independent_placement

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
DIGESTS = st.binary(min_size=32, max_size=32).map(bytes.hex)
WHOLE = st.integers(-MAX_INTEGER, MAX_INTEGER)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
MOMENTS = st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30), timezones=st.just(UTC))
JSON = st.recursive(
    st.none() | st.booleans() | WHOLE | FINITE | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=10,
)


# ---------------------------------------------------------------- canonical JSON


@given(JSON)
def test_canonical_json_is_read_back_and_written_the_same(tree: Any) -> None:
    written = canonical_json(tree, "tree")
    found = parse_json(written)
    assert found == tree
    assert canonical_json(found, "tree") == written


@given(JSON)
def test_two_writers_of_canonical_json_agree(tree: Any) -> None:
    written = canonical_json(tree, "tree")
    assert independent.canonical(tree) == written
    assert independent.parse_canonical(written) == parse_json(written)


@given(st.integers(0, 2**64 - 1).map(lambda bits: struct.unpack("<d", struct.pack("<Q", bits))[0]))
@example(1e21)
@example(1e-7)
@example(5e-324)
@example(9007199254740993.0)
def test_every_double_survives_in_the_shortest_form(value: float) -> None:
    assume(math.isfinite(value))
    written = canonical_json(value, "number")
    assert float(written) == value
    assert independent.number(value).encode() == written
    assert len(written) <= 25


# ---------------------------------------------------------------- layouts and headers

NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=10).filter(lambda name: name != "__metadata__")


@st.composite
def specs(draw: st.DrawFn, name: str) -> TensorSpec:
    dtype = draw(st.sampled_from(sorted(DTYPE_BITS)))
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    if math.prod(shape) * DTYPE_BITS[dtype] % 8:
        shape = [4, *shape]
    return TensorSpec(name, dtype, tuple(shape))


LAYOUTS = st.lists(NAMES, unique=True, max_size=6).flatmap(
    lambda names: st.tuples(*(specs(name) for name in names)).map(Layout)
)


@given(LAYOUTS)
def test_a_layout_is_read_back_from_its_document(layout: Layout) -> None:
    assert Layout.from_document(layout.document) == layout
    assert independent.read_layout(layout.document) == [(spec.name, spec.dtype, spec.shape) for spec in layout]


@given(LAYOUTS)
def test_the_layout_of_a_header_is_the_same_to_both_readers(layout: Layout) -> None:
    head = build_header(layout, {"format": "pt"})
    ours = parse_header(head, file_size=len(head) + layout.nbytes, what="x")
    theirs = independent.read_header(head)
    assert theirs.specs == [(spec.name, spec.dtype, spec.shape) for spec in ours.layout]
    assert theirs.begins == [begin for begin, _ in ours.offsets]
    assert (theirs.head, theirs.size) == (ours.size, ours.file_size)


# ---------------------------------------------------------------- manifests and placements

SEGMENTS = st.text(string.ascii_letters + string.digits + "._-ü😀 ", min_size=1, max_size=6).filter(
    lambda part: part not in (".", "..")
)
PATHS = st.lists(SEGMENTS, min_size=1, max_size=3).map("/".join)
ROLE_NAMES = st.from_regex(r"\A[a-z][a-z0-9_.-]{0,6}\Z")


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    roles = sorted(draw(st.sets(ROLE_NAMES, max_size=3)))
    parts = tuple(Component(role, draw(DIGESTS), tuple(draw(st.lists(DIGESTS, max_size=3)))) for role in roles)
    paths = sorted(draw(st.sets(PATHS, max_size=4)))
    paths = [path for path in paths if not any(other.startswith(f"{path}/") for other in paths)]
    carriers = dict(zip(paths, draw(st.permutations(roles)), strict=False))
    files = tuple(File(path, draw(DIGESTS), draw(st.integers(0, MAX_INTEGER)), carriers.get(path)) for path in paths)
    base = draw(st.none() | DIGESTS)
    edges = draw(st.sets(st.tuples(st.sampled_from(RELATIONS), DIGESTS), max_size=3))
    parents = tuple(
        Parent(relation, digest, draw(st.none() | FINITE) if relation == "merged_from" else None)
        for relation, digest in edges
        if (relation, digest) != ("trained_on", base)
    )
    objects = st.none() | st.dictionaries(TEXT, JSON, max_size=3)
    return Manifest(draw(st.sampled_from(KINDS)), parts, files, draw(objects), base, parents, draw(objects))


@given(manifests())
def test_a_manifest_is_read_back_from_its_document(manifest: Manifest) -> None:
    manifest.check()
    found = Manifest.from_document(manifest.document)
    assert (found, found.digest) == (manifest, manifest.digest)
    assert independent.read_manifest(manifest.document)["base"] == manifest.base


@given(manifests(), st.data())
def test_no_other_document_is_read_as_the_same_manifest(manifest: Manifest, data: st.DataObject) -> None:
    document = bytearray(manifest.document)
    place = data.draw(st.integers(0, len(document) - 1))
    document[place] ^= data.draw(st.integers(1, 255))
    try:
        found = Manifest.from_document(bytes(document))
    except InvalidManifest:
        with_refusal = True
    else:
        with_refusal = False
        assert found != manifest
        assert found.document == bytes(document)
    try:
        independent.read_manifest(bytes(document))
    except independent.Refused:
        assert with_refusal
    else:
        assert not with_refusal


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    digests = draw(st.lists(DIGESTS, unique=True, min_size=1, max_size=4))
    blobs = tuple((digest, draw(st.sampled_from(ROLES))) for digest in digests)
    places = st.integers(0, len(blobs) - 1)
    entries = st.lists(st.tuples(places, st.integers(0, 6)), max_size=12).map(tuple)
    components = draw(st.dictionaries(ROLE_NAMES, entries, max_size=2))
    plain = st.builds(FilePlacement, places, st.booleans())
    return Placement(
        blobs, components, draw(st.dictionaries(PATHS, st.one_of(plain, skeletons(components)), max_size=2))
    )


def skeletons(components: dict[str, tuple[tuple[int, int], ...]]) -> st.SearchStrategy[FilePlacement]:
    """Files with tensors of these components in them, in the first blob."""
    runs = [(role, first) for role, entries in components.items() for first in range(len(entries))]
    if not runs:
        return st.just(FilePlacement(0, False, ()))
    bounds = st.lists(st.integers(0, 2**53 - 1), max_size=4).map(sorted)
    return bounds.flatmap(
        lambda places: st.tuples(*(st.sampled_from(runs) for _ in places)).map(
            lambda chosen: FilePlacement(
                0, False, tuple(Splice(at, role, first, 1) for at, (role, first) in zip(places, chosen, strict=True))
            )
        )
    )


@given(placements())
def test_a_placement_is_read_back_also_through_json(placement: Placement) -> None:
    tree = placement.to_json()
    assert Placement.from_json(tree) == placement
    assert Placement.from_json(parse_json(canonical_json(tree, "placement"))) == placement
    spread = independent_placement.read_placement(tree)["components"]
    assert {role: tuple(entries) for role, entries in spread.items()} == placement.components


@given(placements())
def test_the_runs_of_a_placement_are_as_long_as_they_can_be(placement: Placement) -> None:
    for runs in placement.to_json()["components"].values():
        for (blob, first, length), (other, following, _) in pairwise(runs):
            assert (other, following) != (blob, first + length)


@given(JSON)
def test_nothing_but_a_placement_is_read_as_one(tree: Any) -> None:
    with pytest.raises(InvalidManifest):
        Placement.from_json(tree)


@given(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))))
def test_packed_entries_are_unpacked(entries: list[tuple[int, int]]) -> None:
    packed = pack_entries(entries)
    assert (list(unpack_entries(packed)), len(packed)) == (entries, 8 * len(entries))


@given(st.lists(DIGESTS))
def test_packed_digests_are_unpacked(digests: list[str]) -> None:
    assert list(unpack_digests(pack_digests(digests))) == digests


@given(DIGESTS)
def test_an_index_prefix_gives_back_the_first_16_digits(digest: str) -> None:
    assert index_prefix(digest).to_bytes(8, "big", signed=True).hex() == digest[:16]


# ---------------------------------------------------------------- references and queries

PARTS = st.from_regex(r"\A[a-z0-9]([a-z0-9._-]{0,6}[a-z0-9])?\Z").filter(lambda part: ".." not in part)
TAGS = st.from_regex(r"\A[A-Za-z0-9_]([A-Za-z0-9._-]{0,6}[A-Za-z0-9_])?\Z").filter(
    lambda tag: ".." not in tag and not tag.isdigit() and tag != "latest"
)
REFERENCES = st.one_of(
    st.builds(Reference, PARTS, PARTS, tag=st.none() | TAGS, moment=st.none() | MOMENTS),
    st.builds(Reference, PARTS, PARTS, number=st.integers(1, 10**18 - 1)),
    st.builds(Reference, PARTS, PARTS, digest=st.from_regex(r"\A[0-9a-f]{4,64}\Z")),
)


@given(REFERENCES)
def test_a_reference_is_read_back_from_its_text(reference: Reference) -> None:
    assert parse_reference(str(reference)) == reference
    assert parse_reference(f"registry://{reference}") == reference


@given(
    st.text(max_size=20)
    | st.text("ab/:@{}.-_0129sha256latestT\n ", max_size=25)
    | st.tuples(REFERENCES.map(str), st.integers(0, 40), st.characters()).map(
        lambda one: one[0][: one[1]] + one[2] + one[0][one[1] :]
    )
)
def test_two_parsers_of_references_agree_on_any_text(text: str) -> None:
    try:
        theirs = independent.parse_reference(text)
    except independent.Refused:
        with pytest.raises(InvalidReference) as caught:
            parse_reference(text)
        assert str(caught.value).isprintable(), "one line, and nothing that a terminal obeys"
    else:
        found = parse_reference(text)
        assert parse_reference(str(found)) == found
        assert (found.name, found.tag, found.number) == (theirs["name"], theirs["tag"], theirs["number"])


@given(st.text(max_size=30) | st.text("r size=<>!~ and\"'meta.x8", max_size=30))
def test_any_text_is_a_query_or_an_error_of_one_line(text: str) -> None:
    refusal = ""
    try:
        found = parse_where([text])
    except InvalidQuery as error:
        refusal = str(error)
    else:
        assert found
        assert all(one.value in text for one in found)
    assert refusal == "" or refusal.isprintable()


@given(
    st.lists(
        st.builds(
            Condition,
            st.sampled_from(["r", "kind", "created_at"]),
            st.sampled_from(["=", "!=", "<", "<=", ">", ">=", "~"]),
            st.text(string.ascii_letters + string.digits + "-./:", min_size=1, max_size=8),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_conditions_are_read_back_with_and_without_spaces(conditions: list[Condition]) -> None:
    assert parse_where([" and ".join(map(str, conditions))]) == tuple(conditions)
    tight = [f'{one.field}{one.op}"{one.value}"' for one in conditions]
    assert parse_where([" AND ".join(tight)]) == parse_where(tight) == tuple(conditions)


# ---------------------------------------------------------------- events and annotations


@given(st.dictionaries(TEXT, JSON, max_size=4), MOMENTS, TEXT, st.none() | st.integers(1, 2**31))
def test_an_event_from_its_row_has_the_same_document(
    payload: dict[str, Any], at: datetime, actor: str, version: int | None
) -> None:
    event = Event("a", "b", 7, "note", version, None, at, actor, payload)
    row = Event("a", "b", 7, "note", version, None, at, actor, read_payload(payload_text(payload)))
    document = event.document("0" * 32)
    assert row.document("0" * 32) == document
    tree = independent.read_event(document)
    assert (tree["payload"], tree["actor"], datetime.fromisoformat(tree["at"])) == (payload, actor, at)


@given(MOMENTS, MOMENTS)
def test_times_sort_as_text_as_they_sort(one: datetime, other: datetime) -> None:
    assert (format_moment(one) < format_moment(other)) == (one < other)


@given(st.dictionaries(st.from_regex(r"\A[a-z]{1,4}\Z"), TEXT | st.booleans() | WHOLE | st.integers() | FINITE))
def test_metadata_is_read_back_from_its_event(given: dict[str, Any]) -> None:
    assume(all(not isinstance(value, int) or abs(value) < 2**1000 for value in given.values()))
    assume(all("\0" not in value for value in given.values() if isinstance(value, str)))
    values = read_metadata(given)
    payload = read_payload(payload_text({key: value.to_json() for key, value in values.items()}))
    assert {key: MetadataValue(one["text"], one["number"]) for key, one in payload.items()} == values


@given(st.from_regex(r"\A[+-]?[0-9]{1,20}(\.[0-9]{0,5})?([eE][+-]?[0-9]{1,2})?\Z"))
def test_numbers_of_the_command_line_keep_their_spelling(text: str) -> None:
    found = parse_metadata_text(text)
    assert found == MetadataValue(text, float(text))
    assert isinstance(found, MetadataValue)
    assert float(found.plain) == float(text)


@given(st.floats())
def test_metrics_are_read_back_from_their_event(value: float) -> None:
    metric = read_metrics({"x": value})["x"]
    written = read_payload(payload_text({"x": metric.json}))["x"]
    found = number_from_json(written)
    assert found == value or (math.isnan(found) and math.isnan(value))
    assert number_to_json(found) == metric.json
