from __future__ import annotations

import io
import json
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.cli import output
from registry.cli.output import emit, emit_json, escaped, human_number, human_size, paint, waiting
from registry.cli.table import Column, cell_width, fold, table_lines


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@given(st.text())
def test_escaped_text_is_printable_and_printable_text_stays(text: str) -> None:
    assert escaped(text).isprintable()
    assert escaped(escaped(text)) == escaped(text)


def test_control_characters_and_direction_marks_are_made_visible() -> None:
    assert escaped("a\x1b[31m\x9b\n\r\t\x00\u202e\u2066\u200b\ud800é猫") == (
        r"a\x1b[31m\x9b\n\r\t\x00\u202e\u2066\u200b\ud800é猫"
    )


@given(st.text(), st.integers(1, 30))
def test_folding_loses_nothing_but_spaces(text: str, width: int) -> None:
    text = escaped(text)
    lines = fold(text, width)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(cell_width(line) <= max(width, 2) for line in lines)


@given(st.lists(st.tuples(st.text(), st.text(), st.text()), max_size=5), st.integers(20, 60))
def test_a_table_fits_where_its_columns_may_shrink(rows: list[tuple[str, str, str]], width: int) -> None:
    cells = [[escaped(cell) for cell in row] for row in rows]
    columns = [Column("NAME", least=5), Column("TAGS", least=5), Column("N", right=True, least=5)]
    assert all(cell_width(line) <= width for line in table_lines(columns, cells, width))


def test_wide_characters_take_two_columns() -> None:
    lines = list(table_lines([Column("A"), Column("B")], [["猫", "x"], ["e\u0301e", "y"]], None))
    assert lines == ["A   B", "猫  x", "e\u0301e  y"]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (5662, "5.5 KiB"),
        (1024**2 - 1, "1.0 MiB"),
        (402_653_184, "384.0 MiB"),
        (10**15, "909.5 TiB"),
        (2**60, "1048576.0 TiB"),
    ],
)
def test_sizes_are_for_humans(size: int, expected: str) -> None:
    assert human_size(size) == expected


def test_numbers_have_no_needless_digits() -> None:
    found = [human_number(number) for number in (None, 8.0, 0.1, 1e-5, 1e22, -3.5)]
    assert found == ["-", "8", "0.1", "1e-05", "1e+22", "-3.5"]


def test_json_is_ascii_and_refuses_what_json_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    emit_json({"é": "\x9b31m"})
    out = capsys.readouterr().out
    assert out.isascii()
    assert json.loads(out) == {"é": "\x9b31m"}
    with pytest.raises(ValueError, match="not JSON compliant"):
        emit_json(float("nan"))


def test_what_an_encoding_lacks_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    emit("naïve └──")
    assert raw.getvalue() == b"na\\xefve \\u2514\\u2500\\u2500\n"


def test_only_a_terminal_gets_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert paint("x", "1", io.StringIO()) == "x"
    assert paint("x", "1", Terminal()) == "\x1b[1mx\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert paint("x", "1", Terminal()) == "x"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert paint("x", "1", Terminal()) == "x"


def test_a_spinner_comes_only_when_it_takes_long_and_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "SPINNER_AFTER_SECONDS", 0.05)
    monkeypatch.setenv("TERM", "xterm")
    for stream, seconds, comes in ((Terminal(), 0.6, True), (Terminal(), 0.0, False), (io.StringIO(), 0.2, False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with waiting("pushing \x1b[2Jbig [red]x[/red]"):
            time.sleep(seconds)
        assert (r"pushing \x1b[2Jbig [red]x[/red]" in stream.getvalue()) == comes
        assert "[2Jbig" not in stream.getvalue().replace(r"\x1b[2Jbig", "")
        if comes:
            assert stream.getvalue().endswith("\x1b[?25h") or "\x1b[?25h" in stream.getvalue()  # the cursor is back
