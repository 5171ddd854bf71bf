"""Metadata and metrics as users give them: keys checked, text and numbers told apart."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, SupportsIndex

from registry.core.canonical_json import MAX_INTEGER
from registry.core.errors import InvalidInput
from registry.core.event import number_to_json
from registry.core.reference import shown

MAX_TEXT = 500
MAX_MESSAGE = 10_000
_KEY = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_./-]*[A-Za-z0-9_])?")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_NOT_TEXT = re.compile(r"[\0\ud800-\udfff]")
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,308}")
MetricKind = Literal["finite", "nan", "inf", "-inf"]


@dataclass(frozen=True, slots=True)
class MetadataValue:
    """One metadata value.

    Attributes:
        text: as it was given, for display and for comparison as text.
        number: set where it is a finite number, and then compared as one.
    """

    text: str
    number: float | None

    @property
    def plain(self) -> str | float | int:
        """The value for JSON and Python: a number where nothing of its text is lost by that. `1.10`, `007` and `1e10`
        compare as numbers and stay as they were written."""
        if self.number is None:
            return self.text
        if _INTEGER.fullmatch(self.text):
            return int(self.text)
        return self.number if repr(self.number) == self.text else self.text

    def to_json(self) -> dict[str, str | float | None]:
        return {"text": self.text, "number": self.number}


@dataclass(frozen=True, slots=True)
class MetricValue:
    """One metric value; `value` is None where `kind` is not `finite`."""

    value: float | None
    kind: MetricKind

    @property
    def number(self) -> float:
        return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[self.kind] if self.value is None else self.value

    @property
    def json(self) -> float | int | str:
        return number_to_json(self.number)


def check_key(key: object, what: str) -> str:
    """
    Raises:
        InvalidInput
    """
    if not isinstance(key, str) or len(key) > 128 or not _KEY.fullmatch(key):
        raise InvalidInput(
            f"{what} key '{shown(str(key))}' must be 1 to 128 letters, digits, '_', '.', '/' and '-', "
            "beginning and ending with a letter, digit or '_'"
        )
    return key


def check_text(text: object, what: str, most: int = MAX_MESSAGE) -> str:
    """Free text that journal and databases can hold: a message, a reason, a metadata value.

    Raises:
        InvalidInput
    """
    if not isinstance(text, str):
        raise InvalidInput(f"{what}: expected text, found {type(text).__name__}")
    if len(text) > most:
        raise InvalidInput(f"{what}: {len(text)} characters; {most} is the most")
    if _NOT_TEXT.search(text):
        raise InvalidInput(f"{what}: NUL and halves of surrogate pairs cannot be kept")
    return text


def check_step(step: object) -> int | None:
    """A training step, or None where there is none.

    Raises:
        InvalidInput
    """
    if step is None:
        return None
    try:
        number = operator.index(step) if isinstance(step, SupportsIndex) else -1  # numpy's integers too
    except TypeError:  # an array has __index__ as well
        number = -1
    if not 0 <= number <= MAX_INTEGER:
        raise InvalidInput(f"step {shown(repr(step))}: expected a whole number from 0 to 2**53 - 1")
    return number


def read_metadata(given: Mapping[str, object]) -> dict[str, MetadataValue]:
    """Checks metadata; text, numbers and booleans (kept as `true` and `false`) are taken.

    Raises:
        InvalidInput: names the key.
    """
    return {check_key(key, "metadata"): _metadata_value(key, value) for key, value in given.items()}


def _metadata_value(key: str, value: object) -> MetadataValue:
    if isinstance(value, MetadataValue):
        return value
    if isinstance(value, bool):
        return MetadataValue("true" if value else "false", None)
    if isinstance(value, int | float):
        number = _float(value, f"metadata {key}")
        if not math.isfinite(number):
            raise InvalidInput(f"metadata {key}: {value} is not finite; give it as a metric, or as text")
        return MetadataValue(repr(value) if isinstance(value, float) else str(value), number)
    if not isinstance(value, str):
        raise InvalidInput(f"metadata {key}: expected text or a number, found {type(value).__name__}")
    if len(value) > MAX_TEXT:
        raise InvalidInput(f"metadata {key}: {len(value)} characters; {MAX_TEXT} is the most (use a message, -m)")
    return MetadataValue(check_text(value, f"metadata {key}", MAX_TEXT), None)


def parse_metadata_text(text: str) -> str | MetadataValue:
    """A command line's value: compared as a number where it looks like one (and kept as written), else text."""
    if not _NUMBER.fullmatch(text) or len(text) > MAX_TEXT or not math.isfinite(float(text)):
        return text
    return MetadataValue(text, float(text))


def read_metrics(given: Mapping[str, object]) -> dict[str, MetricValue]:
    """Checks metrics: numbers, NaN and Infinity allowed; anything with `.item()` (a tensor of one element) too.

    Raises:
        InvalidInput: names the key.
    """
    return {check_key(key, "metric"): _metric_value(key, value) for key, value in given.items()}


def _metric_value(key: str, value: object) -> MetricValue:
    item = getattr(value, "item", None)
    if callable(item):
        try:
            value = item()
        except (ValueError, RuntimeError) as error:
            raise InvalidInput(f"metric {key}: expected one number: {error}") from error
    if isinstance(value, str) or not hasattr(value, "__float__"):
        raise InvalidInput(f"metric {key}: expected a number, found {shown(repr(value))}")
    number = _float(value, f"metric {key}")
    if math.isnan(number):
        return MetricValue(None, "nan")
    if math.isinf(number):
        return MetricValue(None, "inf" if number > 0 else "-inf")
    return MetricValue(number, "finite")


def parse_metric_text(text: str, key: str) -> float:
    """A command line's metric value.

    Raises:
        InvalidInput
    """
    try:
        return float(text)
    except ValueError:
        raise InvalidInput(f"metric {key}: expected a number, found '{shown(text)}'") from None


def _float(value: object, what: str) -> float:
    try:
        return float(value)  # type: ignore[arg-type]  # the callers know that it has __float__
    except OverflowError as error:
        raise InvalidInput(f"{what}: the number does not fit in 64 bits") from error
    except ValueError as error:  # Decimal("sNaN")
        raise InvalidInput(f"{what}: {error}") from error
