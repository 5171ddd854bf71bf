"""What is in a bundle (docs/format.md, "Bundles"): its table of contents, `bundle.json`, and the names that its members
may have. Where the members lie, in a folder or a tar file, is a matter of `formats/bundle.py`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from registry.core.canonical_json import canonical_json, parse_json
from registry.core.digest import is_digest
from registry.core.errors import InvalidInput, RegistryError
from registry.core.manifest import KINDS
from registry.core.placement import Placement
from registry.core.reference import check_new_tag, parse_artifact, shown

FORMAT = 1
INDEX = "bundle.json"
MAX_DOCUMENT = 128 << 20
"""Bytes of a document that is read as a whole. The largest are layouts, and a safetensors header has 100 MB at most."""
MAX_VERSIONS = 100_000
MAX_EXTERNAL_TENSORS = 1 << 22
"""Tensors of all external versions together: a run of a placement is short to write, and long to read."""

_REGISTRY_ID = re.compile(r"[0-9a-f]{32}")
_BLOB = re.compile(r"blobs/sha256/(?P<two>[0-9a-f]{2})/(?P<digest>(?P=two)[0-9a-f]{62})")
_EVENT = re.compile(r"events/(?P<name>[a-z0-9._-]{1,128}/[a-z0-9._-]{1,128})/(?P<seq>[1-9][0-9]{0,17})\.json")


@dataclass(frozen=True)
class BundledVersion:
    """One version of a bundle.

    Attributes:
        namespace, name, number: where it comes from.
        digest, content: of its manifest, and of its content.
        asked: it was asked for; the others came along as bases and ancestors.
        tags: that pointed to it, sorted.
        external: None where its bytes are in the bundle; else where its tensors would lie in files of their own, as
            the placement of an external version says it.
    """

    namespace: str
    name: str
    number: int
    digest: str
    content: str
    kind: str
    asked: bool
    tags: tuple[str, ...]
    external: Placement | None = None

    @property
    def artifact(self) -> str:
        return f"{self.namespace}/{self.name}"

    @property
    def reference(self) -> str:
        return f"{self.artifact}@{self.number}"

    def to_json(self) -> dict[str, Any]:
        return {
            "namespace": self.namespace,
            "name": self.name,
            "number": self.number,
            "manifest": self.digest,
            "content": self.content,
            "kind": self.kind,
            "asked": self.asked,
            "tags": list(self.tags),
            "external": None if self.external is None else self.external.to_json(),
        }

    @classmethod
    def from_json(cls, tree: Any) -> BundledVersion:
        """
        Raises:
            RegistryError, ValueError, KeyError, TypeError: it is not what `to_json` gave.
        """
        parse_artifact(f"{tree['namespace']}/{tree['name']}")
        if type(tree["number"]) is not int or not 1 <= tree["number"] < 2**31:
            raise ValueError(f"number {tree['number']!r}")
        if not (is_digest(tree["manifest"]) and is_digest(tree["content"])):
            raise ValueError("manifest and content are digests of 64 hex digits")
        if tree["kind"] not in KINDS or type(tree["asked"]) is not bool:
            raise ValueError(f"kind {tree['kind']!r}, asked {tree['asked']!r}")
        return cls(
            namespace=tree["namespace"],
            name=tree["name"],
            number=tree["number"],
            digest=tree["manifest"],
            content=tree["content"],
            kind=tree["kind"],
            asked=tree["asked"],
            tags=tuple(check_new_tag(tag) for tag in tree["tags"]),
            external=None if tree["external"] is None else Placement.from_json(tree["external"]),
        )


@dataclass(frozen=True)
class BundleIndex:
    """`bundle.json`.

    Attributes:
        registry: id of the registry that it comes from.
        versions: each after its base and its parents.
    """

    registry: str
    versions: tuple[BundledVersion, ...]

    @cached_property
    def document(self) -> bytes:
        """Canonical JSON."""
        tree = {"format": FORMAT, "registry": self.registry, "versions": [one.to_json() for one in self.versions]}
        return canonical_json(tree, INDEX)

    @classmethod
    def from_document(cls, document: bytes) -> BundleIndex:
        """Reads `document`, byte for byte.

        Raises:
            InvalidInput: another format, a member of the wrong type, a version twice, or bytes that are not canonical.
        """
        try:
            tree = parse_json(document)
            if tree["format"] != FORMAT:
                raise InvalidInput(
                    f"{INDEX}: format {shown(repr(tree['format']))}; this program reads {FORMAT}: use a newer one"
                )
            if not isinstance(tree["registry"], str) or not _REGISTRY_ID.fullmatch(tree["registry"]):
                raise ValueError("registry is no id of 32 hex digits")
            if not 1 <= len(tree["versions"]) <= MAX_VERSIONS:
                raise ValueError(f"{len(tree['versions'])} versions; expected 1 to {MAX_VERSIONS}")
            check_runs((one["external"] for one in tree["versions"] if one["external"]), MAX_EXTERNAL_TENSORS)
            index = cls(tree["registry"], tuple(BundledVersion.from_json(one) for one in tree["versions"]))
        except (RegistryError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, InvalidInput) and str(error).startswith(INDEX):
                raise
            raise InvalidInput(f"{INDEX} cannot be read: {shown(f'{type(error).__name__}: {error}', 200)}") from error
        if index.document != document:
            raise InvalidInput(f"{INDEX} is not in canonical form (RFC 8785), or has unknown members")
        index._check_distinct()
        return index

    def _check_distinct(self) -> None:
        _distinct((one.reference for one in self.versions), "version")
        _distinct((f"{one.artifact}@sha256:{one.digest}" for one in self.versions), "version")
        _distinct((f"{one.artifact}:{tag}" for one in self.versions for tag in one.tags), "tag")
        if any(list(one.tags) != sorted(one.tags) for one in self.versions):
            raise InvalidInput(f"{INDEX}: the tags of a version are not sorted")
        if not any(one.asked for one in self.versions):
            raise InvalidInput(f"{INDEX}: none of its versions was asked for")


def _distinct(found: Iterable[str], what: str) -> None:
    seen: set[str] = set()
    for one in found:
        if one in seen:
            raise InvalidInput(f"{INDEX}: the {what} {one} stands there twice")
        seen.add(one)


def check_runs(placements: Iterable[Any], most: int) -> None:
    """Looks at placements before they are read in full.

    Raises:
        InvalidInput: they name more tensors than `most`.
        ValueError, KeyError, TypeError, AttributeError: they are no placements.
    """
    lengths = [length for one in placements for runs in one["components"].values() for _, _, length in runs]
    if any(type(length) is not int or length < 1 for length in lengths):
        raise ValueError("a run of a placement has a length that is no number from 1")
    if sum(lengths) > most:
        raise InvalidInput(f"placements of {sum(lengths)} tensors; expected at most {most}")


def blob_member(digest: str) -> str:
    """The name of a blob in a bundle."""
    return f"blobs/sha256/{digest[:2]}/{digest}"


def event_member(namespace: str, name: str, seq: int) -> str:
    """The name of an event in a bundle."""
    return f"events/{namespace}/{name}/{seq}.json"


def check_member(name: str) -> str:
    """The name itself, where a bundle may have such a member.

    Raises:
        InvalidInput
    """
    if name == INDEX or _BLOB.fullmatch(name):
        return name
    if match := _EVENT.fullmatch(name):
        parse_artifact(match["name"])
        return name
    raise InvalidInput(f"'{shown(name, 200)}' does not belong into a bundle; take it out, or export again")


def is_event(name: str) -> bool:
    """Whether a checked name is that of an event."""
    return name.startswith("events/")
