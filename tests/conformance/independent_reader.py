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
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from tests.conformance.independent_content import content_document
from tests.conformance.independent_documents import (
    Refused,
    Spec,
    TensorFile,
    canonical,
    is_digest,
    is_finite,
    is_text,
    is_whole,
    length,
    members,
    name_parts,
    parse,
    read_event,
    read_header,
    read_layout,
    read_manifest,
    require,
    tensor_digest,
)
from tests.conformance.independent_history import History, Version
from tests.conformance.independent_placement import read_placement
from tests.conformance.independent_state_document import read_state_document


@dataclass
class Report:
    """What a store says, and what is wrong with it.

    Attributes:
        state: names with their versions, tags, metadata and metrics, as far as they could be read.
        orphans: blobs that nothing needs.
        not_recomputed: versions whose content digest was taken as it is.
    """

    state: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    not_recomputed: list[str] = field(default_factory=list)


def check_store(root: Path) -> Report:
    """Checks everything that docs/format.md lists under what a reader must refuse."""
    report = Report()
    reader = Reader(root, report)
    try:
        reader.identity()
        reader.all_blobs()
        reader.all_names()
        reader.all_versions()
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


class Reader:
    def __init__(self, root: Path, report: Report) -> None:
        self.root = root
        self.report = report
        self.registry = ""
        self.good: set[str] = set()
        self.needed: dict[str, set[str]] = {}  # blob -> the roles in which versions that have their bytes need it
        self.tensor_files: dict[str, TensorFile] = {}
        self.proven: dict[tuple[str, int, str], bool] = {}  # blob, ordinal, digest -> whether it is finite
        self.claims: dict[tuple[str, int], object] = {}  # tensors of blobs that are not in the store
        self.versions: list[Version] = []
        self.manifests: dict[str, str] = {}  # ns/name@number -> digest
        self.edges: list[tuple[str, str, str]] = []  # child, parent, digest that the child's manifest has

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

    def one_name(self, name: str, folder: Path, numbers: list[int]) -> None:
        history = History(name, self)
        events = []
        for seq in numbers:
            self.attempt(
                f"{name} event {seq}", lambda seq=seq: events.append(self.one_event(name, seq, folder / f"{seq}.json"))
            )
        require(numbers == list(range(1, len(numbers) + 1)), f"events are missing: there are {numbers}")
        require(len(events) == len(numbers), "an event could not be read, so its state is not known")
        for event in events:
            try:
                history.take(event)
            except Refused as refused:
                raise Refused(f"event {event['seq']}: {refused}") from refused
        self.report.state["names"][name] = history.state()

    def one_event(self, name: str, seq: int, path: Path) -> dict[str, Any]:
        event = read_event(read_file(path))
        place = (event["registry"], event["namespace"], event["name"], event["seq"])
        require(place == (self.registry, *name_parts(name), seq), f"it is of {place}")
        return event

    # ---- versions

    def version(self, reference: str, payload: dict[str, Any]) -> Version:
        """Reads what a push says; the bytes are proven when every event is known."""
        require(is_digest(payload["manifest"]), "manifest is no digest")
        manifest = read_manifest(self.blob(payload["manifest"]))
        layouts = {role: read_layout(self.blob(part["layout"])) for role, part in manifest["components"].items()}
        placement = self.placed(payload["manifest"], manifest, layouts, payload["placement"])
        nonfinite = payload.get("nonfinite")
        # Events of the first program have it not.
        require("nonfinite" not in payload or isinstance(nonfinite, dict), "nonfinite: not an object")
        require(set(nonfinite or {}) <= set(layouts), "nonfinite: no components")
        for role, positions in (nonfinite or {}).items():
            good = isinstance(positions, list) and positions and all(map(is_whole, positions))
            require(good and all(one < other for one, other in pairwise(positions)), f"nonfinite: {role}")
            require(positions[-1] < len(layouts[role]), f"nonfinite: {role} has no tensor {positions[-1]}")
        self.content(reference, payload["content"], manifest, layouts)
        return Version(reference, manifest, layouts, placement, nonfinite)

    def placed(
        self, digest: str, manifest: dict[str, Any], layouts: dict[str, list[Spec]], tree: Any
    ) -> dict[str, Any]:
        """Reads a placement of this manifest."""
        placement = read_placement(tree)
        there = {one for one, _ in placement["blobs"]}
        require(digest in there, "the manifest is not among the blobs")
        require(set(placement["components"]) == set(manifest["components"]), "the components are not the manifest's")
        paths = [file["path"] for file in manifest["files"]]
        require(sorted(placement["files"]) == sorted(paths), "the files are not the manifest's")
        for role, part in manifest["components"].items():
            require(part["layout"] in there, f"the layout of {role} is not among the blobs")
            require("data" not in part or part["data"] in there, f"the state document of {role} is not among the blobs")
            counts = {len(layouts[role]), len(part["tensors"]), len(placement["components"][role])}
            require(len(counts) == 1, f"{role}: not as many tensors as the layout has")
        for file in manifest["files"]:
            _, whole, splices = placement["files"][file["path"]]
            if splices is not None:
                require(file["component"] is None, f"file {file['path']}: splices, and it is a component")
            elif not whole:
                require(file["component"] is not None, f"file {file['path']}: a header, and no component")
        return placement

    def content(self, reference: str, recorded: Any, manifest: dict[str, Any], layouts: dict[str, list[Spec]]) -> None:
        require(is_digest(recorded), "content is no digest")
        parts = {role: (layouts[role], part["tensors"]) for role, part in manifest["components"].items()}
        document = content_document(manifest["kind"], parts, manifest["config"])
        if document is None:
            self.report.not_recomputed.append(reference)
        else:
            require(sha256(canonical(document)).hexdigest() == recorded, "another content digest")

    # ---- their bytes, when every event is known

    def all_versions(self) -> None:
        for version in self.versions:
            if version.state != "purged":
                for digest, role in version.placement["blobs"]:
                    self.needed.setdefault(digest, set()).add(role)
        for version in self.versions:
            self.attempt(version.reference, partial(self.prove, version))
            for role, digest in version.described:
                self.needed.setdefault(digest, set()).add(role)
                self.attempt(f"{version.reference}, {role}", partial(self.blob, digest))
        kept = {digest for version in self.versions for digest in self.kept(version)}
        self.report.orphans = sorted(self.good - set(self.needed) - kept)

    def kept(self, version: Version) -> list[str]:
        """What stays of a version whatever happens to it."""
        return [version.said["digest"], *(part["layout"] for part in version.manifest["components"].values())]

    def prove(self, version: Version) -> None:
        """Everything of one version; of a purged one its manifest and layouts, which were read before."""
        if version.state == "purged":
            return
        manifest, placement = version.manifest, version.placement
        absent = sorted(digest for digest, _ in placement["blobs"] if digest not in self.good)
        for digest in absent:
            require(self.needed[digest] == {"external"}, f"blob {digest} is missing or damaged")
        version.said["external"] = absent
        for role, part in manifest["components"].items():
            self.component(version, role, part["tensors"])
            if "data" in part:
                read_state_document(self.blob(part["data"]), {name for name, _, _ in version.layouts[role]})
        for file in manifest["files"]:
            self.file(file, version)

    def component(self, version: Version, role: str, digests: list[str]) -> None:
        blobs, broken = version.placement["blobs"], []
        entries = version.placement["components"][role]
        for place, (spec, digest, (position, ordinal)) in enumerate(
            zip(version.layouts[role], digests, entries, strict=True)
        ):
            blob = blobs[position][0]
            if blob not in self.good:
                # Nothing can be proven of it, but no two versions may say different things.
                claim = self.claims.setdefault((blob, ordinal), (spec[1:], digest))
                require(claim == (spec[1:], digest), f"{role} {spec[0]!r}: tensor {ordinal} of blob {blob} is another")
            elif not self.tensor_is(blob, ordinal, spec, digest, f"{role} {spec[0]!r}"):
                broken.append(place)
        at_hand = [place for place, (position, _) in enumerate(entries) if blobs[position][0] in self.good]
        said = [place for place in (version.nonfinite or {}).get(role, []) if place in at_hand]
        require(
            version.nonfinite is None or said == broken, f"{role}: tensors {broken} hold NaN or infinities, not {said}"
        )

    def tensor_is(self, blob: str, ordinal: int, spec: Spec, digest: str, what: str) -> bool:
        """Proves a tensor; whether it is finite."""
        _, dtype, shape = spec
        there = self.tensor_file(blob).specs
        require(ordinal < len(there), f"{what}: blob {blob} has no tensor {ordinal}")
        require(there[ordinal][1:] == (dtype, shape), f"{what}: another dtype or shape")
        if (blob, ordinal, digest) not in self.proven:
            _, data = self.tensor(blob, ordinal)
            require(tensor_digest(dtype, shape, data) == digest, f"{what}: another digest")
            self.proven[blob, ordinal, digest] = is_finite(dtype, data)
        return self.proven[blob, ordinal, digest]

    def file(self, file: dict[str, Any], version: Version) -> None:
        what, component = f"file {file['path']}", file["component"]
        position, whole, _ = version.placement["files"][file["path"]]
        digest = version.placement["blobs"][position][0]
        if digest not in self.good:
            self.absent_file(file, version, position)
            return
        hasher, size = sha256(), 0
        for chunk in self.rebuild(file, version.placement):
            hasher.update(chunk)
            size += len(chunk)
        require((hasher.hexdigest(), size) == (file["sha256"], file["size"]), f"{what}: another sha256")
        if component is not None:
            head = read_header(self.blob(digest))
            require(head.specs == version.layouts[component], f"{what}: another layout")
            if whole:
                tensors = version.manifest["components"][component]["tensors"]
                for ordinal, (spec, tensor) in enumerate(zip(head.specs, tensors, strict=True)):
                    self.tensor_is(digest, ordinal, spec, tensor, f"{what}: {spec[0]!r}")

    def absent_file(self, file: dict[str, Any], version: Version, position: int) -> None:
        """What can be said of a file whose bytes are not in the store."""
        what, component = f"file {file['path']}", file["component"]
        _, whole, _ = version.placement["files"][file["path"]]
        digest = version.placement["blobs"][position][0]
        require(whole and digest == file["sha256"], f"{what}: its blob is missing or another")
        lie_there = {
            ordinal: spec
            for role, entries in version.placement["components"].items()
            for (blob, ordinal), spec in zip(entries, version.layouts[role], strict=True)
            if blob == position
        }
        require(8 + sum(map(length, lie_there.values())) <= file["size"], f"{what}: too small for its tensors")
        if component is not None:
            entries = version.placement["components"][component]
            require(entries == [(position, place) for place in range(len(entries))], f"{what}: not its component")

    def rebuild(self, file: dict[str, Any], placement: dict[str, Any]) -> Iterator[bytes]:
        position, whole, splices = placement["files"][file["path"]]
        stored = self.blob(placement["blobs"][position][0])
        done = 0
        for at, role, first, count in splices or ():
            require(at <= len(stored), f"file {file['path']}: a splice at {at} of {len(stored)} bytes")
            yield stored[done:at]
            done = at
            for blob, ordinal in placement["components"][role][first : first + count]:
                yield self.tensor(placement["blobs"][blob][0], ordinal)[1]
        yield stored[done:]
        if not whole and splices is None:
            for blob, ordinal in placement["components"][file["component"]]:
                yield self.tensor(placement["blobs"][blob][0], ordinal)[1]

    # ---- lineage, when every name is known

    def lineage(self) -> None:
        states = {version.reference: version.state for version in self.versions}
        for child, parent, digest in self.edges:
            if self.manifests.get(parent) != digest:
                self.report.problems.append(f"{child}: its parent {parent} is not there, or has another digest")
            name, number = child.rsplit("@", 1)
            other, before = parent.rsplit("@", 1)
            if name == other and int(before) >= int(number):
                self.report.problems.append(f"{child}: its parent {parent} is not older")
            if states.get(parent, "present") != "present" and states[child] == "present":
                self.report.problems.append(f"{child}: its parent {parent} is {states[parent]}")


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
