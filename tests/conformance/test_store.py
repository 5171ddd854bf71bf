"""The committed store, and stores made by today's code, read without our code and without the database."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta
from hashlib import sha256
from pathlib import Path

import pytest
import torch

from registry import Registry
from registry.catalog.contents import StoredComponent, StoredFile
from registry.core.canonical_json import parse_json
from registry.core.event import Event
from registry.core.layout import Layout
from registry.core.manifest import Manifest
from registry.core.placement import ROLES, Placement
from registry.core.state_document import read_state
from registry.operations.reading import BlobReader, file_bytes
from registry.store import open_store
from tests.conformance.catalog_state import catalog_state
from tests.conformance.damage import (
    COMMITTED,
    EVENTS,
    PURGED,
    ROOT,
    blob,
    blob_path,
    pushes,
    read,
)
from tests.conformance.independent_reader import Report, check_store
from tests.vectors.make_vectors import HERE
from tests.vectors.sample_store import START, Clock, Ticking, fill, lora_tensors
from tests.vectors.tensor_bytes import safetensors_file

# ---------------------------------------------------------------- what is there


def test_the_reader_needs_nothing_but_the_standard_library_and_blake3() -> None:
    program = (
        "import sys; from pathlib import Path; from tests.conformance.independent_reader import check_store; "
        "print(check_store(Path(sys.argv[1])).problems, "
        "sorted({name.partition('.')[0] for name in sys.modules} - sys.stdlib_module_names - set(sys.argv[2:])))"
    )
    command = [sys.executable, "-c", program, str(COMMITTED)]
    bare = subprocess.run(
        [sys.executable, "-c", "import sys; print(*{name.partition('.')[0] for name in sys.modules})"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    # Less what an interpreter of this environment loads by itself (.pth files of editable installs).
    done = subprocess.run([*command, *bare.stdout.split()], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[] ['blake3', 'tests']\n"


def test_the_committed_store_says_what_its_database_said() -> None:
    report = check_store(COMMITTED)
    state = json.loads((HERE / "store_state.json").read_bytes())
    assert report == Report(state, not_recomputed=["walk/full@3"])


def test_the_committed_store_has_every_kind_of_event_and_blob() -> None:
    events = [json.loads(read(path)) for path in EVENTS]
    kinds = """pushed described tag_moved tag_protected tag_unprotected tag_deleted metadata metrics note removed
        restored purged"""
    assert {event["kind"] for event in events} == set(kinds.split())
    placements = [event["payload"]["placement"] for event in events if event["kind"] == "pushed"]
    roles = {role for placement in placements for _, role in placement["blobs"]}
    assert roles == set(ROLES)
    files = [file for placement in placements for file in placement["files"].values()]
    assert {(whole, len(splices)) for _, whole, *splices in files} == {(True, 0), (False, 0), (False, 1)}
    manifests = [json.loads(blob(event["payload"]["manifest"])) for event in events if event["kind"] == "pushed"]
    parts = [part for manifest in manifests for part in manifest["components"].values()]
    assert {(bool(part["tensors"]), "data" in part) for part in parts} == {(True, False), (True, True), (False, True)}
    assert {bool(manifest["config"]) for manifest in manifests if manifest["kind"] == "checkpoint"} == {True, False}
    assert {one for event in events for one in event["payload"].get("nonfinite", ())} == {
        "adapter",
        "model",
        "optimizer",
    }


def test_todays_code_reads_every_layout_manifest_and_placement_of_it() -> None:
    for path in pushes():
        payload = json.loads(read(path))["payload"]
        placement = Placement.from_json(payload["placement"])
        assert placement.to_json() == payload["placement"]
        manifest = Manifest.from_document(blob(payload["manifest"]))
        assert manifest.digest == payload["manifest"]
        for part in manifest.components:
            layout = Layout.from_document(blob(part.layout))
            assert layout.digest == part.layout
            assert len(layout) == len(part.tensors) == len(placement.components[part.role])


def test_todays_code_rebuilds_every_file_of_it() -> None:
    store = open_store(COMMITTED)
    rebuilt = 0
    for path in pushes():
        payload = json.loads(read(path))["payload"]
        placement = Placement.from_json(payload["placement"])
        manifest = Manifest.from_document(blob(payload["manifest"]))
        components = {
            part.role: StoredComponent(
                part.role,
                Layout.from_document(blob(part.layout)),
                part.tensors,
                tuple((placement.blobs[position][0], ordinal) for position, ordinal in placement.components[part.role]),
            )
            for part in manifest.components
        }
        for file in manifest.files:
            where = placement.files[file.path]
            its_blob = placement.blobs[where.blob][0]
            stored = StoredFile(file.path, file.sha256, file.size, file.component, its_blob, where.whole, where.splices)
            if not blob_path(COMMITTED, its_blob).exists():
                assert dict(placement.blobs)[its_blob] == "external" or path == PURGED
                continue
            with BlobReader(store.blobs) as reader:
                data = b"".join(file_bytes(reader, store.blobs, stored, components))
            assert (sha256(data).hexdigest(), len(data)) == (file.sha256, file.size)
            rebuilt += not where.whole
    assert rebuilt == 6, "files that are a skeleton and tensors of other blobs"


def test_todays_code_reads_every_state_document_of_it() -> None:
    read_documents = 0
    for path in pushes():
        manifest = Manifest.from_document(blob(json.loads(read(path))["payload"]["manifest"]))
        for part in manifest.components:
            if part.data is not None:
                names = [spec.name for spec in Layout.from_document(blob(part.layout))]
                assert isinstance(read_state(blob(part.data), dict.fromkeys(names)), dict)
                read_documents += 1
    assert read_documents == 3


def test_todays_code_writes_the_events_of_it_again_byte_for_byte() -> None:
    for path in EVENTS:
        tree = parse_json(read(path))
        fields = {name: value for name, value in tree.items() if name not in ("format", "registry", "at", "sha256")}
        event = Event(**fields, at=datetime.fromisoformat(tree["at"]))
        assert event.document(tree["registry"]) == read(path)


# ---------------------------------------------------------------- stores made today


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry.init(tmp_path / "registry") as made:
        yield made


def same_as_the_catalog(registry: Registry, folder: Path) -> Report:
    report = check_store(folder)
    assert report.problems == []
    assert report.state == catalog_state(registry)
    return report


def test_an_empty_store_has_nothing_wrong(registry: Registry, tmp_path: Path) -> None:
    assert same_as_the_catalog(registry, tmp_path / "registry").orphans == []


def test_a_store_made_now_says_what_its_catalog_says(registry: Registry, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    fill(Ticking(registry, Clock()), work, Clock())
    report = same_as_the_catalog(registry, tmp_path / "registry")
    assert (report.orphans, report.not_recomputed) == ([], ["walk/full@3"])
    assert {name: len(one["versions"]) for name, one in report.state["names"].items()} == {
        name: len(one["versions"]) for name, one in check_store(COMMITTED).state["names"].items()
    }


def test_live_models_say_the_same_in_store_and_catalog(registry: Registry, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(20, 16), torch.nn.Linear(16, 16), torch.nn.Linear(16, 4))
    registry.push(model, "live/base:v1", metrics={"loss": 0.5})
    wrapped = get_peft_model(
        model,
        LoraConfig(
            r=4,
            lora_alpha=3,
            use_rslora=True,
            use_dora=True,
            target_modules=["1", "0"],
            modules_to_save=["2"],
            alpha_pattern={"1": 6},
            rank_pattern={"1": 2},
        ),
    )
    live = registry.push(wrapped, "live/lora", base="live/base:v1")
    wrapped.save_pretrained(tmp_path / "folder")
    folder = registry.push(tmp_path / "folder", "live/lora", base="live/base:v1")
    assert folder.same_content_as == live.version
    registry.push(wrapped, "live/full", kind="checkpoint", base="live/base:v1")
    registry.push(
        {
            "strided": torch.arange(12.0).reshape(3, 4).t(),
            "tied": torch.arange(12.0).reshape(3, 4),
            "half": torch.ones(3, dtype=torch.bfloat16),
            "eight": torch.ones(2, 2).to(torch.float8_e4m3fn),
            "flag": torch.tensor([True, False]),
            "scalar": torch.tensor(3),
            "none": torch.empty(0, 5),
            "complex": torch.tensor([1 + 2j]),
        },
        "live/dtypes",
    )
    report = same_as_the_catalog(registry, tmp_path / "registry")
    assert report.not_recomputed == ["live/full@1"], "the page has the rules for all others"


def test_an_interrupted_journal_is_whole_again_after_the_next_opening(tmp_path: Path) -> None:
    with Registry.init(tmp_path / "registry") as registry, pytest.MonkeyPatch.context() as patch:
        registry.push({"a": torch.arange(8.0)}, "crash/base")

        def crash(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(type(registry._context), "journal", crash)
        with pytest.raises(KeyboardInterrupt):
            # 2**60 and 1e20 are integers in JSON, and doubles to every reader.
            registry.annotate("crash/base", metadata={"seed": 2**60}, metrics={"big": 1e20, "nan": float("nan")})
        assert check_store(tmp_path / "registry").state != catalog_state(registry)
    with Registry.open(tmp_path / "registry") as registry:
        same_as_the_catalog(registry, tmp_path / "registry")


def test_a_version_is_as_old_as_its_event_when_the_clock_goes_back(registry: Registry, tmp_path: Path) -> None:
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("registry.operations.context.datetime", clock)
        registry.push({"a": torch.arange(8.0)}, "clock/back:first")
        clock.tick(-3600)
        registry.push({"a": torch.arange(9.0)}, "clock/back:first")
    assert {version.created_at for version in registry.find()} == {START}
    same_as_the_catalog(registry, tmp_path / "registry")


def test_a_parent_is_named_where_several_names_have_its_manifest(registry: Registry, tmp_path: Path) -> None:
    base = {"a": torch.arange(8.0)}
    registry.push(base, "one/base")
    registry.push(base, "two/base")
    registry.push({"a": torch.arange(9.0)}, "one/child", base="two/base")
    state = same_as_the_catalog(registry, tmp_path / "registry").state
    assert state["names"]["one/child"]["versions"]["1"]["base"] == "two/base@1"


def test_removed_restored_and_purged_versions_say_the_same_in_store_and_catalog(
    registry: Registry, tmp_path: Path
) -> None:
    registry.push({"a": torch.arange(800.0), "b": torch.ones(700)}, "gone/base")
    for number in range(4):
        registry.push(
            {"a": torch.arange(800.0), "b": torch.full((600,), float(number))}, "gone/child", base="gone/base"
        )
    registry.push({"c": torch.ones(3)}, "gone/whole:kept")
    registry.remove("gone/child@2", "gone/child@4", "gone/whole", why="by mistake")
    registry.restore("gone/child@2")
    same_as_the_catalog(registry, tmp_path / "registry")
    freed = registry.gc(grace=timedelta(0))
    assert freed.purged == ("gone/child@4", "gone/whole@1")
    report = same_as_the_catalog(registry, tmp_path / "registry")
    assert report.state["names"]["gone/child"]["latest"] == 3
    assert report.orphans == []


def test_the_sample_files_are_safetensors_that_others_read(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    path = tmp_path / "sample.safetensors"
    path.write_bytes(safetensors_file(lora_tensors("first"), {"format": "pt"}, reverse=True))
    assert len(load_file(path)) == 4
