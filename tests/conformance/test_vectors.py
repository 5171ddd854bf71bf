"""Every vector, read twice: by today's code, and by the reader that was written from docs/format.md alone."""

from __future__ import annotations

import filecmp
import json
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from registry.core import state_document as state_document_module
from registry.core.adapter_config import adapter_config, canonical_config
from registry.core.adapter_names import targets_of
from registry.core.canonical_json import canonical_json, parse_json
from registry.core.content_digest import content_digest
from registry.core.digest import sha256_hex, tensor_hasher
from registry.core.errors import InvalidInput, InvalidManifest, InvalidReference
from registry.core.event import Event
from registry.core.layout import DTYPE_BITS, Layout, TensorSpec
from registry.core.manifest import Manifest
from registry.core.placement import Placement
from registry.core.reference import parse_push_target, parse_reference
from registry.core.state_document import read_state, state_document
from tests.conformance import (
    independent_content,
    independent_documents,
    independent_placement,
    independent_state_document,
)
from tests.conformance.independent_documents import Refused
from tests.vectors import make_vectors
from tests.vectors.doc_examples import with_examples
from tests.vectors.sample_store import REGISTRY_ID

VECTORS = make_vectors.HERE


@dataclass(frozen=True)
class Tensor:
    """Stands for a tensor in a state document."""

    name: str


def vectors(name: str, *path: str) -> list[Any]:
    tree = json.loads((VECTORS / f"{name}.json").read_bytes())
    for key in path:
        tree = tree[key]
    return list(tree)


def labels(name: str, *path: str) -> list[str]:
    return [
        str(one.get("reason", "")).replace(" ", "-") or str(place) for place, one in enumerate(vectors(name, *path))
    ]


# ---------------------------------------------------------------- all of them


def test_making_the_vectors_again_gives_the_committed_files_byte_for_byte(tmp_path: Path) -> None:
    make_vectors.make(tmp_path)
    made = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    committed = {
        str(path.relative_to(VECTORS))
        for path in VECTORS.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc") and path.name != ".gitattributes"
    }
    assert made == committed
    _, differing, unreadable = filecmp.cmpfiles(VECTORS, tmp_path, sorted(made), shallow=False)
    assert (differing, unreadable) == ([], [])


def test_the_examples_of_the_page_are_those_of_the_vectors() -> None:
    page = make_vectors.PAGE.read_text(encoding="utf-8")
    assert with_examples(page, VECTORS) == page


def test_the_vectors_are_small() -> None:
    files = [path for path in VECTORS.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sum(path.stat().st_size for path in files) < 400_000


def test_no_check_out_changes_their_bytes() -> None:
    rules = (VECTORS / ".gitattributes").read_text().splitlines()
    assert rules == ["*.json -text", "store/** -text"]


# ---------------------------------------------------------------- canonical JSON


@pytest.mark.parametrize("case", vectors("canonical_json", "cases"), ids=lambda case: case["json"])
def test_canonical_json_is_written_as_recorded(case: dict[str, str]) -> None:
    expected = case["canonical"].encode()
    assert canonical_json(parse_json(case["json"]), "vector") == expected
    assert independent_documents.canonical(independent_documents.parse(case["json"].encode())) == expected


@pytest.mark.parametrize("case", vectors("canonical_json", "cases"), ids=lambda case: case["json"])
def test_canonical_json_reads_back_to_itself(case: dict[str, str]) -> None:
    expected = case["canonical"].encode()
    assert canonical_json(parse_json(expected), "vector") == expected


@pytest.mark.parametrize("case", vectors("canonical_json", "refused"), ids=labels("canonical_json", "refused"))
def test_what_is_no_canonical_json_is_refused(case: dict[str, str]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # of parsing, or InvalidInput of writing
        canonical_json(parse_json(case["json"]), "vector")
    with pytest.raises(Refused):
        independent_documents.canonical(independent_documents.parse(case["json"].encode()))


# ---------------------------------------------------------------- tensors and layouts


def test_every_dtype_has_a_vector() -> None:
    assert {case["dtype"] for case in vectors("tensors")} == set(DTYPE_BITS) == set(independent_documents.BITS)


@pytest.mark.parametrize("case", vectors("tensors"), ids=lambda case: case["head"].strip())
def test_a_tensor_digest_is_as_recorded(case: dict[str, Any]) -> None:
    data = bytes.fromhex(case["bytes"])
    size = case.get("repeated_to", len(data))
    data = (data * size)[:size]
    shape = tuple(case["shape"])
    assert TensorSpec("", case["dtype"], shape).nbytes == len(data)
    hasher = tensor_hasher(case["dtype"], shape)
    hasher.update(data)
    assert hasher.hexdigest() == case["digest"]
    assert independent_documents.tensor_head(case["dtype"], shape).decode() == case["head"]
    assert independent_documents.tensor_digest(case["dtype"], shape, data) == case["digest"]


@pytest.mark.parametrize("case", vectors("layouts", "cases"), ids=lambda case: case["digest"][:8])
def test_a_layout_is_read_and_written_as_recorded(case: dict[str, Any]) -> None:
    document = case["document"].encode()
    layout = Layout.from_document(document)
    assert (layout.document, layout.digest, layout.nbytes) == (document, case["digest"], case["bytes"])
    specs = independent_documents.read_layout(document)
    assert specs == [(spec.name, spec.dtype, spec.shape) for spec in layout]


@pytest.mark.parametrize("case", vectors("layouts", "refused"), ids=labels("layouts", "refused"))
def test_a_bad_layout_is_refused(case: dict[str, str]) -> None:
    with pytest.raises(InvalidManifest):
        Layout.from_document(case["document"].encode())
    with pytest.raises(Refused):
        independent_documents.read_layout(case["document"].encode())


# ---------------------------------------------------------------- manifests and placements


@pytest.mark.parametrize("case", vectors("manifests", "cases"), ids=lambda case: case["digest"][:8])
def test_a_manifest_is_read_and_written_as_recorded(case: dict[str, str]) -> None:
    document = case["document"].encode()
    manifest = Manifest.from_document(document)
    assert (manifest.document, manifest.digest) == (document, case["digest"])
    assert Manifest.from_document(manifest.document) == manifest
    assert sha256_hex(document) == case["digest"]
    assert independent_documents.read_manifest(document)["kind"] == manifest.kind


@pytest.mark.parametrize("case", vectors("manifests", "refused"), ids=labels("manifests", "refused"))
def test_a_bad_manifest_is_refused(case: dict[str, str]) -> None:
    with pytest.raises(InvalidManifest):
        Manifest.from_document(case["document"].encode())
    with pytest.raises(Refused):
        independent_documents.read_manifest(case["document"].encode())


@pytest.mark.parametrize("case", vectors("placements", "cases"))
def test_a_placement_is_read_and_written_as_recorded(case: dict[str, Any]) -> None:
    placement = Placement.from_json(case["json"])
    assert placement.to_json() == case["json"]
    expected = {role: [tuple(entry) for entry in entries] for role, entries in case["entries"].items()}
    assert {role: list(entries) for role, entries in placement.components.items()} == expected
    read = independent_placement.read_placement(case["json"])
    assert read["components"] == expected
    for path, file in placement.files.items():
        splices = None if file.splices is None else [(s.at, s.role, s.first, s.length) for s in file.splices]
        assert read["files"][path] == (file.blob, file.whole, splices)


@pytest.mark.parametrize("case", vectors("placements", "refused"), ids=labels("placements", "refused"))
def test_a_bad_placement_is_refused(case: dict[str, Any]) -> None:
    with pytest.raises(InvalidManifest):
        Placement.from_json(case["json"])
    with pytest.raises(Refused):
        independent_placement.read_placement(case["json"])


# ---------------------------------------------------------------- state documents


@pytest.mark.parametrize("case", vectors("state_documents", "cases"), ids=labels("state_documents", "cases"))
def test_a_state_document_is_read_and_written_as_recorded(case: dict[str, str]) -> None:
    document, names = case["document"].encode(), vectors("state_documents", "tensors")
    tensors = {name: Tensor(name) for name in names}
    tree = read_state(document, tensors)
    again = state_document(tree, tensor_name=lambda value: value.name if isinstance(value, Tensor) else None)
    assert again == document
    assert independent_state_document.read_state_document(document, names) == json.loads(document)


@pytest.mark.parametrize("case", vectors("state_documents", "refused"), ids=labels("state_documents", "refused"))
def test_a_bad_state_document_is_refused(case: dict[str, str]) -> None:
    document, names = case["document"].encode(), vectors("state_documents", "tensors")
    with pytest.raises(InvalidManifest):
        read_state(document, {name: Tensor(name) for name in names})
    with pytest.raises(Refused):
        independent_state_document.read_state_document(document, names)


def test_every_form_of_a_state_document_has_a_vector() -> None:
    forms = set(re.findall(r"`\{\"(\$[a-z]+)\"", make_vectors.PAGE.read_text(encoding="utf-8")))
    written = "".join(case["document"] for case in vectors("state_documents", "cases"))
    assert forms == set(re.findall(r'"(\$[a-z]+)":', written))
    assert forms == set(re.findall(r'"(\$[a-z]+)"', str(state_document_module.__doc__)))


# ---------------------------------------------------------------- content digests


@pytest.mark.parametrize("case", vectors("content"), ids=lambda case: case["what"].replace(" ", "-"))
def test_a_content_digest_is_as_recorded(case: dict[str, Any]) -> None:
    config = None if case["config"] is None else adapter_config(case["config"])
    parts = {
        role: (
            Layout(tuple(TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape, _ in rows)),
            [digest for *_, digest in rows],
        )
        for role, rows in case["components"].items()
    }
    targets = targets_of(parts["adapter"][0], config)[0] if "adapter" in parts else ()
    assert content_digest(parts, config, targets) == case["digest"]
    if config is not None:
        assert canonical_config(config) == case["canonical_config"]

    document = independent_content.content_document(
        "adapter" if "adapter" in parts else "base",
        {role: ([(s.name, s.dtype, s.shape) for s in layout], digests) for role, (layout, digests) in parts.items()},
        case["canonical_config"],
    )
    assert document is not None, "docs/format.md has the rules for all of these"
    assert sha256_hex(independent_documents.canonical(document)) == case["digest"]


def test_content_digests_are_equal_just_where_the_vectors_say_so() -> None:
    cases = vectors("content")
    for one in cases:
        for other in cases:
            same = one is other or (one["same"] != "" and one["same"] == other["same"])
            assert (one["digest"] == other["digest"]) == same, (one["what"], other["what"])


# ---------------------------------------------------------------- references and events


@pytest.mark.parametrize("case", vectors("references", "valid"), ids=lambda case: case["text"][:60])
def test_a_reference_is_read_as_recorded(case: dict[str, Any]) -> None:
    found = parse_reference(case["text"])
    moment = None if found.moment is None else found.moment.isoformat()
    fields = {"namespace": found.namespace, "name": found.name, "tag": found.tag, "number": found.number}
    assert {"text": case["text"], **fields, "digest": found.digest, "moment": moment} == case
    assert parse_reference(str(found)) == found
    assert {"text": case["text"], **independent_documents.parse_reference(case["text"])} == case


@pytest.mark.parametrize("case", vectors("references", "invalid"), ids=labels("references", "invalid"))
def test_a_bad_reference_is_refused_in_one_line(case: dict[str, str]) -> None:
    with pytest.raises(InvalidReference) as caught:
        parse_reference(case["text"])
    assert str(caught.value).isprintable(), "one line, and nothing that a terminal obeys"
    assert len(str(caught.value)) < 400
    with pytest.raises(Refused):
        independent_documents.parse_reference(case["text"])


@pytest.mark.parametrize("case", vectors("references", "not_to_push_to"), ids=labels("references", "not_to_push_to"))
def test_a_push_to_anything_but_a_name_and_a_tag_is_refused(case: dict[str, str]) -> None:
    parse_reference(case["text"])
    with pytest.raises(InvalidReference):
        parse_push_target(case["text"])


@pytest.mark.parametrize("case", vectors("events"), ids=lambda case: case["event"]["kind"])
def test_an_event_is_written_as_recorded(case: dict[str, Any]) -> None:
    fields = {**case["event"], "at": datetime.fromisoformat(case["event"]["at"])}
    assert Event(**fields).document(REGISTRY_ID) == case["document"].encode()
    assert independent_documents.read_event(case["document"].encode())["payload"] == case["event"]["payload"]


def test_an_event_that_cannot_be_written_is_refused() -> None:
    event = Event("a", "b", 1, "note", 1, None, datetime.fromisoformat("2026-11-01T00:00Z"), "ada", {"text": "\ud800"})
    with pytest.raises(InvalidInput):
        event.document(REGISTRY_ID)
