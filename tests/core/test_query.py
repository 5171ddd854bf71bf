from __future__ import annotations

import pytest

from registry.core.errors import InvalidQuery
from registry.core.query import FIELDS, MAX_CONDITIONS, SORTABLE, Condition, SortKey, parse_sort, parse_where


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("r>=8", [Condition("r", ">=", "8")]),
        ("  r  >=  8  ", [Condition("r", ">=", "8")]),
        ("r >= 8 and kind = adapter", [Condition("r", ">=", "8"), Condition("kind", "=", "adapter")]),
        ("r>=8 AND r<16 And r!=12", [Condition("r", ">=", "8"), Condition("r", "<", "16"), Condition("r", "!=", "12")]),
        ("r == 8", [Condition("r", "=", "8")]),
        ("target ~ q_proj", [Condition("target", "~", "q_proj")]),
        ("metric.reward > 900", [Condition("metric", ">", "900", "reward")]),
        ("meta.run.id = x", [Condition("meta", "=", "x", "run.id")]),
        ("meta.a/b-c = x", [Condition("meta", "=", "x", "a/b-c")]),
        ('message = "two words"', [Condition("message", "=", "two words")]),
        ("message = 'it\"s'", [Condition("message", "=", 'it"s')]),
        ('message = "" and r = 1', [Condition("message", "=", ""), Condition("r", "=", "1")]),
        ('message = "a and b = c"', [Condition("message", "=", "a and b = c")]),
        ("tag = and", [Condition("tag", "=", "and")]),
        ("created_at >= 2026-11-01T12:00Z", [Condition("created_at", ">=", "2026-11-01T12:00Z")]),
        ("metric.x = -1e-5", [Condition("metric", "=", "-1e-5", "x")]),
        ("name = walk/perturb", [Condition("name", "=", "walk/perturb")]),
    ],
)
def test_conditions_are_read(text: str, expected: list[Condition]) -> None:
    assert list(parse_where([text])) == expected


def test_several_texts_are_joined_by_and() -> None:
    assert parse_where(["r>=8 and r<16", "kind=base"]) == parse_where(["r>=8 and r<16 and kind=base"])
    assert parse_where([]) == ()


def test_a_condition_prints_as_it_can_be_read() -> None:
    for text in ("r >= 8", "meta.run = x", "metric.reward > 900"):
        assert [str(one) for one in parse_where([text])] == [text]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "cannot read"),
        ("r", "cannot read"),
        ("r >=", "cannot read"),
        (">= 8", "cannot read"),
        ("8 <= r", "cannot read"),
        ("r >= 8 and", "cannot read"),
        ("and r >= 8", "cannot read"),
        ("r >= 8 or r = 4", "'or' is not part of the language"),
        ("r >= 8, r = 4", "expected 'and' before"),
        ("r >= 8 andr = 4", "expected 'and' before"),
        ("message = two words", "a value with spaces goes in quotes"),
        ('message = "open', "cannot read"),
        ("r => 8", "cannot read"),
        ("r = =8", "cannot read"),
        ("r >= ~8", "cannot read"),
        ("meta. = x", "'meta.' needs a key, for instance meta.reward"),
        ("metric. > 1", "'metric.' needs a key"),
        ("r;drop = 1", "cannot read"),
        ("r >= 8\x1b[2J and", r"\x1b[2J"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(text: str, reason: str) -> None:
    with pytest.raises(InvalidQuery) as caught:
        parse_where([text])
    assert reason in str(caught.value)
    assert str(caught.value).isprintable()


def test_an_unknown_field_lists_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(InvalidQuery) as caught:
        parse_where(["lora_alfa = 8"])
    message = str(caught.value)
    assert message.startswith("unknown field 'lora_alfa'; did you mean lora_alpha? Known: name, version, ")
    assert all(field in message for field in FIELDS)
    assert message.endswith("meta.KEY, metric.KEY")


def test_an_unknown_field_without_a_near_one_still_lists_the_known() -> None:
    with pytest.raises(InvalidQuery, match=r"^unknown field 'zzzz'\. Known: name, "):
        parse_where(["zzzz = 1"])
    with pytest.raises(InvalidQuery, match=r"^unknown field 'reward'"):
        parse_where(["reward > 1"])


def test_there_may_be_fifty_conditions_and_not_more() -> None:
    assert len(parse_where(["r = 1"] * MAX_CONDITIONS)) == 50
    with pytest.raises(InvalidQuery, match="51 conditions; 50 is the most"):
        parse_where(["r = 1"] * 51)


def test_a_long_hostile_text_is_refused_at_once() -> None:
    for text in ("r" * 100_000, "r " * 50_000, 'r = "' * 20_000, "r=1 and " * 10_000, "=" * 100_000):
        with pytest.raises(InvalidQuery) as caught:
            parse_where([text])
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("r", SortKey("r", False)),
        ("-created_at", SortKey("created_at", True)),
        ("-metric.reward", SortKey("metric", True, "reward")),
        ("meta.run", SortKey("meta", False, "run")),
    ],
)
def test_a_sort_key_is_a_field_with_a_minus_for_descending(text: str, expected: SortKey) -> None:
    assert parse_sort(text) == expected


@pytest.mark.parametrize("field", sorted(FIELDS))
def test_what_a_version_has_several_of_cannot_be_sorted_by(field: str) -> None:
    if field in SORTABLE:
        assert parse_sort(field).field == field
    else:
        with pytest.raises(InvalidQuery, match="a version has several"):
            parse_sort(field)


@pytest.mark.parametrize("text", ["", "-", "--r", "zzzz", "meta.", "r desc", "r\n"])
def test_any_other_sort_key_is_refused(text: str) -> None:
    with pytest.raises(InvalidQuery):
        parse_sort(text)
