"""Column types that mean the same on SQLite and PostgreSQL."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import BigInteger, Dialect, Integer, LargeBinary, Text
from sqlalchemy.types import TypeDecorator, TypeEngine

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

BigId: TypeEngine[int] = BigInteger().with_variant(Integer(), "sqlite")
"""64-bit row id; plain INTEGER on SQLite, where only that is the rowid."""

BinaryText: TypeEngine[str] = Text().with_variant(Text(collation="C"), "postgresql")
"""Text that compares and sorts by code point on both databases."""


def to_microseconds(moment: datetime) -> int:
    """Microseconds since 1970 in UTC; `moment` has a time zone."""
    return (moment - EPOCH) // timedelta(microseconds=1)


def from_microseconds(value: int) -> datetime:
    return EPOCH + timedelta(microseconds=value)


class Moment(TypeDecorator[datetime]):
    """A UTC time as microseconds since 1970 in a BIGINT: exact, and ordered the same everywhere."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> int | None:
        return None if value is None else to_microseconds(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        return None if value is None else from_microseconds(value)


class Digest(TypeDecorator[str]):
    """32 bytes in the database, 64 hex digits in Python."""

    impl = LargeBinary(32)
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> bytes | None:
        return None if value is None else bytes.fromhex(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> str | None:
        return None if value is None else bytes(value).hex()
