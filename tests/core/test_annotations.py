from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy
import pytest
import torch

from registry.core.annotations import (
    MAX_MESSAGE,
    MAX_TEXT,
    MetadataValue,
    MetricValue,
    check_key,
    check_step,
    check_text,
    parse_metadata_text,
    parse_metric_text,
    read_metadata,
    read_metrics,
)
from registry.core.errors import InvalidInput


@pytest.mark.parametrize("key", ["a", "reward", "eval/reward", "a.b-c_d", "0", "_x", "x" * 128, "Loss"])
def test_a_key_is_letters_digits_and_a_few_signs(key: str) -> None:
    assert check_key(key, "metric") == key


@pytest.mark.parametrize(
    "key", ["", " a", "a b", ".a", "a.", "-a", "a/", "ä", "a\n", "a\0", "a=b", "a:b", "x" * 129, None, 1, b"a"]
)
def test_any_other_key_is_refused_in_one_line(key: Any) -> None:
    with pytest.raises(InvalidInput, match=r"^metric key .* must be 1 to 128 letters") as caught:
        check_key(key, "metric")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("text", MetadataValue("text", None)),
        ("", MetadataValue("", None)),
        ("3", MetadataValue("3", None)),
        ("x" * MAX_TEXT, MetadataValue("x" * MAX_TEXT, None)),
        ("two\nlines", MetadataValue("two\nlines", None)),
        (3, MetadataValue("3", 3.0)),
        (-3.5, MetadataValue("-3.5", -3.5)),
        (1e20, MetadataValue("1e+20", 1e20)),
        (2**60, MetadataValue(str(2**60), 2.0**60)),
        (True, MetadataValue("true", None)),
        (False, MetadataValue("false", None)),
        (MetadataValue("1e3", 1000.0), MetadataValue("1e3", 1000.0)),
    ],
)
def test_metadata_is_text_or_a_number(given: object, expected: MetadataValue) -> None:
    assert read_metadata({"k": given}) == {"k": expected}


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (float("nan"), "not finite; give it as a metric"),
        (float("inf"), "not finite"),
        (10**400, "does not fit in 64 bits"),
        (None, "expected text or a number, found NoneType"),
        ([1], "found list"),
        (b"x", "found bytes"),
        (torch.tensor(1.0), "found Tensor"),
        ("x" * 501, "501 characters; 500 is the most"),
        ("a\0b", "NUL"),
        ("a\ud800", "surrogate"),
    ],
)
def test_any_other_metadata_is_refused_and_names_its_key(given: object, reason: str) -> None:
    with pytest.raises(InvalidInput, match=f"^metadata the/key: .*{reason}"):
        read_metadata({"the/key": given})


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (MetadataValue("3", 3.0), 3),
        (MetadataValue("-3", -3.0), -3),
        (MetadataValue("3.0", 3.0), 3.0),
        (MetadataValue("1e3", 1000.0), "1e3"),
        (MetadataValue("3", None), "3"),
        (MetadataValue("9" * 15, 999999999999999.0), 999999999999999),
        (MetadataValue("9" * 16, 1e16), 9999999999999999),
    ],
)
def test_a_value_is_given_back_as_what_it_was(value: MetadataValue, plain: object) -> None:
    assert (value.plain, type(value.plain)) == (plain, type(plain))


@pytest.mark.parametrize("text", ["3", "-3", "+3", "3.5", ".5", "3.", "1e3", "-1.5E-7"])
def test_text_of_the_command_line_that_looks_like_a_number_is_one_and_keeps_its_spelling(text: str) -> None:
    assert parse_metadata_text(text) == MetadataValue(text, float(text))


@pytest.mark.parametrize(
    "text", ["", "a1", "1a", "0x10", "1_000", "nan", "inf", "1e999", " 1", "1\n", "\u0663", "--1", "1e", "."]
)
def test_any_other_text_of_the_command_line_is_text(text: str) -> None:
    assert parse_metadata_text(text) == text


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (1, MetricValue(1.0, "finite")),
        (0.1, MetricValue(0.1, "finite")),
        (True, MetricValue(1.0, "finite")),
        (float("nan"), MetricValue(None, "nan")),
        (float("inf"), MetricValue(None, "inf")),
        (float("-inf"), MetricValue(None, "-inf")),
        (torch.tensor(2.5), MetricValue(2.5, "finite")),
        (torch.tensor([[3]]), MetricValue(3.0, "finite")),
        (torch.tensor(float("nan"), dtype=torch.bfloat16), MetricValue(None, "nan")),
        (numpy.float32(0.5), MetricValue(0.5, "finite")),
        (numpy.int64(7), MetricValue(7.0, "finite")),
        (Decimal("1.5"), MetricValue(1.5, "finite")),
        (Fraction(1, 4), MetricValue(0.25, "finite")),
    ],
)
def test_a_metric_is_one_number(given: object, expected: MetricValue) -> None:
    assert read_metrics({"k": given}) == {"k": expected}


@pytest.mark.parametrize(
    "given", ["1", None, [1.0], 10**400, 1j, torch.zeros(2), torch.zeros(0), numpy.zeros(3), Decimal("sNaN"), object()]
)
def test_any_other_metric_is_refused_and_names_its_key(given: object) -> None:
    with pytest.raises(InvalidInput, match=r"^metric eval/x: "):
        read_metrics({"eval/x": given})


def test_a_metric_is_written_for_json_without_nan() -> None:
    numbers = (1.5, math.nan, math.inf, -math.inf)
    values = [read_metrics({"k": number})["k"] for number in numbers]
    assert [value.json for value in values] == [1.5, "NaN", "Infinity", "-Infinity"]
    assert [repr(value.number) for value in values] == ["1.5", "nan", "inf", "-inf"]


def test_a_metric_of_the_command_line_is_a_number() -> None:
    assert parse_metric_text("1e3", "x") == 1000.0
    assert math.isnan(parse_metric_text("nan", "x"))
    assert parse_metric_text("-inf", "x") == -math.inf
    for text in ("", "x", "1,5", "0x10", "\x1b[2J"):
        with pytest.raises(InvalidInput, match=r"^metric reward: expected a number") as caught:
            parse_metric_text(text, "reward")
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("step", [None, 0, 1, 2**53 - 1, numpy.int64(7)])
def test_a_step_is_a_whole_number_or_none(step: Any) -> None:
    found = check_step(step)
    assert found == step
    assert found is None or type(found) is int


@pytest.mark.parametrize("step", [-1, 2**53, 10**30, 1.0, "1", float("nan"), torch.tensor(1.5), [1]])
def test_any_other_step_is_refused(step: Any) -> None:
    with pytest.raises(InvalidInput, match=r"^step .*expected a whole number from 0"):
        check_step(step)


def test_a_message_is_text_that_journal_and_databases_can_hold() -> None:
    for text in ("", "two\nlines ü 😀 \x1b", "x" * MAX_MESSAGE):
        assert check_text(text, "message") == text
    for bad in ("x" * (MAX_MESSAGE + 1), "a\0", "\ud800", "\udcff", None, 1, b"x"):
        with pytest.raises(InvalidInput, match=r"^message: ") as caught:
            check_text(bad, "message")
        assert len(str(caught.value)) < 200
