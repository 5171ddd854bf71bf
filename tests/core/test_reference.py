"""The grammar itself is in tests/vectors/references.json; here is what refusals say, and the smaller functions."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from registry.core.errors import InvalidReference
from registry.core.reference import (
    MAX_PART,
    Reference,
    check_new_tag,
    check_tag,
    parse_artifact,
    parse_moment,
    parse_push_target,
    parse_reference,
    shown,
)


def refusal(text: Any) -> str:
    with pytest.raises(InvalidReference) as caught:
        parse_reference(text)
    message = str(caught.value)
    assert message.isprintable(), "one line, and nothing that a terminal obeys"
    return message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("perturb", "expected namespace/name with one '/', found 0"),
        ("a/b/c", "expected namespace/name with one '/', found 2"),
        ("../b", "the namespace '..' must be"),
        ("a/..", "the name '..' must be"),
        ("a/b..c", "have no '..'"),
        ("a/../b", "found 2"),
        ("", "found 0"),
        ("/", "the namespace '' must be"),
        ("Walk/x", "the namespace 'Walk' must be of a-z"),
        ("walk/X", "the name 'X' must be of a-z"),
        ("a/b\x1b[31m", r"x1b[31m' must be"),
        ("a/b\n", r"n' must be"),
        ("a/b\0", r"x00' must be"),
        ("a/b\u202e", r"u202e' must be"),
        (f"a/{'x' * 300}", "the name has 300 characters; 128 is the most"),
        (f"{'x' * 300}/a", "the namespace has 300 characters; 128 is the most"),
        (f"a/b:{'x' * 300}", "the tag has 300 characters; 128 is the most"),
        ("x" * 10_000, "has 10000 characters; 512 is the most"),
        ("a/b:12", "the tag '12' is digits only; write @12 for version 12"),
        ("a/b:", "the tag '' must be of letters"),
        ("a/b@0", "'@0' is neither a number from 1 (@3) nor a digest"),
        ("a/b@v1", "'@v1' is neither"),
        ("a/b@sha256:abc", "'@sha256:abc' is neither a number from 1 (@3) nor a digest (@sha256: and 4 to 64 hex)"),
        ("a/b:t@3", "both a tag and a pin"),
        ("a/b@3@{2026-11-01}", "a pinned version does not change, so it takes no @{time}"),
        ("a/b:t@{tomorrow}", "'tomorrow' is not a date or time such as 2026-11-01 or 2026-11-01T12:30Z"),
        ("a/b:t@{0001-01-01T00:00+23:00}", "is not a date or time"),
        (7, "a reference is text such as 'walk/perturb:prod', not int"),
        (None, "not NoneType"),
        (b"a/b", "not bytes"),
    ],
)
def test_a_bad_reference_is_refused_and_says_which_part_is_wrong(text: Any, reason: str) -> None:
    assert reason in refusal(text)


@pytest.mark.parametrize(
    "text", ["a/b:t@{2026-11-01}\n", "a/b@{2026-11-01}\n", "a/b@{2026-11-01}\0", "\na/b@{2026-11-01}"]
)
def test_a_control_character_is_not_lost_beside_a_time(text: str) -> None:
    refusal(text)


def test_latest_is_the_same_as_no_tag() -> None:
    assert parse_reference("a/b:latest") == parse_reference("a/b") == Reference("a", "b")
    assert parse_reference("a/b:latest@{2026-11-01}") == parse_reference("a/b@{2026-11-01}")


def test_a_reference_reads_the_same_with_the_scheme() -> None:
    for text in ("a/b", "a/b:t", "a/b@3", "a/b@sha256:0123", "a/b:t@{2026-11-01}"):
        assert parse_reference(f"registry://{text}") == parse_reference(text)


def test_a_reference_prints_as_it_is_written() -> None:
    for text in ("a/b", "a/b:t", "a/b@3", "a/b@sha256:0123", "a/b:t@{2026-11-01T12:00:00+00:00}"):
        assert str(parse_reference(text)) == text
    assert parse_reference("a/b:t").artifact == "a/b"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-11-01", datetime(2026, 11, 1, tzinfo=UTC)),
        ("2026-11-01T12:30", datetime(2026, 11, 1, 12, 30, tzinfo=UTC)),
        ("2026-11-01 12:30:15", datetime(2026, 11, 1, 12, 30, 15, tzinfo=UTC)),
        ("2026-11-01T12:30Z", datetime(2026, 11, 1, 12, 30, tzinfo=UTC)),
        ("2026-11-01T12:30+02:00", datetime(2026, 11, 1, 10, 30, tzinfo=UTC)),
        ("2026-11-01T00:30:00.000001-11:30", datetime(2026, 11, 1, 12, 0, 0, 1, tzinfo=UTC)),
    ],
)
def test_a_time_is_utc_unless_it_says_otherwise(text: str, expected: datetime) -> None:
    found = parse_moment(text, "x")
    assert (found, found.utcoffset()) == (expected, timedelta(0))


def test_times_that_print_alike_in_other_zones_are_one_moment() -> None:
    here = datetime(2026, 11, 1, 14, tzinfo=timezone(timedelta(hours=2)))
    assert parse_reference(f"a/b@{{{here.isoformat()}}}") == parse_reference("a/b@{2026-11-01T12:00}")


def test_names_are_namespace_and_name() -> None:
    assert parse_artifact("walk/perturb") == ("walk", "perturb")
    assert parse_artifact("0/a.b-c_d") == ("0", "a.b-c_d")
    with pytest.raises(InvalidReference):
        parse_artifact("walk/perturb:prod")


@pytest.mark.parametrize("tag", ["prod", "v1", "V1.0-rc_2", "_x", "1a", "a" * MAX_PART, "latest"])
def test_a_tag_is_letters_digits_dots_and_dashes(tag: str) -> None:
    assert check_tag(tag) == tag


@pytest.mark.parametrize(
    "tag", ["", "12", "0", ".a", "a.", "-a", "a-", "a..b", "a/b", "a:b", "a@b", "a b", "ä", "\u0663", "a\n", "a" * 129]
)
def test_any_other_tag_is_refused(tag: str) -> None:
    with pytest.raises(InvalidReference):
        check_tag(tag)


def test_latest_cannot_be_set() -> None:
    assert check_new_tag("prod") == "prod"
    with pytest.raises(InvalidReference, match="'latest' always means the highest version"):
        check_new_tag("latest")


def test_a_push_goes_to_a_name_and_maybe_a_tag() -> None:
    assert parse_push_target("a/b") == ("a", "b", None)
    assert parse_push_target("registry://a/b:t") == ("a", "b", "t")


@pytest.mark.parametrize("text", ["a/b@1", "a/b@sha256:0123", "a/b@{2026-11-01}", "a/b:t@{2026-11-01}"])
def test_a_push_to_a_version_that_is_there_is_refused(text: str) -> None:
    with pytest.raises(InvalidReference, match="a push makes a new version"):
        parse_push_target(text)


@pytest.mark.parametrize("text", ["a/b:latest", "registry://a/b:latest"])
def test_a_push_to_latest_is_refused(text: str) -> None:
    with pytest.raises(InvalidReference, match="latest"):
        parse_push_target(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain ü 😀", "plain ü 😀"),
        ("a\nb", r"a\nb"),
        ("\x1b[2J", r"\x1b[2J"),
        ("\u202eb", r"\u202eb"),
        ("\ud800", r"\ud800"),
        ("x" * 61, "x" * 57 + "..."),
        ("x" * 60, "x" * 60),
    ],
)
def test_text_from_outside_is_shown_escaped_and_cut(text: str, expected: str) -> None:
    assert shown(text) == expected
