"""The two sides of a compatibility question out of the catalog: an adapter, and a base version. Layouts,
configurations, forms and weights are content-addressed, so what was read of one stays in mind for the next
question."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Connection, and_, bindparam, or_, select

from registry.catalog.blobs import read_layout
from registry.catalog.descriptions import descriptions_of
from registry.catalog.forms import form_of_version
from registry.catalog.tables import (
    architecture,
    artifact,
    component,
    finding,
    layout,
    lineage,
    lora_config,
    version,
    version_blob,
    version_file,
)
from registry.compat.case import AdapterSide, ModelSide, Weights
from registry.core.adapter_config import AdapterConfig, read_adapter_config
from registry.core.adapter_names import Target, is_adapter_tensor, targets_of
from registry.core.digest import DIGEST_BYTES, unpack_digests
from registry.core.errors import InvalidInput
from registry.core.findings import Finding
from registry.core.layout import Layout
from registry.core.model_form import LIVE_NAMES, ROUNDED, ModelForm, form_of_layout
from registry.core.tensor_names import base_name
from registry.core.zeros import zero_tensors
from registry.formats.paths import ADAPTER_CONFIG
from registry.operations.base_fit import live_names_by_component
from registry.operations.context import Context
from registry.operations.reading import blob_bytes

T = TypeVar("T")

PROBE = "probe"
_MOST_TWINS = 3


class _Kept:
    """The newest results of one kind, by key; safe to use from several threads."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._found: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        with self._lock:
            if key in self._found:
                self._found.move_to_end(key)
                kept: T = self._found[key]
                return kept
        made = make()
        with self._lock:
            self._found[key] = made
            if len(self._found) > self._most:
                self._found.popitem(last=False)
        return made


_layouts = _Kept(128)
_targets = _Kept(512)
_forms = _Kept(64)
_configs = _Kept(512)
_weights = _Kept(32)
_zeros = _Kept(512)

# Made once: to put a statement together takes longer than to run it.
_FACTS = (
    select(
        version.c.kind,
        version.c.number,
        version.c.base_id,
        version.c.peft_version,
        artifact.c.namespace,
        artifact.c.name,
        lora_config.c.document,
        architecture.c.digest.label("form"),
    )
    .join(artifact, artifact.c.id == version.c.artifact_id)
    .outerjoin(lora_config, lora_config.c.id == version.c.lora_config_id)
    .outerjoin(architecture, architecture.c.id == version.c.architecture_id)
    .where(version.c.id == bindparam("version_id"))
)
_COMPONENTS = (
    select(component.c.role, component.c.layout_id, component.c.digests, layout.c.digest.label("layout"))
    .join(layout, layout.c.id == component.c.layout_id)
    .where(component.c.version_id == bindparam("version_id"), component.c.role.in_(("adapter", "model")))
)
_FILES = select(version_file.c.path, version_file.c.sha256).where(version_file.c.version_id == bindparam("version_id"))
_NONFINITE = select(finding.c.subject).where(finding.c.version_id == bindparam("version_id"), finding.c.code == "C17")
_CASTS = (
    select(artifact.c.namespace, artifact.c.name, version.c.number)
    .join(version, version.c.artifact_id == artifact.c.id)
    .join(
        lineage,
        or_(
            and_(lineage.c.child_id == bindparam("version_id"), lineage.c.parent_id == version.c.id),
            and_(lineage.c.parent_id == bindparam("version_id"), lineage.c.child_id == version.c.id),
        ),
    )
    .where(lineage.c.relation == "converted_from")
)


@dataclass(frozen=True)
class _Facts:
    """What the catalog says of one version.

    Attributes:
        components: `adapter` and `model`, as rows.
        described: digests of the blobs that describe it, by role.
    """

    row: Any
    components: Mapping[str, Any]
    described: Mapping[str, str]

    @property
    def reference(self) -> str:
        return f"{self.row.namespace}/{self.row.name}@{self.row.number}"


class Sides:
    """Versions as the sides of compatibility questions, from one snapshot of the catalog. No weight is read."""

    def __init__(self, context: Context, connection: Connection) -> None:
        self._blobs = context.store.blobs
        self._connection = connection
        self._known: dict[int, _Facts] = {}

    def adapter(self, version_id: int) -> AdapterSide:
        """An adapter, or the one within a checkpoint.

        Raises:
            InvalidInput: the version holds none.
        """
        facts = self._facts(version_id)
        row = facts.components.get("adapter") or facts.components.get("model")
        if facts.row.kind == "base" or row is None:
            raise InvalidInput(f"{facts.reference} is a {facts.row.kind}; give an adapter, and this one as its base")
        its_layout = _layouts.get(row.layout, lambda: read_layout(self._connection, row.layout_id))
        digests = unpack_digests(bytes(row.digests))
        if facts.row.kind != "adapter":
            its_layout, digests = _adapter_part(its_layout, digests)
            if not its_layout.tensors:
                raise InvalidInput(f"{facts.reference} holds no adapter, so there is nothing to check")
        files = files_of(self._connection, version_id)
        config = self._config(facts, files)
        targets, read = _targets_of(row.layout, its_layout, config, facts.row.kind)
        base = facts.row.base_id
        form = self.form(version_id) if facts.row.kind == "adapter" else None
        has_probe = PROBE in facts.described
        return AdapterSide(
            reference=facts.reference,
            layout=its_layout,
            config=config,
            targets=targets,
            read=read,
            nonfinite=frozenset(self._connection.execute(_NONFINITE, {"version_id": version_id}).scalars()),
            zeros=_zeros.get((row.layout, row.digests), lambda: zero_tensors(zip(its_layout, digests, strict=True))),
            weights=None if base is None else self.weights(base),
            form=form if form is not None or base is None else self.form(base),
            written_by=facts.row.peft_version,
            files=files,
            twins=() if has_probe or facts.row.kind != "adapter" else self._twins(version_id, row),
            has_probe=has_probe,
        )

    def base(self, version_id: int) -> int | None:
        """The base that a version was trained on."""
        found: int | None = self._facts(version_id).row.base_id
        return found

    def model(self, version_id: int) -> ModelSide:
        """A base version, or a checkpoint, as the model of a question.

        Raises:
            InvalidInput: it is an adapter, or has no component `model`.
        """
        facts = self._facts(version_id)
        if facts.row.kind == "adapter":
            raise InvalidInput(f"{facts.reference} is an adapter; give the base that it is to be loaded into")
        form = self.form(version_id)
        if form is None:
            raise InvalidInput(f"{facts.reference} has no component model, so nothing fits it")
        weights = self.weights(version_id)
        if weights is not None:
            casts = self._connection.execute(_CASTS, {"version_id": version_id})
            weights = replace(weights, cast_of=frozenset(f"{one.namespace}/{one.name}@{one.number}" for one in casts))
        return ModelSide(
            reference=facts.reference,
            form=form,
            weights=weights,
            files=files_of(self._connection, version_id),
        )

    def model_or_none(self, version_id: int) -> ModelSide | None:
        """The same; None where it has no component `model` to compare with."""
        return self.model(version_id) if "model" in self._facts(version_id).components else None

    def weights(self, version_id: int) -> Weights | None:
        """The digests of a model's tensors by live name; None where the version has no model."""
        facts = self._facts(version_id)
        row = facts.components.get("model")
        if row is None:
            return None
        beside = facts.described.get(LIVE_NAMES), facts.described.get(ROUNDED)
        key = facts.reference, row.layout, row.digests, *beside
        return _weights.get(key, lambda: self._read_weights(facts, row))

    def _read_weights(self, facts: _Facts, row: Any) -> Weights:
        its_layout = _layouts.get(row.layout, lambda: read_layout(self._connection, row.layout_id))
        digests = unpack_digests(bytes(row.digests))
        rounded = self._rounded(facts, its_layout, digests)
        of_saved = {
            base_name(spec.name): (digest, spec.dtype, after)
            for spec, digest, after in zip(its_layout, digests, rounded, strict=True)
            if not is_adapter_tensor(spec.name)
        }
        try:
            return _by_live_name(facts.reference, of_saved, self._live_names(facts))
        except (ValueError, KeyError, TypeError, AttributeError):
            return _by_live_name(facts.reference, of_saved, None)  # a map of another program

    def _facts(self, version_id: int) -> _Facts:
        if version_id not in self._known:
            asked = {"version_id": version_id}
            self._known[version_id] = _Facts(
                self._connection.execute(_FACTS, asked).one(),
                {row.role: row for row in self._connection.execute(_COMPONENTS, asked)},
                descriptions_of(self._connection, version_id),
            )
        return self._known[version_id]

    def form(self, version_id: int) -> ModelForm | None:
        """The modules of a version's model: as recorded, else as far as names and shapes of its tensors tell."""
        facts = self._facts(version_id)
        if facts.row.form is not None:
            return _forms.get(facts.row.form, lambda: _stored_form(self._connection, version_id))
        row = facts.components.get("model")
        if facts.row.kind == "adapter" or row is None:
            return None
        its_layout = _layouts.get(row.layout, lambda: read_layout(self._connection, row.layout_id))
        names = self._live_names(facts)
        try:
            return _forms.get((row.layout, facts.described.get(LIVE_NAMES)), lambda: form_of_layout(its_layout, names))
        except (ValueError, KeyError, TypeError, AttributeError):
            return form_of_layout(its_layout)

    def _live_names(self, facts: _Facts) -> Mapping[str, Any] | None:
        """The map from saved to live names of a version's model, if it was recorded."""
        digest = facts.described.get(LIVE_NAMES)
        if digest is None:
            return None
        try:
            found = live_names_by_component(blob_bytes(self._blobs, digest)).get("model")
        except (ValueError, KeyError, TypeError, AttributeError):
            return None  # of another program; then the saved names are what is known
        return found if isinstance(found, Mapping) else None

    def _rounded(self, facts: _Facts, its_layout: Layout, digests: tuple[str, ...]) -> list[str | None]:
        """Digests after rounding to bfloat16: those that the push kept, and of a bfloat16 tensor its own."""
        own = [digest if spec.dtype == "BF16" else None for spec, digest in zip(its_layout, digests, strict=True)]
        described = facts.described.get(ROUNDED)
        if described is None:
            return own
        packed = blob_bytes(self._blobs, described)
        if len(packed) != DIGEST_BYTES * len(its_layout):
            return own
        return [
            mine or (None if not int(one, 16) else one) for mine, one in zip(own, unpack_digests(packed), strict=True)
        ]

    def _config(self, facts: _Facts, files: Mapping[str, str]) -> AdapterConfig | None:
        document = facts.row.document
        if document is None:
            return None
        config = _configs.get(document, lambda: read_adapter_config(document.encode(), "the configuration"))
        several = len(config.rank_pattern) > 1 or len(config.alpha_pattern) > 1
        if several and ADAPTER_CONFIG in files and self._blobs.contains(files[ADAPTER_CONFIG]):
            # The catalog sorts keys, and of two patterns that match the first one counts.
            digest = files[ADAPTER_CONFIG]
            return _configs.get(digest, lambda: read_adapter_config(blob_bytes(self._blobs, digest), ADAPTER_CONFIG))
        return config

    def _twins(self, version_id: int, row: Any) -> tuple[str, ...]:
        asked = {"version_id": version_id, "layout_id": row.layout_id, "digests": row.digests}
        return tuple(
            f"{one.namespace}/{one.name}@{one.number} "
            f"(lora_alpha {one.lora_alpha:g}, use_rslora {str(bool(one.use_rslora)).lower()})"
            for one in self._connection.execute(_TWINS, asked)
        )


def files_of(connection: Connection, version_id: int) -> dict[str, str]:
    """sha256 of a version's files, by path."""
    return {row.path: row.sha256 for row in connection.execute(_FILES, {"version_id": version_id})}


def _by_live_name(
    reference: str, of_saved: Mapping[str, tuple[str, str, str | None]], names: Mapping[str, Any] | None
) -> Weights:
    """Digest, dtype and rounded digest by the names that tensors have once a library loaded them."""
    found: dict[str, tuple[str, str, str | None]] = {}
    gone: set[str] = set()
    names = names or {"renamed": {}, "converted": [], "tied": {}}
    for one in names["converted"]:
        saved = [name for group in one["saved"] for name in group]
        gone.update(saved)
        parts = [of_saved[name] for name in saved if name in of_saved]
        if parts and len(parts) == len(saved):
            # Made of several: equal where all of them are, in their order.
            whole = "+".join(part[0] for part in parts)
            after = "+".join(part[2] or "" for part in parts) if all(part[2] for part in parts) else None
            found |= {name: (whole, parts[0][1], after) for name, _ in one["live"]}
    found |= {names["renamed"].get(name, name): value for name, value in of_saved.items() if name not in gone}
    found |= {name: found[other] for name, other in names["tied"].items() if other in found and name not in found}
    return Weights(
        reference,
        {name: value[0] for name, value in found.items()},
        {name: value[1] for name, value in found.items()},
        {name: value[2] for name, value in found.items() if value[2] is not None},
    )


def _stored_form(connection: Connection, version_id: int) -> ModelForm | None:
    stored = form_of_version(connection, version_id)
    return None if stored is None else stored[1]


def _adapter_part(whole: Layout, digests: tuple[str, ...]) -> tuple[Layout, tuple[str, ...]]:
    own = [pair for pair in zip(whole, digests, strict=True) if is_adapter_tensor(pair[0].name)]
    return Layout(tuple(spec for spec, _ in own)), tuple(digest for _, digest in own)


def _targets_of(
    layout_digest: str, its_layout: Layout, config: AdapterConfig | None, kind: str
) -> tuple[tuple[Target, ...], tuple[Finding, ...]]:
    key = layout_digest, kind == "adapter", None if config is None else json.dumps(config.document)
    return _targets.get(key, lambda: targets_of(its_layout, config))


def _twins_statement() -> Any:
    """Earlier adapters with the same tensors, which are then in the same blob, and another scaling."""
    own, theirs = lora_config.alias("own"), lora_config.alias("theirs")
    asked: ColumnElement[int] = bindparam("version_id")
    a_blob = (
        select(version_blob.c.blob_id)
        .where(version_blob.c.version_id == asked, version_blob.c.role.in_(("tensors", "reused")))
        .limit(1)
        .scalar_subquery()
    )
    mine = select(version.c.lora_config_id).where(version.c.id == asked).scalar_subquery()
    return (
        select(artifact.c.namespace, artifact.c.name, version.c.number, theirs.c.lora_alpha, theirs.c.use_rslora)
        .join(artifact, artifact.c.id == version.c.artifact_id)
        .join(component, component.c.version_id == version.c.id)
        .join(theirs, theirs.c.id == version.c.lora_config_id)
        .join(own, own.c.id == mine)
        .where(
            version.c.id.in_(select(version_blob.c.version_id).where(version_blob.c.blob_id == a_blob)),
            version.c.id < asked,
            version.c.state == "present",
            component.c.role == "adapter",
            component.c.layout_id == bindparam("layout_id"),
            component.c.digests == bindparam("digests"),
            theirs.c.lora_alpha.is_not(None),
            or_(theirs.c.lora_alpha != own.c.lora_alpha, theirs.c.use_rslora != own.c.use_rslora),
        )
        .order_by(version.c.id)
        .limit(_MOST_TWINS)
    )


_TWINS = _twins_statement()
