"""The state of one name that follows from its events, read from docs/format.md alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.conformance.independent_documents import (
    Spec,
    check_tag,
    is_digest,
    is_number,
    is_role,
    is_text,
    is_text_or_null,
    is_whole,
    members,
    parse_reference,
    require,
)

if TYPE_CHECKING:
    from tests.conformance.independent_reader import Reader

PUSHED_MEMBERS = "manifest content base parents placement environment peft_version message bytes_new"
SINCE_THE_FIRST = " nonfinite origin"
NOT_FINITE = ("NaN", "Infinity", "-Infinity")


@dataclass
class Version:
    """One version.

    Attributes:
        reference: `ns/name@number`.
        said: what the state says of it.
        placement: the newest.
        state: `present`, `removed` or `purged`.
        described: (role, digest) of every blob that was named beside it.
    """

    reference: str
    manifest: dict[str, Any]
    layouts: dict[str, list[Spec]]
    placement: dict[str, Any]
    nonfinite: dict[str, list[int]] | None
    state: str = "present"
    said: dict[str, Any] = field(default_factory=dict)
    described: list[tuple[str, str]] = field(default_factory=list)


class History:
    """The state of one name, event by event."""

    def __init__(self, name: str, reader: Reader) -> None:
        self.name = name
        self.reader = reader
        self.at = ""
        self.count = 0
        self.versions: dict[int, Version] = {}
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
            "described": self.described,
            "metadata": self.metadata,
            "metrics": self.metrics,
            "note": self.note,
            "removed": self.removed,
            "restored": self.restored,
            "purged": self.purged,
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

    # ---- versions

    def pushed(self, event: dict[str, Any], payload: dict[str, Any]) -> None:
        members(payload, "pushed", PUSHED_MEMBERS + SINCE_THE_FIRST * ("nonfinite" in payload or "origin" in payload))
        number = event["version"]
        require(number == len(self.versions) + 1, f"version {number} comes after {len(self.versions)}")
        require(isinstance(payload["environment"], dict), "environment")
        require(is_text_or_null(payload["message"]) and is_text_or_null(payload["peft_version"]), "message")
        require(is_whole(payload["bytes_new"]), "bytes_new")
        origin = payload.get("origin")
        require(origin is None or (isinstance(origin, dict) and all(map(is_text, origin.values()))), "origin")
        reference = f"{self.name}@{number}"
        version = self.reader.version(reference, payload)
        manifest = version.manifest
        known = [one.said["digest"] for one in self.versions.values()]
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
        self.reader.versions.append(version)
        self.versions[number] = version
        version.said = {
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
            "described": {},
            "external": [],
            "files": {file["path"]: [file["sha256"], file["size"], file["component"]] for file in manifest["files"]},
            "components": {
                role: [part["layout"], part["tensors"], part.get("data")]
                for role, part in sorted(manifest["components"].items())
            },
        }

    def described(self, version: Version, payload: dict[str, Any], event: dict[str, Any]) -> None:
        blobs = members(payload, "described", "blobs")["blobs"]
        require(isinstance(blobs, dict) and blobs, "described: no blobs")
        for role, digest in blobs.items():
            require(is_role(role) and is_digest(digest), f"described: {role!r}")
            version.said["described"][role] = digest
            version.described.append((role, digest))

    def metadata(self, version: Version, payload: dict[str, Any], event: dict[str, Any]) -> None:
        for key, value in payload.items():
            members(value, key, "text number")
            require(is_text(value["text"]) and (value["number"] is None or is_number(value["number"])), key)
            version.said["metadata"][key] = value

    def metrics(self, version: Version, payload: dict[str, Any], event: dict[str, Any]) -> None:
        members(payload, "metrics", "values step")
        require(isinstance(payload["values"], dict), "values")
        require(payload["step"] is None or is_whole(payload["step"]), "step")
        for key, value in payload["values"].items():
            require(is_number(value) or value in NOT_FINITE, f"metric {key}: {value!r}")
            version.said["metrics"][key] = [value, payload["step"], event["at"]]

    def note(self, version: Version, payload: dict[str, Any], event: dict[str, Any]) -> None:
        require(is_text(members(payload, "note", "text")["text"]), "text")

    # ---- versions that are taken away

    def removed(self, version: Version, payload: dict[str, Any], event: dict[str, Any]) -> None:
        require(is_text_or_null(members(payload, "removed", "why")["why"]), "why")
        require(version.state == "present", f"removed, and it was {version.state}")
        kept = [tag for tag, (number, protected, _) in self.tags.items() if number == event["version"] and protected]
        require(not kept, f"removed, and the protected tags {kept} point to it")
        version.state = "removed"

    def restored(self, version: Version, payload: dict[str, Any], event: dict[str, Any]) -> None:
        members(payload, "restored", "why placement")
        require(is_text_or_null(payload["why"]), "why")
        require(version.state != "present", "restored, and it was present")
        require(
            (payload["placement"] is not None) == (version.state == "purged"), f"placement of a {version.state} one"
        )
        if payload["placement"] is not None:
            digest = version.said["digest"]
            version.placement = self.reader.placed(digest, version.manifest, version.layouts, payload["placement"])
        version.state = "present"

    def purged(self, version: Version, payload: dict[str, Any], event: dict[str, Any]) -> None:
        require(is_whole(members(payload, "purged", "bytes")["bytes"]), "bytes")
        require(version.state == "removed", f"purged, and it was {version.state}")
        version.state = "purged"

    # ---- tags

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

    # ---- what follows

    def state(self) -> dict[str, Any]:
        require(self.versions, "no version")
        for tag, (number, _, _) in sorted(self.tags.items()):
            self.versions[number].said["tags"].append(tag)
        for version in self.versions.values():
            for kind in ("metadata", "metrics", "described"):
                version.said[kind] = dict(sorted(version.said[kind].items()))
        present = {number: version for number, version in self.versions.items() if version.state == "present"}
        return {
            "versions": {str(number): version.said for number, version in present.items()},
            "gone": {str(n): version.state for n, version in self.versions.items() if n not in present},
            "tags": dict(sorted(self.tags.items())),
            "latest": max(present, default=None),
            "events": self.count,
            "history": dict(sorted(self.history.items())),
        }
