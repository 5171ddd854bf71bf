"""Metadata and metrics: the newest value of each key as a row, all of them as events."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from registry import Registry
from registry.core.annotations import MetadataValue
from registry.core.errors import InvalidInput, VersionNotFound
from registry.core.event import Event
from tests.catalog.artifacts import tensor_file

NAME = "team/walk"


@pytest.fixture
def pushed(registry: Registry, tmp_path: Path) -> Registry:
    registry.push(tensor_file(tmp_path, 1), NAME)
    return registry


def said(registry: Registry, kind: str) -> list[Event]:
    return [event for event in registry.events(NAME) if event.kind == kind]


def test_the_newest_value_is_the_version_and_all_are_its_history(pushed: Registry) -> None:
    pushed.annotate(NAME, metadata={"task": "walk", "seed": 3})
    pushed.annotate(NAME, metadata={"task": "run", "note": "x"})
    assert pushed.get(NAME).metadata == {"task": "run", "seed": 3, "note": "x"}
    first, second = said(pushed, "metadata")
    assert first.payload == {"task": {"text": "walk", "number": None}, "seed": {"text": "3", "number": 3}}
    assert set(second.payload) == {"task", "note"}
    assert first.version == second.version == 1


def test_the_same_metadata_again_is_no_event(pushed: Registry) -> None:
    pushed.annotate(NAME, metadata={"task": "walk", "seed": 3})
    pushed.annotate(NAME, metadata={"task": "walk", "seed": 3})
    assert len(said(pushed, "metadata")) == 1
    pushed.annotate(NAME, metadata={"task": "walk", "seed": 4})
    assert said(pushed, "metadata")[-1].payload == {"seed": {"text": "4", "number": 4}}


def test_a_number_and_its_text_are_two_values(pushed: Registry) -> None:
    pushed.annotate(NAME, metadata={"k": 3})
    pushed.annotate(NAME, metadata={"k": "3"})
    assert pushed.get(NAME).metadata == {"k": "3"}
    pushed.annotate(NAME, metadata={"k": MetadataValue("3.0", 3.0)})
    assert pushed.get(NAME).metadata == {"k": 3.0}
    assert len(said(pushed, "metadata")) == 3


def test_metadata_comes_back_as_it_was_given(pushed: Registry) -> None:
    values: list[tuple[object, object]] = [
        (True, "true"),
        (False, "false"),
        (10**15 - 1, 10**15 - 1),
        (2**60, 2**60),
        (2**53 + 1, 2**53 + 1),
        (0.1, 0.1),
        (1e-320, 1e-320),
        (1.7976931348623157e308, 1.7976931348623157e308),
        ("", ""),
        ("'; DROP TABLE version; --", "'; DROP TABLE version; --"),
        ("100%_\\", "100%_\\"),
        ("größer ≥ 🙂", "größer ≥ 🙂"),
        ("🙂" * 500, "🙂" * 500),
        ("a\nb\tc", "a\nb\tc"),
    ]
    pushed.annotate(NAME, metadata={f"k{place}": given for place, (given, _) in enumerate(values)})
    found = pushed.get(NAME).metadata
    for place, (_, kept) in enumerate(values):
        assert found[f"k{place}"] == kept
        assert type(found[f"k{place}"]) is type(kept)


def test_metadata_that_cannot_be_kept_is_refused_whole(pushed: Registry) -> None:
    wrong: list[dict[str, object]] = [{"k": "x" * 501}, {"k": "a\0b"}, {"k": "\ud800"}, {"k": math.nan}, {"k": None}]
    wrong += [{"": "x"}, {"a b": "x"}, {"k" * 129: 1}]
    for metadata in wrong:
        with pytest.raises(InvalidInput):
            pushed.annotate(NAME, metadata={"good": 1, **metadata})
    assert pushed.get(NAME).metadata == {}
    assert said(pushed, "metadata") == []


def test_every_metric_is_an_event_and_the_newest_is_the_version(pushed: Registry) -> None:
    pushed.annotate(NAME, metrics={"reward": 1.0, "loss": 0.5}, step=10)
    pushed.annotate(NAME, metrics={"reward": 1.0}, step=10)
    pushed.annotate(NAME, metrics={"reward": 3.5})
    assert pushed.get(NAME).metrics == {"reward": 3.5, "loss": 0.5}
    assert [event.payload for event in said(pushed, "metrics")] == [
        {"values": {"reward": 1.0, "loss": 0.5}, "step": 10},
        {"values": {"reward": 1.0}, "step": 10},
        {"values": {"reward": 3.5}, "step": None},
    ]


def test_a_metric_comes_back_as_it_was_given(pushed: Registry) -> None:
    values = [math.inf, -math.inf, math.nan, 0.0, 0.1, 5e-324, 1.7976931348623157e308, 2**53 + 2]
    pushed.annotate(NAME, metrics={f"m{place}": value for place, value in enumerate(values)})
    found = pushed.get(NAME).metrics
    assert [str(found[f"m{place}"]) for place in range(len(values))] == [str(float(value)) for value in values]


def test_a_metric_changes_between_finite_and_not(pushed: Registry) -> None:
    for value in (1.0, math.nan, math.inf, 2.0):
        pushed.annotate(NAME, metrics={"m": value})
        assert str(pushed.get(NAME).metrics["m"]) == str(value)
    written = [event.payload["values"]["m"] for event in said(pushed, "metrics")]
    assert written == [1.0, "NaN", "Infinity", 2.0]


def test_values_of_any_size_leave_the_outbox(pushed: Registry) -> None:
    """A float from 2**53 on is written without a point, and read again it must not become an integer."""
    pushed.annotate(NAME, metrics={"flops": 1e17, "more": 123456789012345680.0}, metadata={"n": 2**60})
    context = pushed._context
    with context.database.writing() as connection:
        from sqlalchemy import select

        from registry.catalog.tables import event, outbox

        connection.execute(
            outbox.insert().from_select(["artifact_id", "seq"], select(event.c.artifact_id, event.c.seq))
        )
    assert context.flush_outbox() == len(pushed.events(NAME))


def test_nothing_said_is_no_event(pushed: Registry) -> None:
    before = pushed.events(NAME)
    pushed.annotate(NAME)
    pushed.annotate(NAME, metadata={}, metrics={}, step=3)
    assert pushed.events(NAME) == before


def test_metadata_does_not_touch_what_the_registry_knows(pushed: Registry) -> None:
    before = pushed.get(NAME)
    pushed.annotate(NAME, metadata={"kind": "adapter", "size": 1, "peft_version": "9.9", "version": 7})
    after = pushed.get(NAME)
    assert (after.kind, after.size, after.peft_version, after.version) == (before.kind, before.size, None, 1)
    assert [found.reference for found in pushed.find("meta.size = 1", f"size = {before.size}")] == [f"{NAME}@1"]


def test_a_version_that_is_not_there_is_not_annotated(pushed: Registry) -> None:
    with pytest.raises(VersionNotFound):
        pushed.annotate(f"{NAME}@2", metadata={"k": 1})
