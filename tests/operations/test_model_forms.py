"""A version knows its model: by the document that describes it, else by its layout under its live names; and a catalog
that is made again knows the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from registry import Registry
from registry.catalog.dump import differences, dump
from registry.catalog.forms import form_of_version
from registry.catalog.versions import resolve
from registry.core.canonical_json import canonical_json
from registry.core.errors import InvalidInput
from registry.core.model_form import ROLE, ModelForm, Module, Parameter
from registry.core.reference import parse_reference
from registry.formats.source import Source
from registry.operations.push import push
from registry.operations.push_request import check_request
from tests.failures.support import peft_folder
from tests.operations.test_skeletons import Mixed

FORM = ModelForm(
    (Module("q", "linear", "Linear", 64, 64, bias=False, parameters=(Parameter("weight", "F32", (64, 64)),)),),
    class_name="models.Walker",
    source={"models.Walker": "ab" * 32},
)
MODEL = {"saved.weight": torch.ones(8, 4), "saved.bias": torch.ones(8), "norm.weight": torch.ones(4)}


def live_names(**renamed: str) -> bytes:
    part = {"renamed": renamed, "converted": [], "tied": {}}
    return canonical_json({"format": 1, "components": {"model": part}}, "a map")


def push_model(registry: Registry, name: str, **described: bytes) -> None:
    file = Mixed("model.safetensors", {"model": MODEL})
    with Source("checkpoint", "checkpoint", (file,), described=described) as source:
        push(registry._context, source, check_request(name, kind="checkpoint"))


def form_of(registry: Registry, reference: str) -> ModelForm | None:
    with registry._context.reading() as connection:
        found = form_of_version(connection, resolve(connection, parse_reference(reference)).id)
    return None if found is None else found[1]


def assert_rebuilt_the_same(registry: Registry, root: Path) -> None:
    with registry._context.reading() as connection:
        before = dump(connection)
    assert Registry.fsck(root).problems == ()
    registry.close()
    (root / "catalog.sqlite").unlink()
    Registry.reindex(root)
    with Registry.open(root) as again, again._context.reading() as connection:
        after = dump(connection)
    assert list(differences(before, after)) == []
    assert {key: row["architecture_id"] for key, row in before["version"].items()} == {
        key: row["architecture_id"] for key, row in after["version"].items()
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "registry"


def test_forms_follow_from_what_was_pushed_and_are_rebuilt(root: Path, tmp_path: Path) -> None:
    registry = Registry.init(root)
    base = tmp_path / "base.safetensors"
    base.write_bytes(save(MODEL))
    registry.push(base, "a/base")
    push_model(registry, "a/live", live_names=live_names(**{"saved.weight": "body.q.weight"}))
    push_model(registry, "a/described", **{ROLE: FORM.document})
    registry.push(peft_folder(tmp_path / "adapter"), "a/adapter")
    by_names = form_of(registry, "a/base")
    assert by_names is not None
    assert {one.path: one.kind for one in by_names.modules} == {"saved": "matrix", "norm": "other"}
    live = form_of(registry, "a/live")
    assert live is not None
    assert "body.q" in live.by_path
    assert form_of(registry, "a/described") == FORM
    assert form_of(registry, "a/adapter") is None
    assert_rebuilt_the_same(registry, root)


def test_a_form_that_is_described_later_takes_the_place_of_the_first(root: Path) -> None:
    registry = Registry.init(root)
    push_model(registry, "a/model")
    first = form_of(registry, "a/model")
    push_model(registry, "a/model", live_names=live_names(**{"saved.weight": "body.q.weight"}))
    second = form_of(registry, "a/model")
    push_model(registry, "a/model", **{ROLE: FORM.document})
    assert len({first.digest if first else None, second.digest if second else None, FORM.digest}) == 3
    assert form_of(registry, "a/model") == FORM
    push_model(registry, "a/model", **{ROLE: ModelForm(()).document})
    assert form_of(registry, "a/model") == FORM
    assert_rebuilt_the_same(registry, root)


@pytest.mark.parametrize("document", [b"{}", b"no json", FORM.document.replace(b'"format":1', b'"format":2')])
def test_a_form_that_cannot_be_read_is_refused(root: Path, document: bytes) -> None:
    registry = Registry.init(root)
    with pytest.raises(InvalidInput, match="modules"):
        push_model(registry, "a/model", **{ROLE: document})
    assert registry.find() == []


@pytest.mark.parametrize("document", [b"no json", b'{"components":{"model":{"renamed":7}}}', b"[]"])
def test_a_map_of_live_names_that_leads_nowhere_leaves_the_saved_names(root: Path, document: bytes) -> None:
    registry = Registry.init(root)
    push_model(registry, "a/model", live_names=document)
    found = form_of(registry, "a/model")
    assert found is not None
    assert set(found.by_path) == {"saved", "norm"}
    assert_rebuilt_the_same(registry, root)


def test_a_catalog_of_an_older_program_is_whole_without_forms(root: Path) -> None:
    registry = Registry.init(root)
    push_model(registry, "a/model")
    with registry._context.writing() as connection:
        connection.exec_driver_sql("UPDATE version SET architecture_id = NULL")
        connection.exec_driver_sql("DELETE FROM module")
        connection.exec_driver_sql("DELETE FROM architecture")
    registry.close()
    assert Registry.fsck(root).problems == ()
    with Registry.open(root) as opened:
        assert form_of(opened, "a/model") is None


def test_a_document_that_was_damaged_leaves_the_version_without_a_form(root: Path) -> None:
    registry = Registry.init(root)
    push_model(registry, "a/model", **{ROLE: FORM.document})
    digest = registry.events("a/model")[1].payload["blobs"][ROLE]
    registry.close()
    path = root / "blobs" / "sha256" / digest[:2] / digest
    path.chmod(0o644)
    path.write_bytes(FORM.document.replace(b'"format":1', b'"format":2'))
    (root / "catalog.sqlite").unlink()
    done = Registry.reindex(root)
    assert (done.versions, [one for one, _ in done.unreadable]) == (1, [digest])
    with Registry.open(root) as opened:
        assert form_of(opened, "a/model") is None
