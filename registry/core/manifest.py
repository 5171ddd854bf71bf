"""The manifest: all that a version *is*, as canonical JSON (RFC 8785). Its sha256 is the version's
digest. No time, user, path of this machine, metadata or library version stands in it, and nothing of
where the bytes lie (that is `placement`). docs/format.md specifies it for other programs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, get_args

from registry.core.canonical_json import MAX_INTEGER, canonical_json, parse_json
from registry.core.digest import is_digest, sha256_hex
from registry.core.errors import InvalidManifest

FORMAT = 1
Kind = Literal["adapter", "base", "checkpoint"]
KINDS: tuple[str, ...] = get_args(Kind)
Relation = Literal["trained_on", "continued_from", "merged_from", "extracted_from", "converted_from"]
RELATIONS: tuple[str, ...] = get_args(Relation)
MAX_FILE_PATH = 512

_ROLE = re.compile(r"[a-z][a-z0-9_.-]{0,63}")
# By code points and not `str.isprintable`, which changes with the Unicode version of the program that asks.
_NOT_IN_A_PATH = re.compile(r"[\\\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Component:
    """One state dict of a version.

    Attributes:
        role: `model`, `adapter`, `ema`, `optimizer`, ...: 1 to 64 of a-z, 0-9, `_`, `.`, `-`, a letter first.
        layout: digest of the layout document, which is a blob.
        tensors: tensor digests (hex) in layout order.
        data: digest of its state document, a blob, where it holds more than tensors.
    """

    role: str
    layout: str
    tensors: tuple[str, ...]
    data: str | None = None

    def to_json(self) -> dict[str, Any]:
        tree: dict[str, Any] = {"layout": self.layout, "tensors": list(self.tensors)}
        return tree if self.data is None else {**tree, "data": self.data}


@dataclass(frozen=True, slots=True)
class File:
    """One file of a version, as a native pull gives it back.

    Attributes:
        path: relative, with `/`.
        sha256: of the whole file.
        component: role of the component that the file carries, if it is a safetensors file. No two files carry one.
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
    """See the module's text. Components and files are ordered by role and path (by code point), parents as given."""

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
            InvalidInput: the config or recipe holds what JSON cannot (NaN, or an integer over 2**53).
        """
        return canonical_json(self._tree(), "the manifest")

    @cached_property
    def digest(self) -> str:
        """sha256 of `document`: the version's digest."""
        return sha256_hex(self.document)

    def _tree(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "kind": self.kind,
            "components": {c.role: c.to_json() for c in self.components},
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
            tree = parse_json(document)
            if tree["format"] != FORMAT:
                raise InvalidManifest(f"manifest format {tree['format']!r}; this program reads format {FORMAT}")
            manifest = cls(
                kind=tree["kind"],
                components=tuple(
                    Component(role, body["layout"], tuple(body["tensors"]), body.get("data"))
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
        digests += [c.data for c in self.components if c.data is not None]
        digests += [f.sha256 for f in self.files] + [p.digest for p in self.parents]
        if self.base is not None:
            digests.append(self.base)
        for digest in digests:
            if not is_digest(digest):
                raise InvalidManifest(f"not a digest of 64 hex digits: {digest!r}"[:200])
        if self.kind not in KINDS:
            raise InvalidManifest(f"kind {self.kind!r}; expected one of {', '.join(KINDS)}"[:200])
        for what, value in (("config", self.config), ("recipe", self.recipe)):
            if value is not None and not isinstance(value, Mapping):
                raise InvalidManifest(f"{what}: expected an object or null, found {type(value).__name__}")
        self._check_files()
        self._check_parents()

    def _check_files(self) -> None:
        free = {c.role for c in self.components}
        if len(free) != len(self.components) or not all(_ROLE.fullmatch(role) for role in free):
            raise InvalidManifest(f"components {sorted(free)}: expected distinct roles of a-z, 0-9, '_', '.' and '-'")
        for file in self.files:
            check_file_path(file.path)
            if type(file.size) is not int or not 0 <= file.size <= MAX_INTEGER:
                raise InvalidManifest(f"size of {file.path!r}: {file.size!r}"[:200])
            if file.component is not None:
                if not isinstance(file.component, str) or file.component not in free:
                    what = f"file {file.path!r} names the component {file.component!r}"
                    raise InvalidManifest(f"{what[:200]}, which is unknown, or carried by another file")
                free.remove(file.component)
        paths = [file.path for file in self.files]
        if any(one >= other for one, other in pairwise(paths)):
            raise InvalidManifest("the files are not ordered by path, or two of them have one path")
        folders = {path[:place] for path in paths for place, letter in enumerate(path) if letter == "/"}
        if not folders.isdisjoint(paths):
            raise InvalidManifest(f"{min(folders.intersection(paths))!r} is both a file and a folder"[:200])

    def _check_parents(self) -> None:
        known = {("trained_on", self.base)}
        for parent in self.parents:
            if parent.relation not in RELATIONS:
                raise InvalidManifest(f"relation {parent.relation!r}; expected one of {', '.join(RELATIONS)}"[:200])
            if (parent.relation, parent.digest) in known:
                raise InvalidManifest(f"the parent {parent.relation} {parent.digest} stands twice, or is the base")
            known.add((parent.relation, parent.digest))
            weight = parent.weight
            if weight is not None and (
                parent.relation != "merged_from" or type(weight) not in (int, float) or not math.isfinite(weight)
            ):
                raise InvalidManifest(f"weight {weight!r} of {parent.relation}: a number, and of merges alone"[:200])


def check_file_path(path: str) -> str:
    """The path itself where it is relative, with `/`, and stays below its folder.

    Raises:
        InvalidManifest
    """
    parts = path.split("/") if isinstance(path, str) else []
    if (
        not parts
        or len(path) > MAX_FILE_PATH
        or _NOT_IN_A_PATH.search(path)
        or any(part in ("", ".", "..") for part in parts)
        or (len(parts[0]) == 2 and parts[0][1] == ":")
    ):
        raise InvalidManifest(f"file path {path!r} is not a plain relative path"[:200])
    return path


def is_role(text: str) -> bool:
    """Whether a component may be called so."""
    return _ROLE.fullmatch(text) is not None
