"""Reads a store and proves all of it, from docs/format.md alone: the standard library and BLAKE3, nothing of ours.

`python -m tests.conformance.independent_reader STORE` prints the state that follows from the store, and every problem.
What it takes as it is: the content digest of adapters where docs/format.md leaves the rules to other code."""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

from tests.conformance.independent_content import content_document
from tests.conformance.independent_documents import (
    Refused,
    Spec,
    TensorFile,
    canonical,
    check_tag,
    is_digest,
    is_number,
    is_text,
    is_text_or_null,
    is_whole,
    length,
    members,
    name_parts,
    parse,
    parse_reference,
    read_event,
    read_header,
    read_layout,
    read_manifest,
    read_placement,
    require,
    tensor_digest,
)

NOT_FINITE = ("NaN", "Infinity", "-Infinity")


@dataclass
class Report:
    """What a store says, and what is wrong with it.

    Attributes:
        state: names with their versions, tags, metadata and metrics, as far as they could be read.
        orphans: blobs that no event names.
        not_recomputed: versions whose content digest was taken as it is.
    """

    state: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    not_recomputed: list[str] = field(default_factory=list)


def check_store(root: Path) -> Report:
    """Checks everything that docs/format.md lists under what a reader must refuse."""
    report = Report()
    reader = _Reader(root, report)
    try:
        reader.identity()
        reader.all_blobs()
        reader.all_names()
        reader.lineage()
    except Refused as refused:
        report.problems.append(str(refused))
    return report


def open_file(path: Path) -> BinaryIO:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise Refused(f"{path}: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Refused(f"{path}: not a regular file")
    return os.fdopen(descriptor, "rb")


def read_file(path: Path) -> bytes:
    with open_file(path) as file:
        return file.read()


class _Reader:
    def __init__(self, root: Path, report: Report) -> None:
        self.root = root
        self.report = report
        self.registry = ""
        self.good: set[str] = set()
        self.named: set[str] = set()
        self.tensor_files: dict[str, TensorFile] = {}
        self.proven: set[tuple[str, int, str]] = set()
        self.manifests: dict[str, str] = {}  # ns/name@number -> digest
        self.edges: list[tuple[str, str, str]] = []  # child, parent, digest that the child's manifest has
        self.absent: set[str] = set()  # ns/name@number of versions that are removed or purged

    def attempt(self, what: str, check: Callable[[], object]) -> bool:
        try:
            check()
        except Refused as refused:
            self.report.problems.append(f"{what}: {refused}")
            return False
        return True

    # ---- registry.json and blobs

    def identity(self) -> None:
        tree = members(parse(read_file(self.root / "registry.json")), "registry.json", "id store_format")
        require(type(tree["store_format"]) is int and tree["store_format"] == 1, "registry.json: not store_format 1")
        require(is_text(tree["id"]) and re.fullmatch("[0-9a-f]{32}", tree["id"]), "registry.json: id")
        self.registry = tree["id"]
        self.report.state = {"registry": self.registry, "names": {}}

    def blob_path(self, digest: str) -> Path:
        return self.root / "blobs" / "sha256" / digest[:2] / digest

    def all_blobs(self) -> None:
        folder = self.root / "blobs" / "sha256"
        for path in sorted(folder.glob("*/*")) if folder.is_dir() else ():
            if is_digest(path.name) and path.name[:2] == path.parent.name:
                self.attempt(f"blob {path.name}", lambda path=path: self.check_blob(path))

    def check_blob(self, path: Path) -> None:
        hasher = sha256()
        with open_file(path) as file:
            while chunk := file.read(1 << 20):
                hasher.update(chunk)
        require(hasher.hexdigest() == path.name, "its sha256 is not its name")
        self.good.add(path.name)

    def blob(self, digest: str) -> bytes:
        require(digest in self.good, f"blob {digest} is missing or damaged")
        return read_file(self.blob_path(digest))

    def tensor_file(self, digest: str) -> TensorFile:
        if digest not in self.tensor_files:
            require(digest in self.good, f"blob {digest} is missing or damaged")
            with open_file(self.blob_path(digest)) as file:
                first = file.read(8)
                found = read_header(first + file.read(min(int.from_bytes(first, "little"), 100_000_000)))
                require(os.fstat(file.fileno()).st_size == found.size, f"blob {digest}: header and length differ")
            self.tensor_files[digest] = found
        return self.tensor_files[digest]

    def tensor(self, digest: str, ordinal: int) -> tuple[Spec, bytes]:
        found = self.tensor_file(digest)
        require(ordinal < len(found.specs), f"blob {digest} has no tensor {ordinal}")
        with open_file(self.blob_path(digest)) as file:
            file.seek(found.head + found.begins[ordinal])
            return found.specs[ordinal], file.read(length(found.specs[ordinal]))

    # ---- the journal

    def all_names(self) -> None:
        folder = self.root / "journal"
        for path in sorted(folder.glob("*/*")) if folder.is_dir() else ():
            name = f"{path.parent.name}/{path.name}"
            try:
                name_parts(name)
            except Refused:
                continue
            numbers = sorted(
                int(match[1])
                for entry in path.iterdir()
                if (match := re.fullmatch("(0|[1-9][0-9]{0,17})\\.json", entry.name))
            )
            if numbers:
                self.attempt(name, partial(self.one_name, name, path, numbers))
        self.report.orphans = sorted(self.good - self.named)

    def one_name(self, name: str, folder: Path, numbers: list[int]) -> None:
        events: list[dict[str, Any]] = []
        for seq in numbers:
            self.attempt(
                f"{name} event {seq}", lambda seq=seq: events.append(self.one_event(name, seq, folder / f"{seq}.json"))
            )
        require(numbers == list(range(1, len(numbers) + 1)), f"events are missing: there are {numbers}")
        require(len(events) == len(numbers), "an event could not be read, so its state is not known")
        history = _History(name, self, last_places(events))
        for event in events:
            try:
                history.take(event)
            except Refused as refused:
                raise Refused(f"event {event['seq']}: {refused}") from refused
        if state := history.state():
            self.report.state["names"][name] = state

    def one_event(self, name: str, seq: int, path: Path) -> dict[str, Any]:
        event = read_event(read_file(path))
        place = (event["registry"], event["namespace"], event["name"], event["seq"])
        require(place == (self.registry, *name_parts(name), seq), f"it is of {place}")
        return event

    # ---- versions

    def version(self, reference: str, payload: dict[str, Any], place: Any) -> dict[str, Any]:
        """Proves everything of one version; gives what the state says of its content.

        Args:
            place: its placement as the last event has it; None for a purged one.
        """
        require(is_digest(payload["manifest"]), "manifest is no digest")
        placement = read_placement(payload["placement"])
        if place is None:
            return self.purged_version(payload["manifest"], placement)
        placement = read_placement(place)
        self.named.update(placement["blobs"])
        manifest = read_manifest(self.blob(payload["manifest"]))
        require(payload["manifest"] in placement["blobs"], "the manifest is not among the blobs")
        require(set(placement["components"]) == set(manifest["components"]), "the components are not the manifest's")
        paths = [file["path"] for file in manifest["files"]]
        require(sorted(placement["files"]) == sorted(paths), "the files are not the manifest's")
        for digest in placement["blobs"]:
            require(digest in self.good, f"blob {digest} is missing or damaged")
        layouts: dict[str, list[Spec]] = {}
        for role, part in manifest["components"].items():
            require(part["layout"] in placement["blobs"], f"the layout of {role} is not among the blobs")
            layouts[role] = read_layout(self.blob(part["layout"]))
            self.component(role, part["tensors"], layouts[role], placement)
        for file in manifest["files"]:
            self.file(file, layouts, placement)
        self.content(reference, payload["content"], manifest, layouts)
        return manifest

    def purged_version(self, digest: str, placement: dict[str, Any]) -> dict[str, Any]:
        """What is left of it: the manifest and the layouts."""
        manifest = read_manifest(self.blob(digest))
        kept = {digest, *(part["layout"] for part in manifest["components"].values())}
        require(kept <= set(placement["blobs"]), "the manifest or a layout is not among the blobs")
        self.named.update(kept)
        for part in manifest["components"].values():
            require(len(read_layout(self.blob(part["layout"]))) == len(part["tensors"]), "not as many tensors")
        return manifest

    def component(self, role: str, digests: list[str], layout: list[Spec], placement: dict[str, Any]) -> None:
        entries = placement["components"][role]
        require(len(layout) == len(digests) == len(entries), f"{role}: not as many tensors as the layout has")
        for (name, dtype, shape), digest, (position, ordinal) in zip(layout, digests, entries, strict=True):
            blob = placement["blobs"][position]
            there = self.tensor_file(blob).specs
            require(ordinal < len(there), f"{role} {name!r}: blob {blob} has no tensor {ordinal}")
            require(there[ordinal][1:] == (dtype, shape), f"{role} {name!r}: another dtype or shape")
            if (blob, ordinal, digest) not in self.proven:
                _, data = self.tensor(blob, ordinal)
                require(tensor_digest(dtype, shape, data) == digest, f"{role} {name!r}: another digest")
                self.proven.add((blob, ordinal, digest))

    def file(self, file: dict[str, Any], layouts: dict[str, list[Spec]], placement: dict[str, Any]) -> None:
        hasher, size = sha256(), 0
        for chunk in self.rebuild(file, placement):
            hasher.update(chunk)
            size += len(chunk)
        require((hasher.hexdigest(), size) == (file["sha256"], file["size"]), f"file {file['path']}: another sha256")
        if file["component"] is not None:
            digest = placement["blobs"][placement["files"][file["path"]][0]]
            head = read_header(self.blob(digest))
            require(head.specs == layouts[file["component"]], f"file {file['path']}: another layout")

    def rebuild(self, file: dict[str, Any], placement: dict[str, Any]) -> Iterator[bytes]:
        position, whole = placement["files"][file["path"]]
        yield self.blob(placement["blobs"][position])
        if not whole:
            require(file["component"] is not None, f"file {file['path']}: a header, and no component")
            for blob, ordinal in placement["components"][file["component"]]:
                yield self.tensor(placement["blobs"][blob], ordinal)[1]

    def content(self, reference: str, recorded: Any, manifest: dict[str, Any], layouts: dict[str, list[Spec]]) -> None:
        require(is_digest(recorded), "content is no digest")
        components = {role: (layouts[role], part["tensors"]) for role, part in manifest["components"].items()}
        document = content_document(components, manifest["config"])
        if document is None:
            self.report.not_recomputed.append(reference)
        else:
            require(sha256(canonical(document)).hexdigest() == recorded, "another content digest")

    # ---- lineage, when every name is known

    def lineage(self) -> None:
        for child, parent, digest in self.edges:
            if self.manifests.get(parent) != digest:
                self.report.problems.append(f"{child}: its parent {parent} is not there, or has another digest")
            name, number = child.rsplit("@", 1)
            other, before = parent.rsplit("@", 1)
            if name == other and int(before) >= int(number):
                self.report.problems.append(f"{child}: its parent {parent} is not older")
            if parent in self.absent and child not in self.absent:
                self.report.problems.append(f"{child}: its parent {parent} is removed")


def last_places(events: list[dict[str, Any]]) -> dict[int, Any]:
    """By number of a version, its placement after all events; None where it is purged."""
    places: dict[int, Any] = {}
    for event in events:
        kind, number, payload = event["kind"], event["version"], event["payload"]
        if is_whole(number) and kind == "purged":
            places[number] = None
        elif is_whole(number) and kind in ("pushed", "restored") and isinstance(payload, dict):
            places[number] = payload.get("placement") or places.get(number)
    return places


PUSHED_MEMBERS = "manifest content base parents placement environment peft_version message bytes_new"


class _History:
    """The state of one name, event by event."""

    def __init__(self, name: str, reader: _Reader, places: dict[int, Any]) -> None:
        self.name = name
        self.places = places
        self.there: dict[int, str] = {}  # present, removed or purged
        self.reader = reader
        self.at = ""
        self.count = 0
        self.versions: dict[int, dict[str, Any]] = {}
        self.tags: dict[str, list[Any]] = {}  # number, protected, moved at
        self.history: dict[str, list[list[Any]]] = {}

    def take(self, event: dict[str, Any]) -> None:
        require(event["at"] >= self.at, "it goes back in time")
        self.at = event["at"]
        self.count += 1
        kind, payload, number, tag = event["kind"], event["payload"], event["version"], event["tag"]
        about_tags: dict[str, Callable[..., None]] = {
            "tag_moved": self.moved,
            "tag_protected": self.protected,
            "tag_unprotected": self.protected,
            "tag_deleted": self.deleted,
        }
        about_versions: dict[str, Callable[..., None]] = {
            "metadata": self.metadata,
            "metrics": self.metrics,
            "note": self.note,
            "removed": self.comes_or_goes,
            "restored": self.comes_or_goes,
            "purged": self.comes_or_goes,
        }
        if kind == "pushed":
            require(tag is None, "a push with a tag")
            self.pushed(event, payload)
            return
        require(kind in about_tags or kind in about_versions, f"the kind {kind!r} is not known")
        require(is_whole(number, 1) and number in self.versions, f"there is no version {number} yet")
        if kind in about_versions:
            require(tag is None, f"{kind} with a tag")
            about_versions[kind](self.versions[number], payload, event)
        else:
            require(is_text(tag), f"{kind} without a tag")
            check_tag(tag)
            require(tag != "latest", "latest is no tag")
            about_tags[kind](tag, number, payload, event)
            self.history.setdefault(tag, []).append([kind, number, event["at"], event["actor"]])

    def pushed(self, event: dict[str, Any], payload: dict[str, Any]) -> None:
        members(payload, "pushed", PUSHED_MEMBERS)
        number = event["version"]
        require(number == len(self.versions) + 1, f"version {number} comes after {len(self.versions)}")
        require(isinstance(payload["environment"], dict), "environment")
        require(is_text_or_null(payload["message"]) and is_text_or_null(payload["peft_version"]), "message")
        require(is_whole(payload["bytes_new"]), "bytes_new")
        reference = f"{self.name}@{number}"
        manifest = self.reader.version(reference, payload, self.places.get(number))
        known = [version["digest"] for version in self.versions.values()]
        require(payload["manifest"] not in known, "the name has this manifest already")
        base, parents = payload["base"], payload["parents"]
        require((base is None) == (manifest["base"] is None), "base is named by one of event and manifest alone")
        require(isinstance(parents, list) and len(parents) == len(manifest["parents"]), "not the manifest's parents")
        edges = [] if base is None else [["trained_on", base, None]]
        digests = [] if base is None else [manifest["base"]]
        for parent, named in zip(manifest["parents"], parents, strict=True):
            edges.append([parent["relation"], named, parent["weight"]])
            digests.append(parent["digest"])
        for (_, named, _), digest in zip(edges, digests, strict=True):
            require(is_text(named) and parse_reference(named)["number"] is not None, f"{named!r} is no version")
            self.reader.edges.append((reference, named, digest))
        self.reader.manifests[reference] = payload["manifest"]
        self.there[number] = "present"
        self.versions[number] = {
            "digest": payload["manifest"],
            "content": payload["content"],
            "kind": manifest["kind"],
            "base": base,
            "parents": sorted(edges, key=str),
            "created_at": event["at"],
            "created_by": event["actor"],
            "message": payload["message"],
            "peft_version": payload["peft_version"],
            "size": sum(file["size"] for file in manifest["files"]),
            "bytes_new": payload["bytes_new"],
            "tags": [],
            "metadata": {},
            "metrics": {},
            "files": {file["path"]: [file["sha256"], file["size"]] for file in manifest["files"]},
            "components": {r: [part["layout"], part["tensors"]] for r, part in sorted(manifest["components"].items())},
        }

    def metadata(self, version: dict[str, Any], payload: dict[str, Any], event: dict[str, Any]) -> None:
        for key, value in payload.items():
            members(value, key, "text number")
            require(is_text(value["text"]) and (value["number"] is None or is_number(value["number"])), key)
            version["metadata"][key] = value

    def metrics(self, version: dict[str, Any], payload: dict[str, Any], event: dict[str, Any]) -> None:
        members(payload, "metrics", "values step")
        require(isinstance(payload["values"], dict), "values")
        require(payload["step"] is None or is_whole(payload["step"]), "step")
        for key, value in payload["values"].items():
            require(is_number(value) or value in NOT_FINITE, f"metric {key}: {value!r}")
            version["metrics"][key] = [value, payload["step"], event["at"]]

    def note(self, version: dict[str, Any], payload: dict[str, Any], event: dict[str, Any]) -> None:
        require(is_text(members(payload, "note", "text")["text"]), "text")

    def comes_or_goes(self, version: dict[str, Any], payload: dict[str, Any], event: dict[str, Any]) -> None:
        number, kind = event["version"], event["kind"]
        before = self.there[number]
        if kind == "purged":
            require(is_whole(members(payload, kind, "bytes")["bytes"]) and before == "removed", f"it is {before}")
        elif kind == "removed":
            require(is_text_or_null(members(payload, kind, "why")["why"]) and before == "present", f"it is {before}")
            require([number, True] not in [tag[:2] for tag in self.tags.values()], "a protected tag points to it")
        else:
            require(is_text_or_null(members(payload, kind, "why placement")["why"]), "why")
            require(before == ("removed" if payload["placement"] is None else "purged"), f"it is {before}")
        self.there[number] = "present" if kind == "restored" else kind

    def moved(self, tag: str, number: int, payload: dict[str, Any], event: dict[str, Any]) -> None:
        members(payload, "tag_moved", "from to why")
        before = self.tags.get(tag, [None, False, ""])
        require(payload["from"] == before[0] and payload["to"] == number, f"{tag} was at {before[0]}")
        require(not before[1], f"{tag} is protected")
        require(is_text_or_null(payload["why"]), "why")
        self.tags[tag] = [number, False, event["at"]]

    def protected(self, tag: str, number: int, payload: dict[str, Any], event: dict[str, Any]) -> None:
        require(is_text_or_null(members(payload, event["kind"], "why")["why"]), "why")
        on = event["kind"] == "tag_protected"
        require(tag in self.tags and self.tags[tag][:2] == [number, not on], f"{tag} is not so")
        self.tags[tag][1] = on

    def deleted(self, tag: str, number: int, payload: dict[str, Any], event: dict[str, Any]) -> None:
        members(payload, "tag_deleted", "from why")
        require(self.tags.get(tag, [])[:2] == [number, False] and payload["from"] == number, f"{tag} is not so")
        require(is_text_or_null(payload["why"]), "why")
        del self.tags[tag]

    def state(self) -> dict[str, Any]:
        require(self.versions, "no version")
        for tag, (number, _, _) in sorted(self.tags.items()):
            self.versions[number]["tags"].append(tag)
        present = [number for number in self.versions if self.there[number] == "present"]
        self.reader.absent.update(f"{self.name}@{number}" for number in self.versions if number not in present)
        if not present:
            return {}
        for version in self.versions.values():
            for kind in ("metadata", "metrics"):
                version[kind] = dict(sorted(version[kind].items()))
        return {
            "versions": {str(number): self.versions[number] for number in present},
            "tags": dict(sorted(self.tags.items())),
            "latest": max(present),
            "events": self.count,
            "history": dict(sorted(self.history.items())),
        }


def main() -> int:
    report = check_store(Path(sys.argv[1]))
    print(json.dumps(report.state, indent=1))
    for problem in report.problems:
        print(problem, file=sys.stderr)
    for what, found in (("orphans", report.orphans), ("content digests not recomputed", report.not_recomputed)):
        if found:
            print(f"{what}: {', '.join(found)}", file=sys.stderr)
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
