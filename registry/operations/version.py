"""A version in the form that users see: the catalog's record with what has been said of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from registry.operations.inspect import Found


@dataclass(frozen=True)
class Version:
    """One immutable version, with what has been said of it.

    Attributes:
        name: `namespace/name`.
        version: its number.
        digest: sha256 of its manifest, hex.
        content_digest: equal for equal adapters, however they were saved.
        kind: `adapter`, `base` or `checkpoint`.
        base: `namespace/name@number`, if a base was declared.
        r, lora_alpha: as configured; None where no configuration came with the tensors.
        target_modules: sorted names, or one regular expression.
        peft_version: that wrote the adapter; None: unknown.
        size: bytes of its files.
        created_at: UTC.
        findings: how many errors and warnings its push noticed.
        metadata: text or numbers, the newest value of each key.
        metrics: the newest value of each key.
    """

    name: str
    version: int
    digest: str
    content_digest: str
    kind: str
    tags: tuple[str, ...]
    base: str | None
    peft_type: str | None
    r: int | None
    lora_alpha: float | None
    use_rslora: bool | None
    use_dora: bool | None
    target_modules: tuple[str, ...] | str | None
    peft_version: str | None
    size: int
    created_at: datetime
    created_by: str
    message: str | None
    findings: int
    metadata: Mapping[str, str | float | int]
    metrics: Mapping[str, float]

    @property
    def reference(self) -> str:
        """`namespace/name@number`, which always means this version."""
        return f"{self.name}@{self.version}"


def as_version(found: Found) -> Version:
    """The catalog's record in the form that users see."""
    record = found.record
    return Version(
        name=record.name,
        version=record.number,
        digest=record.digest,
        content_digest=record.content_digest,
        kind=record.kind,
        tags=record.tags,
        base=record.base,
        peft_type=record.peft_type,
        r=record.r,
        lora_alpha=record.lora_alpha,
        use_rslora=record.use_rslora,
        use_dora=record.use_dora,
        target_modules=record.target_modules,
        peft_version=record.peft_version,
        size=record.size,
        created_at=record.created_at,
        created_by=record.created_by,
        message=record.message,
        findings=record.findings,
        metadata={key: value.plain for key, value in found.metadata.items()},
        metrics={key: value.number for key, value in found.metrics.items()},
    )
