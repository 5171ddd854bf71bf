"""The committed store, and stores made by today's code, read without our code and without the database."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from registry import Registry
from registry.catalog.contents import StoredComponent, StoredFile
from registry.core.canonical_json import canonical_json, parse_json
from registry.core.event import Event
from registry.core.layout import Layout
from registry.core.manifest import Manifest
from registry.core.placement import Placement
from registry.operations.reading import BlobReader, file_bytes
from registry.store import open_store
from tests.conformance.catalog_state import catalog_state
from tests.conformance.independent_reader import Report, check_store
from tests.vectors.make_vectors import HERE
from tests.vectors.sample_store import START, Clock, Ticking, fill, lora_tensors, safetensors_file

ROOT = HERE.parents[1]
COMMITTED = HERE / "store"
BLOBS = sorted(path.relative_to(COMMITTED) for path in COMMITTED.glob("blobs/sha256/*/*"))
EVENTS = sorted(path.relative_to(COMMITTED) for path in COMMITTED.glob("journal/*/*/*.json"))


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(COMMITTED, tmp_path_factory.mktemp("template") / "store"))


@pytest.fixture
def store(template: Path, tmp_path: Path) -> Path:
    """The committed store, to be damaged by `write` alone: its files are linked to those of other tests."""
    return Path(shutil.copytree(template, tmp_path / "store", copy_function=os.link))


def write(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def change_event(path: Path, change: Callable[[dict[str, Any]], object], *, signed: bool = True) -> None:
    """Changes an event and writes it as canonically as before, with its `sha256` corrected unless told otherwise."""
    tree = parse_json(path.read_bytes())
    change(tree)
    if signed:
        rest = {name: value for name, value in tree.items() if name != "sha256"}
        tree["sha256"] = sha256(canonical_json(rest, "event")).hexdigest()
    write(path, canonical_json(tree, "event"))


def pushes(name: str = "*/*") -> list[Path]:
    return [path for path in EVENTS if path.match(f"{name}/*.json") and b'"kind":"pushed"' in read(path)]


def read(path: Path) -> bytes:
    return (COMMITTED / path).read_bytes()


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
    assert report == Report(json.loads((HERE / "store_state.json").read_bytes()))


def test_the_committed_store_has_every_kind_of_event_and_blob() -> None:
    events = [json.loads(read(path)) for path in EVENTS]
    kinds = "pushed tag_moved tag_protected tag_unprotected tag_deleted metadata metrics note"
    assert {event["kind"] for event in events} == set(kinds.split())
    placements = [event["payload"]["placement"] for event in events if event["kind"] == "pushed"]
    roles = {role for placement in placements for _, role in placement["blobs"]}
    assert roles == {"tensors", "reused", "header", "file", "layout", "manifest"}
    assert {whole for placement in placements for _, whole in placement["files"].values()} == {True, False}


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


def blob(digest: str) -> bytes:
    return (COMMITTED / "blobs" / "sha256" / digest[:2] / digest).read_bytes()


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
            stored = StoredFile(file.path, file.sha256, file.size, file.component, its_blob, where.whole)
            with BlobReader(store.blobs) as reader:
                data = b"".join(file_bytes(reader, store.blobs, stored, components))
            assert (sha256(data).hexdigest(), len(data)) == (file.sha256, file.size)
            rebuilt += not where.whole
    assert rebuilt == 4, "files that are a header and tensors of other blobs"


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
    assert (report.orphans, report.not_recomputed) == ([], [])
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
    assert report.not_recomputed == [], "the page has the rules for all of these"


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


# ---------------------------------------------------------------- versions that go and come back


def add_event(store: Path, name: str, kind: str, payload: dict[str, Any], number: int = 1) -> None:
    """One more event of a name of the committed store."""
    folder = store / "journal" / name
    last = max(folder.iterdir(), key=lambda path: int(path.stem))
    tree = parse_json(last.read_bytes())
    seq = tree["seq"] + 1
    write(folder / f"{seq}.json", last.read_bytes())
    change_event(
        folder / f"{seq}.json",
        lambda tree: tree.update(seq=seq, kind=kind, version=number, tag=None, payload=payload),
    )


REMOVED, PURGED = ("removed", {"why": None}), ("purged", {"bytes": 0})
RESTORED = ("restored", {"why": None, "placement": None})


@pytest.mark.parametrize(
    "events",
    [
        [RESTORED],
        [PURGED],
        [REMOVED, REMOVED],
        [REMOVED, PURGED, RESTORED],
        [REMOVED, PURGED, PURGED],
        [("removed", {})],
        [("removed", {"why": 3})],
        [REMOVED, ("restored", {"why": None})],
        [REMOVED, ("purged", {"bytes": "many"})],
    ],
)
def test_what_does_not_follow_from_the_state_before_is_refused(
    store: Path, events: list[tuple[str, dict[str, Any]]]
) -> None:
    for kind, payload in events:
        add_event(store, "walk/bare", kind, payload)
    (problem,) = check_store(store).problems
    assert problem.startswith(f"walk/bare: event {1 + len(events)}: ")


def test_a_version_that_is_present_came_from_what_is_present(store: Path) -> None:
    add_event(store, "walk/base", *REMOVED)
    assert any("its parent walk/base@1 is removed" in problem for problem in check_store(store).problems)


def test_only_the_manifest_and_the_layouts_of_a_purged_version_have_to_be_there(store: Path) -> None:
    [pushed] = pushes("walk/bare")
    payload = json.loads(read(pushed))["payload"]
    add_event(store, "walk/bare", *REMOVED)
    assert check_store(store).problems == []
    assert "walk/bare" not in check_store(store).state["names"]
    needed = {digest for path in pushes() if path != pushed for digest, _ in placed(path)["blobs"]}
    own = [digest for digest, role in payload["placement"]["blobs"] if role == "tensors" and digest not in needed]
    assert own
    for digest in own:
        (store / "blobs" / "sha256" / digest[:2] / digest).unlink()
    assert check_store(store).problems
    add_event(store, "walk/bare", *PURGED)
    assert check_store(store).problems == []
    (store / "blobs" / "sha256" / payload["manifest"][:2] / payload["manifest"]).unlink()
    assert check_store(store).problems


def placed(path: Path) -> Any:
    return json.loads(read(path))["payload"]["placement"]


def test_a_purged_version_comes_back_with_a_placement_of_its_own(store: Path) -> None:
    [pushed] = pushes("walk/bare")
    for kind, payload in (REMOVED, PURGED, ("restored", {"why": None, "placement": placed(pushed)})):
        add_event(store, "walk/bare", kind, payload)
    report = check_store(store)
    assert report.problems == []
    assert report.state["names"]["walk/bare"]["latest"] == 1


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("path", BLOBS, ids=lambda path: path.name[:8])
def test_a_flipped_bit_in_any_blob_is_noticed(store: Path, path: Path) -> None:
    good = (store / path).read_bytes()
    for place in {0, 8, len(good) // 2, len(good) - 1}:
        bad = bytearray(good)
        bad[place] ^= 1 << (place % 8)
        write(store / path, bytes(bad))
        assert any(path.name in problem for problem in check_store(store).problems)


@pytest.mark.parametrize("path", BLOBS, ids=lambda path: path.name[:8])
def test_a_missing_or_shortened_blob_is_noticed(store: Path, path: Path) -> None:
    good = (store / path).read_bytes()
    write(store / path, good[:-1])
    assert check_store(store).problems
    (store / path).unlink()
    assert any(path.name in problem for problem in check_store(store).problems)


def test_a_link_or_a_folder_in_the_place_of_a_blob_is_noticed(store: Path, tmp_path: Path) -> None:
    path = store / BLOBS[0]
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert check_store(store).problems
    path.unlink()
    path.mkdir()
    assert check_store(store).problems


@pytest.mark.parametrize("path", EVENTS, ids=lambda path: "-".join(path.parts[1:])[:-5])
def test_a_flipped_bit_anywhere_in_an_event_is_noticed(store: Path, path: Path) -> None:
    good = (store / path).read_bytes()
    for place in range(0, len(good), 1 + len(good) // 8):
        bad = bytearray(good)
        bad[place] ^= 1 << (place % 7)
        write(store / path, bytes(bad))
        assert check_store(store).problems, f"byte {place}"


@pytest.mark.parametrize("path", EVENTS, ids=lambda path: "-".join(path.parts[1:])[:-5])
def test_a_changed_event_is_noticed_however_well_it_is_written(store: Path, path: Path) -> None:
    change_event(store / path, lambda tree: tree.update(actor="eve"), signed=False)
    (problem,) = check_store(store).problems[:1]
    assert "sha256" in problem


def newest(path: Path) -> bool:
    return not (COMMITTED / path).with_name(f"{int(path.stem) + 1}.json").exists()


@pytest.mark.parametrize(
    "path", [path for path in EVENTS if not newest(path)], ids=lambda path: "-".join(path.parts[1:])[:-5]
)
def test_a_missing_event_is_noticed(store: Path, path: Path) -> None:
    (store / path).unlink()
    assert any("missing" in problem for problem in check_store(store).problems)


@pytest.mark.parametrize(
    "path", [path for path in EVENTS if newest(path)], ids=lambda path: "-".join(path.parts[1:])[:-5]
)
def test_the_newest_event_of_a_name_is_missed_by_the_database_or_by_a_blob(store: Path, path: Path) -> None:
    # What docs/format.md says of it: the store alone need not show that its newest event is lost.
    (store / path).unlink()
    report = check_store(store)
    assert report.state != json.loads((HERE / "store_state.json").read_bytes())
    shared = path == Path("journal/team/walker/1.json")  # all of its blobs belong to walk/base@1 as well
    if path in pushes() and not shared:
        assert report.orphans


def test_blobs_that_nobody_names_are_reported_and_no_error(store: Path) -> None:
    data = b"left by a crash"
    digest = sha256(data).hexdigest()
    write(store / "blobs" / "sha256" / digest[:2] / digest, data)
    write(store / "tmp" / "0123.tmp", b"half of a")
    write(store / "catalog.sqlite", b"not ours")
    write(store / "journal" / "Not-a-name" / "x" / "1.json", b"{}")
    report = check_store(store)
    assert (report.problems, report.orphans) == ([], [digest])


FULL = Path("journal/walk/full/1.json")
PERTURB = Path("journal/walk/perturb")


def swap(items: Any, one: Any, other: Any) -> None:
    items[one], items[other] = items[other], items[one]


def placement_of(tree: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = tree["payload"]["placement"]
    return found


@pytest.mark.parametrize(
    "change",
    [
        lambda p: swap(p["components"]["model"], 0, 2),  # two tensors of one shape
        lambda p: swap(p["components"]["model"], 0, 1),
        lambda p: swap(p["blobs"], 0, 1),
        lambda p: swap(p["blobs"], 2, 3),
        lambda p: p["files"].update({"full.safetensors": [1, True]}),
        lambda p: p["files"].update({"full.safetensors": [2, True]}),
        lambda p: p["files"].update({"full.safetensors": [3, False]}),
        lambda p: p["files"].clear(),
        lambda p: p["components"]["model"].pop(),
        lambda p: p["components"]["model"].append([1, 7, 1]),
        lambda p: p["components"]["model"].__setitem__(-1, [1, 8, 1]),
        lambda p: p["components"].update(ema=[]),
        lambda p: p["blobs"].pop(),
    ],
)
def test_a_placement_that_points_elsewhere_is_noticed(store: Path, change: Callable[[dict[str, Any]], None]) -> None:
    change_event(store / FULL, lambda tree: change(placement_of(tree)))
    assert any("walk/full" in problem for problem in check_store(store).problems)


def test_placements_of_two_versions_that_are_swapped_are_noticed(store: Path) -> None:
    one, other = PERTURB / "1.json", PERTURB / "8.json"
    trees = [json.loads(read(path))["payload"]["placement"] for path in (one, other)]
    change_event(store / one, lambda tree: tree["payload"].update(placement=trees[1]))
    change_event(store / other, lambda tree: tree["payload"].update(placement=trees[0]))
    assert any("walk/perturb" in problem for problem in check_store(store).problems)


def test_a_tensor_that_lies_twice_may_be_placed_at_either(store: Path) -> None:
    # lm_head is embed: what the placement says is proven by the digest, so both ways are right.
    change_event(store / FULL, lambda tree: swap(placement_of(tree)["components"]["model"], 4, 5))
    assert check_store(store).problems == []


@pytest.mark.parametrize(
    ("path", "change"),
    [
        (PERTURB / "2.json", lambda tree: tree.update(format=2)),
        (PERTURB / "2.json", lambda tree: tree.update(format=1.5)),
        (PERTURB / "2.json", lambda tree: tree.update(more=1)),
        (PERTURB / "2.json", lambda tree: tree.update(registry="f" * 32)),
        (PERTURB / "2.json", lambda tree: tree.update(name="base")),
        (PERTURB / "2.json", lambda tree: tree.update(seq=3)),
        (PERTURB / "2.json", lambda tree: tree.update(kind="applause")),
        (PERTURB / "2.json", lambda tree: tree.update(version=9)),
        (PERTURB / "2.json", lambda tree: tree.update(version=None)),
        (PERTURB / "2.json", lambda tree: tree.update(tag="prod")),
        (PERTURB / "2.json", lambda tree: tree.update(at="2026-11-01T11:59:59.000000Z")),
        (PERTURB / "2.json", lambda tree: tree.update(at="2026-11-01T12:00:04Z")),
        (PERTURB / "2.json", lambda tree: tree["payload"].update(seed="3")),
        (PERTURB / "3.json", lambda tree: tree["payload"]["values"].update(reward="nan")),
        (PERTURB / "3.json", lambda tree: tree["payload"].update(step=-1)),
        (PERTURB / "1.json", lambda tree: tree.update(version=2)),
        (PERTURB / "1.json", lambda tree: tree["payload"].update(base="walk/base@2")),
        (PERTURB / "1.json", lambda tree: tree["payload"].update(base=None)),
        (PERTURB / "1.json", lambda tree: tree["payload"].update(base="walk/nobody@1")),
        (PERTURB / "1.json", lambda tree: tree["payload"].update(base="walk/base:v1")),
        (PERTURB / "1.json", lambda tree: tree["payload"].update(content="0" * 64)),
        (PERTURB / "1.json", lambda tree: tree["payload"].update(manifest=tree["payload"]["content"])),
        (PERTURB / "8.json", lambda tree: tree["payload"].update(parents=["walk/perturb@2"])),
        (PERTURB / "8.json", lambda tree: tree["payload"].update(parents=["walk/perturb@3"])),
        (PERTURB / "8.json", lambda tree: tree["payload"].update(parents=[])),
        (PERTURB / "12.json", lambda tree: tree["payload"].update({"from": 2})),
        (PERTURB / "12.json", lambda tree: tree["payload"].update(to=2)),
        (PERTURB / "12.json", lambda tree: tree.update(tag="latest")),
        (PERTURB / "12.json", lambda tree: tree.update(tag="7")),
        (PERTURB / "13.json", lambda tree: tree.update(kind="tag_unprotected")),
        (PERTURB / "17.json", lambda tree: tree.update(tag="prod")),
        (PERTURB / "5.json", lambda tree: tree["payload"].update(text=None)),
    ],
)
def test_an_event_that_does_not_follow_is_noticed(
    store: Path, path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    change_event(store / path, change)
    assert any("walk/perturb" in problem for problem in check_store(store).problems)


def test_an_event_that_moves_to_another_place_is_noticed(store: Path) -> None:
    write(store / "journal" / "walk" / "tied" / "2.json", read(PERTURB / "2.json"))
    assert any("walk/tied event 2" in problem for problem in check_store(store).problems)


def test_a_store_of_another_format_is_refused(store: Path) -> None:
    for text in (
        '{"id":"0123456789abcdef0123456789abcdef","store_format":2}',
        '{"id":"0123456789abcdef0123456789abcdef","store_format":true}',
        '{"id":"0123","store_format":1}',
        '{"id":"0123456789abcdef0123456789abcdef"}',
        '{"id":"0123456789abcdef0123456789abcdef","store_format":1,"x":0}',
        "",
    ):
        write(store / "registry.json", text.encode())
        assert any("registry.json" in problem or "JSON" in problem for problem in check_store(store).problems), text


def test_a_manifest_that_lies_about_its_tensors_is_noticed(store: Path) -> None:
    """Everything is rewritten to agree with the lie, but for the tensors themselves."""
    path = store / "journal" / "walk" / "merged" / "1.json"
    payload = json.loads(path.read_bytes())["payload"]
    manifest = json.loads(blob(payload["manifest"]))
    tensors = manifest["components"]["adapter"]["tensors"]
    swap(tensors, 0, 2)
    document = canonical_json(manifest, "manifest")
    digest = sha256(document).hexdigest()
    write(store / "blobs" / "sha256" / digest[:2] / digest, document)

    def lie(tree: dict[str, Any]) -> None:
        tree["payload"]["manifest"] = digest
        blobs = tree["payload"]["placement"]["blobs"]
        blobs[:] = [[digest if role == "manifest" else one, role] for one, role in blobs]

    change_event(path, lie)
    assert any("another digest" in problem for problem in check_store(store).problems)


def test_the_sample_files_are_safetensors_that_others_read(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    path = tmp_path / "sample.safetensors"
    path.write_bytes(safetensors_file(lora_tensors("first"), {"format": "pt"}, reverse=True))
    assert len(load_file(path)) == 4
