"""The JSON documents of the commands: plain data from the facade's values. Times are ISO 8601 in UTC, digests carry
their algorithm, and numbers that JSON does not have are the strings `NaN`, `Infinity` and `-Infinity`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from registry.core.event import format_moment, number_to_json
from registry.operations.version import as_version

if TYPE_CHECKING:
    from registry.core.architecture import Architecture
    from registry.core.event import Event
    from registry.core.findings import Finding
    from registry.core.layout import TensorSpec
    from registry.operations.difference import ComponentDifference, ModuleSide, Norms, ValueDifference
    from registry.operations.exporting import ExportResult
    from registry.operations.importing import ImportResult
    from registry.registry import (
        Compatibility,
        Details,
        Difference,
        Fit,
        Lineage,
        Needs,
        PullResult,
        PushResult,
        Version,
    )


def sha256(digest: str) -> str:
    return f"sha256:{digest}"


def push_document(result: PushResult) -> dict[str, Any]:
    return {
        "name": result.name,
        "version": result.version,
        "digest": sha256(result.digest),
        "kind": result.kind,
        "created": result.created,
        "tags": list(result.tags),
        "bytes_total": result.bytes_total,
        "bytes_new": result.bytes_new,
        "same_content_as": result.same_content_as,
        "findings": [finding_document(finding) for finding in result.findings],
        "notes": list(result.notes),
    }


def pull_document(result: PullResult) -> dict[str, Any]:
    name, _, number = result.reference.rpartition("@")
    return {
        "name": name,
        "version": int(number),
        "digest": sha256(result.digest),
        "path": str(result.path),
        "files": [str(path) for path in result.files],
        "bytes": result.bytes,
    }


def export_document(result: ExportResult) -> dict[str, Any]:
    return {
        "path": str(result.path),
        "bytes": result.bytes,
        "blobs": result.blobs,
        "versions": [
            {
                "reference": one.reference,
                "digest": sha256(one.digest),
                "asked": one.asked,
                "external": one.external,
            }
            for one in result.versions
        ],
    }


def import_document(result: ImportResult) -> dict[str, Any]:
    return {
        "registry": result.registry,
        "versions": [
            {
                "source": one.source,
                "reference": one.reference,
                "digest": sha256(one.digest),
                "asked": one.asked,
                "created": one.created,
                "external": one.external,
                "bytes_new": one.bytes_new,
            }
            for one in result.versions
        ],
        "tags": list(result.tags),
        "notes": list(result.notes),
    }


def version_document(version: Version) -> dict[str, Any]:
    """One entry of `registry list --json`; `findings` is their number."""
    targets = version.target_modules
    return {
        "name": version.name,
        "version": version.version,
        "digest": sha256(version.digest),
        "content_digest": sha256(version.content_digest),
        "kind": version.kind,
        "tags": list(version.tags),
        "peft_type": version.peft_type,
        "r": version.r,
        "lora_alpha": _number(version.lora_alpha),
        "use_rslora": version.use_rslora,
        "use_dora": version.use_dora,
        "target_modules": list(targets) if isinstance(targets, tuple) else targets,
        "base": version.base,
        "peft_version": version.peft_version,
        "size": version.size,
        "created_at": format_moment(version.created_at),
        "created_by": version.created_by,
        "message": version.message,
        "metadata": dict(version.metadata),
        "metrics": {key: number_to_json(value) for key, value in version.metrics.items()},
        "findings": version.findings,
    }


def details_document(details: Details, architecture: Architecture | None, *, tensors: bool) -> dict[str, Any]:
    """`registry show --json`: what `list` says, with findings in full, files, components, environment and history."""
    record = details.found.record
    pushed = next((event.payload for event in details.events if event.kind == "pushed"), {})
    document = version_document(as_version(details.found)) | {
        "base_digest": None if record.base_digest is None else sha256(record.base_digest),
        "base_model": record.base_model,
        "lora_dropout": record.lora_dropout,
        "bytes_new": record.bytes_new,
        "environment": dict(pushed.get("environment", {})),
        "origin": pushed.get("origin"),
        "external": bool(details.contents.external),
        "architecture": None
        if architecture is None
        else {"class": architecture.class_name, "arguments": _json(architecture.arguments)},
        "files": [
            {"path": file.path, "digest": sha256(file.sha256), "size": file.size, "component": file.role}
            for file in details.contents.files
        ],
        "components": [
            {
                "name": component.role,
                "tensors": len(component.layout),
                "parameters": component.layout.parameters,
                "bytes": component.layout.nbytes,
                "data": None if component.data is None else sha256(component.data),
            }
            for component in details.contents.components.values()
        ],
        "findings": [finding_document(finding) for finding in details.findings],
        "history": history_document(details.events),
    }
    if tensors:
        document["tensors"] = [
            {
                "component": component.role,
                "name": spec.name,
                "dtype": spec.dtype,
                "shape": list(spec.shape),
                "bytes": spec.nbytes,
                "digest": f"blake3:{digest}",
            }
            for component in details.contents.components.values()
            for spec, digest in zip(component.layout, component.tensors, strict=True)
        ]
    return document


def _json(value: Any) -> Any:
    """Plain data of Python as JSON has it: a tuple is a list."""
    if isinstance(value, Mapping):
        return {key: _json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    return number_to_json(value) if isinstance(value, float) else value


def finding_document(finding: Finding) -> dict[str, Any]:
    return {
        "code": finding.code,
        "severity": finding.severity,
        "subject": finding.subject,
        "message": finding.message,
        "expected": finding.expected,
        "found": finding.found,
        "mend": finding.mend,
    }


def compatibility_document(found: Compatibility) -> dict[str, Any]:
    """`registry check --json`."""
    return {
        "adapter": found.adapter,
        "model": found.model,
        "peft": found.peft,
        "purpose": found.purpose,
        "verdict": found.verdict,
        "matched": found.matched,
        "total": found.total,
        "findings": [finding_document(one) for one in found.findings],
    }


def fit_document(fit: Fit) -> dict[str, Any]:
    """One entry of `registry fits --json`."""
    return {
        **version_document(fit.version),
        "matched": fit.matched,
        "total": fit.total,
        "verdict": fit.verdict,
        "reason": fit.reason,
    }


def needs_document(found: Needs) -> dict[str, Any]:
    """`registry needs --json`: the fields of `Needs`, in their names."""
    from dataclasses import asdict

    document: dict[str, Any] = _json(asdict(found))
    return document


def history_document(events: Iterable[Event]) -> dict[str, Any]:
    """What was said of a version, oldest first, by subject."""
    history: dict[str, list[dict[str, Any]]] = {"metadata": [], "metrics": [], "tags": [], "notes": []}
    for event in events:
        said = {"at": format_moment(event.at), "by": event.actor}
        if event.kind == "metadata":
            history["metadata"] += [{**said, "key": key, "value": value["text"]} for key, value in _pairs(event)]
        elif event.kind == "metrics":
            step = event.payload.get("step")
            history["metrics"] += [
                {**said, "key": key, "value": value, "step": step} for key, value in event.payload["values"].items()
            ]
        elif event.tag is not None:
            history["tags"].append(tag_event_document(event))
        elif event.kind != "pushed":
            history["notes"].append(
                {**said, "kind": event.kind, "text": event.payload.get("text", event.payload.get("why"))}
            )
    return history


def _pairs(event: Event) -> Iterable[tuple[str, Mapping[str, Any]]]:
    return event.payload.items()


def tag_event_document(event: Event) -> dict[str, Any]:
    """One entry of a tag's history; `from` and `to` are version numbers, null for none."""
    moved = event.kind == "tag_moved"
    return {
        "at": format_moment(event.at),
        "by": event.actor,
        "tag": event.tag,
        "event": event.kind.removeprefix("tag_"),
        "from": event.payload.get("from") if event.kind in ("tag_moved", "tag_deleted") else event.version,
        "to": event.version if moved else None if event.kind == "tag_deleted" else event.version,
        "why": event.payload.get("why"),
    }


def lineage_document(lineage: Lineage) -> dict[str, Any]:
    """All edges around a version, those nearest to it first."""

    def edges(of: Iterable[Any]) -> list[dict[str, Any]]:
        return [
            {
                "child": lineage.names[edge.child_id],
                "parent": lineage.names[edge.parent_id],
                "relation": edge.relation,
                "weight": edge.weight,
            }
            for edge in of
        ]

    return {
        "reference": lineage.names[lineage.id],
        "ancestors": edges(lineage.ancestors),
        "descendants": edges(lineage.descendants),
        "removed": [lineage.names[one] for one in sorted(lineage.removed)],
    }


def difference_document(difference: Difference) -> dict[str, Any]:
    """`registry diff --json`; a member `a` or `b` is null where that version has no such thing."""
    return {
        "a": _compared(difference.a),
        "b": _compared(difference.b),
        "same_content": difference.same_content,
        "facts": _values(difference.facts),
        "config": _values(difference.config),
        "metadata": _values(difference.metadata),
        "metrics": _values(difference.metrics),
        "files": [
            {
                "path": one.path,
                "change": one.change,
                "a": None if one.a is None else {"digest": sha256(one.a.sha256), "size": one.a.size},
                "b": None if one.b is None else {"digest": sha256(one.b.sha256), "size": one.b.size},
            }
            for one in difference.files
        ],
        "weights": difference.weights,
        "components": [_component_difference(one) for one in difference.components],
        "notes": list(difference.notes),
    }


def _compared(version: Version) -> dict[str, Any]:
    return {
        "name": version.name,
        "version": version.version,
        "digest": sha256(version.digest),
        "content_digest": sha256(version.content_digest),
        "kind": version.kind,
    }


def _values(differences: Iterable[ValueDifference]) -> list[dict[str, Any]]:
    return [{"key": one.key, "change": one.change, "a": one.a, "b": one.b} for one in differences]


def _component_difference(component: ComponentDifference) -> dict[str, Any]:
    return {
        "name": component.role,
        "change": component.change,
        "tensors_a": component.count_a,
        "tensors_b": component.count_b,
        "same_tensors": component.same,
        "same_modules": component.same_modules,
        "values": _values(component.values),
        "modules": [
            {
                "module": one.module,
                "change": one.change,
                "a": _module_side(one.a),
                "b": _module_side(one.b),
                "norms": _norms(one.norms),
                "note": one.note,
            }
            for one in component.modules
        ],
        "tensors": [
            {
                "name": one.name,
                "change": one.change,
                "a": _spec(one.a),
                "b": _spec(one.b),
                "module": one.module,
                "norms": _norms(one.norms),
                "elements": one.elements,
                "note": one.note,
            }
            for one in component.tensors
        ],
    }


def _spec(spec: TensorSpec | None) -> dict[str, Any] | None:
    return None if spec is None else {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)}


def _module_side(side: ModuleSide | None) -> dict[str, Any] | None:
    return None if side is None else {"kind": side.kind, "r": side.rank, "scaling": _number(side.scaling)}


def _norms(norms: Norms | None) -> dict[str, Any] | None:
    if norms is None:
        return None
    return {
        "a": _number(norms.a),
        "b": _number(norms.b),
        "distance": _number(norms.distance),
        "relative": _number(norms.relative),
        "cosine": _number(norms.cosine),
    }


def _number(value: float | None) -> float | str | None:
    return None if value is None else number_to_json(value)
