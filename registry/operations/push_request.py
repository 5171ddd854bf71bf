"""What is asked of a push, checked before a byte is read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from registry.core.annotations import (
    MetadataValue,
    MetricValue,
    check_step,
    check_text,
    read_metadata,
    read_metrics,
)
from registry.core.errors import InvalidInput
from registry.core.manifest import KINDS, RELATIONS
from registry.core.reference import check_new_tag, parse_push_target, parse_reference, shown


@dataclass(frozen=True)
class Request:
    """A checked push request.

    Attributes:
        force: store what does not fit its base.
    """

    namespace: str
    name: str
    tags: tuple[str, ...]
    base: str | None
    kind: str | None
    parents: tuple[tuple[str, str, float | None], ...]
    metadata: Mapping[str, MetadataValue]
    metrics: Mapping[str, MetricValue]
    step: int | None
    message: str | None
    external: bool = False
    force: bool = False


def check_request(
    target: str,
    *,
    base: str | None = None,
    tags: Sequence[str] = (),
    metadata: Mapping[str, object] | None = None,
    metrics: Mapping[str, object] | None = None,
    step: int | None = None,
    kind: str | None = None,
    message: str | None = None,
    parents: Sequence[tuple[str, str, float | None]] = (),
    external: bool = False,
    force: bool = False,
) -> Request:
    """Checks all that can be checked before a byte is read.

    Raises:
        InvalidReference, InvalidInput
    """
    namespace, name, tag = parse_push_target(target)
    if isinstance(tags, str):
        raise InvalidInput(f"tags must be a list of texts, found the text '{shown(tags)}'")
    wanted = dict.fromkeys(check_new_tag(one) for one in (*((tag,) if tag else ()), *tags))
    if kind is not None and kind not in KINDS:
        raise InvalidInput(f"kind '{shown(str(kind))}'; expected one of {', '.join(KINDS)}")
    for relation, reference, weight in parents:
        if relation not in RELATIONS:
            raise InvalidInput(f"relation '{shown(str(relation))}'; expected one of {', '.join(RELATIONS)}")
        parse_reference(reference)
        if weight is not None and relation != "merged_from":
            raise InvalidInput(f"{relation} {reference}: only merged_from takes a weight, found {shown(repr(weight))}")
        if weight is not None and (type(weight) not in (int, float) or not math.isfinite(weight)):
            raise InvalidInput(f"{relation} {reference}: the weight {shown(repr(weight))} is no finite number")
    if base is not None:
        parse_reference(base)
    if message is not None:
        check_text(message, "message")
    return Request(
        namespace,
        name,
        tuple(wanted),
        base,
        kind,
        tuple(parents),
        read_metadata(metadata or {}),
        read_metrics(metrics or {}),
        check_step(step),
        message,
        external,
        force,
    )
