"""The committed store, and ways to damage a copy of it: bytes, events, manifests that lie."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from registry.core.canonical_json import canonical_json, parse_json
from registry.core.event import Event
from tests.conformance.independent_content import content_document
from tests.conformance.independent_documents import canonical, read_layout
from tests.conformance.independent_reader import check_store
from tests.vectors.make_vectors import HERE
from tests.vectors.sample_store import REGISTRY_ID

ROOT = HERE.parents[1]
COMMITTED = HERE / "store"
BLOBS = sorted(path.relative_to(COMMITTED) for path in COMMITTED.glob("blobs/sha256/*/*"))
EVENTS = sorted(path.relative_to(COMMITTED) for path in COMMITTED.glob("journal/*/*/*.json"))
NEAR = "03cb1058ced591ca0cd2856ecda8b1d0fb77ba318a41bb95cf5b796893960f15"
"""A blob that a version recorded as external, and that is there."""
FULL = Path("journal/walk/full/1.json")
RUN = Path("journal/walk/run/1.json")
FAR = Path("journal/walk/far/1.json")
APART = Path("journal/walk/far/3.json")
PERTURB = Path("journal/walk/perturb")
PURGED = Path("journal/walk/gone/4.json")


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


def append(store: Path, name: str, kind: str, version: int, payload: dict[str, Any]) -> None:
    """Says one more thing of a version, as the next event of its name."""
    namespace, _, short = name.partition("/")
    seq = 1 + len([*(store / "journal" / name).iterdir()])
    at = datetime.fromisoformat("2027-01-01T00:00:00+00:00")
    event = Event(namespace, short, seq, kind, version, None, at, "ada", payload)
    write(store / "journal" / name / f"{seq}.json", event.document(REGISTRY_ID))


def pushes(name: str = "*/*") -> list[Path]:
    return [path for path in EVENTS if path.match(f"{name}/*.json") and b'"kind":"pushed"' in read(path)]


def read(path: Path) -> bytes:
    return (COMMITTED / path).read_bytes()


def blob_path(folder: Path, digest: str) -> Path:
    return folder / "blobs" / "sha256" / digest[:2] / digest


def blob(digest: str) -> bytes:
    return blob_path(COMMITTED, digest).read_bytes()


def swap(items: Any, one: Any, other: Any) -> None:
    items[one], items[other] = items[other], items[one]


def placement_of(tree: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = tree["payload"]["placement"]
    return found


def put(store: Path, data: bytes) -> str:
    """Puts a blob into the store; its digest."""
    digest = sha256(data).hexdigest()
    write(blob_path(store, digest), data)
    return digest


def lie(store: Path, name: str, change: Callable[[dict[str, Any]], object]) -> list[str]:
    """Changes the manifest of a name's first version, and all that has to agree with it; the problems then."""

    def agree(tree: dict[str, Any]) -> None:
        payload = tree["payload"]
        manifest = json.loads(blob(payload["manifest"]))
        change(manifest)
        digest = put(store, canonical_json(manifest, "manifest"))
        parts = {
            role: (read_layout(blob_path(store, part["layout"]).read_bytes()), part["tensors"])
            for role, part in manifest["components"].items()
        }
        content = content_document(manifest["kind"], parts, manifest["config"])
        payload["manifest"] = digest
        payload["content"] = sha256(canonical(content)).hexdigest()
        blobs = payload["placement"]["blobs"]
        blobs[:] = [[digest if role == "manifest" else one, role] for one, role in blobs]
        there = {one for one, _ in blobs}
        data = [part["data"] for part in manifest["components"].values() if "data" in part]
        blobs.extend([one, "data"] for one in dict.fromkeys(data) if one not in there)

    change_event(store / "journal" / name / "1.json", agree)
    return check_store(store).problems
