"""The manifest: all that a version *is*, as canonical JSON (RFC 8785). Its sha256 is the version's
digest. No time, user, path of this machine, metadata or library version stands in it, and nothing of
where the bytes lie (that is `placement`). docs/format.md specifies it for other programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import rfc8785

from registry.core.digest import is_digest, sha256_hex
from registry.core.errors import InvalidInput, InvalidManifest

FORMAT = 1
Kind = Literal["adapter", "base", "checkpoint"]
KINDS: tuple[str, ...] = get_args(Kind)
Relation = Literal["trained_on", "continued_from", "merged_from", "extracted_from", "converted_from"]
RELATIONS: tuple[str, ...] = get_args(Relation)
MAX_FILE_PATH = 512


@dataclass(frozen=True, slots=True)
class Component:
    """One state dict of a version.

    Attributes:
        role: `model`, `adapter`, `ema`, `optimizer`, ...
        layout: digest of the layout document, which is a blob.
        tensors: tensor digests (hex) in layout order.
    """

    role: str
    layout: str
    tensors: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class File:
    """One file of a version, as a native pull gives it back.

    Attributes:
        path: relative, with `/`.
        sha256: of the whole file.
        component: role of the component that the file carries, if it is a safetensors file.
    """

    path: str
    sha256: str
    size: int
    component: str | None = None


@dataclass(frozen=True, slots=True)
class Parent:
    """A lineage edge to a parent's manifest digest; `weight` only for `merged_from`."""

    relation: str
    digest: str
    weight: float | None = None


@dataclass(frozen=True)
class Manifest:
    """See the module's text. Components are ordered by role, files by path, parents as given."""

    kind: str
    components: tuple[Component, ...]
    files: tuple[File, ...] = ()
    config: Mapping[str, Any] | None = None
    base: str | None = None
    parents: tuple[Parent, ...] = ()
    recipe: Mapping[str, Any] | None = field(default=None)

    @cached_property
    def document(self) -> bytes:
        """Canonical bytes.

        Raises:
            InvalidInput: the config holds a number that JSON cannot (NaN, or an integer over 2**53).
        """
        try:
            return rfc8785.dumps(self._tree())
        except (rfc8785.CanonicalizationError, RecursionError) as error:
            raise InvalidInput(f"the configuration cannot be written as canonical JSON: {error}") from error

    @cached_property
    def digest(self) -> str:
        """sha256 of `document`: the version's digest."""
        return sha256_hex(self.document)

    def _tree(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "kind": self.kind,
            "components": {c.role: {"layout": c.layout, "tensors": list(c.tensors)} for c in self.components},
            "files": [
                {"path": f.path, "sha256": f.sha256, "size": f.size, "component": f.component} for f in self.files
            ],
            "config": None if self.config is None else dict(self.config),
            "base": self.base,
            "parents": [{"relation": p.relation, "digest": p.digest, "weight": p.weight} for p in self.parents],
            "recipe": None if self.recipe is None else dict(self.recipe),
        }

    @classmethod
    def from_document(cls, document: bytes) -> Manifest:
        """Reads a manifest; the inverse of `document`, byte for byte.

        Raises:
            InvalidManifest: wrong format number, a field of the wrong type, or bytes that are not canonical.
        """
        try:
            tree = json.loads(document)
            if tree["format"] != FORMAT:
                raise InvalidManifest(f"manifest format {tree['format']!r}; this program reads format {FORMAT}")
            manifest = cls(
                kind=tree["kind"],
                components=tuple(
                    Component(role, body["layout"], tuple(body["tensors"]))
                    for role, body in sorted(tree["components"].items())
                ),
                files=tuple(File(f["path"], f["sha256"], f["size"], f["component"]) for f in tree["files"]),
                config=tree["config"],
                base=tree["base"],
                parents=tuple(Parent(p["relation"], p["digest"], p["weight"]) for p in tree["parents"]),
                recipe=tree["recipe"],
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, InvalidManifest):
                raise
            raise InvalidManifest(f"not a manifest: {type(error).__name__}: {error}"[:300]) from error
        manifest.check()
        if manifest.document != document:
            raise InvalidManifest("the manifest is not in canonical form (RFC 8785), or has unknown fields")
        return manifest

    def check(self) -> None:
        """
        Raises:
            InvalidManifest: a kind, relation, digest, size or path that may not stand in a manifest.
        """
        digests = [c.layout for c in self.components] + [t for c in self.components for t in c.tensors]
        digests += [f.sha256 for f in self.files] + [p.digest for p in self.parents]
        if self.base is not None:
            digests.append(self.base)
        for digest in digests:
            if not is_digest(digest):
                raise InvalidManifest(f"not a digest of 64 hex digits: {digest!r}"[:200])
        if self.kind not in KINDS:
            raise InvalidManifest(f"kind {self.kind!r}; expected one of {', '.join(KINDS)}"[:200])
        roles = {c.role for c in self.components}
        for file in self.files:
            check_file_path(file.path)
            if type(file.size) is not int or file.size < 0:
                raise InvalidManifest(f"size of {file.path!r}: {file.size!r}"[:200])
            if file.component is not None and file.component not in roles:
                raise InvalidManifest(f"file {file.path!r} names the unknown component {file.component!r}"[:200])
        if len({f.path for f in self.files}) != len(self.files):
            raise InvalidManifest("two files have one path")
        for parent in self.parents:
            if parent.relation not in RELATIONS:
                raise InvalidManifest(f"relation {parent.relation!r}; expected one of {', '.join(RELATIONS)}"[:200])


def check_file_path(path: str) -> str:
    """The path itself where it is relative, with `/`, and stays below its folder.

    Raises:
        InvalidManifest
    """
    parts = path.split("/") if isinstance(path, str) else []
    if (
        not parts
        or len(path) > MAX_FILE_PATH
        or not path.isprintable()
        or "\\" in path
        or any(part in ("", ".", "..") for part in parts)
        or (len(parts[0]) == 2 and parts[0][1] == ":")
    ):
        raise InvalidManifest(f"file path {path!r} is not a plain relative path"[:200])
    return path
