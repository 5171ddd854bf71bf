"""What the commands write: one document or text on standard output, messages on standard error. Text that came from
data passes `escaped` first, so that no metadata value can steer a terminal."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO

from registry.core.errors import StorageError

if TYPE_CHECKING:
    from datetime import datetime

    from rich.console import RenderableType

    from registry.core.findings import Finding

BOLD, YELLOW = "1", "33"
SPINNER_AFTER_SECONDS = 1.0


def escaped(text: str) -> str:
    """Text with every control character, line break and direction mark in its visible form."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)


def emit(text: str) -> None:
    """Writes lines to standard output.

    Raises:
        BrokenPipeError: nobody reads them any more.
        StorageError: they cannot be written (a full disk).
    """
    if sys.stdout is None:  # closed by the caller: `registry list >&-`
        return
    try:
        sys.stdout.write(_encodable(text, sys.stdout) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        silence(sys.stdout)
        raise StorageError(error.errno, f"cannot write to standard output: {error.strerror}") from error


def emit_lines(lines: Iterable[str]) -> None:
    """Writes many lines; nothing where there are none."""
    text = "\n".join(lines)
    if text:
        emit(text)


def emit_json(document: Any) -> None:
    """Writes one JSON document, in ASCII: what is in it cannot steer a terminal either."""
    emit(json.dumps(document, indent=2, allow_nan=False))


def message(text: str, style: str = "") -> None:
    """Writes one line to standard error; `text` is escaped."""
    if sys.stderr is None:
        return
    try:
        sys.stderr.write(_encodable(paint(escaped(text), style, sys.stderr), sys.stderr) + "\n")
        sys.stderr.flush()
    except BrokenPipeError:
        silence(sys.stderr)  # what is left in its buffer would fail again when Python ends, with exit code 120


def report_findings(findings: Iterable[Finding], notes: Iterable[str] = ()) -> None:
    """Writes what a push noticed to standard error, one line each."""
    for finding in findings:
        message(str(finding), YELLOW)
    for note in notes:
        message(f"note: {note}", YELLOW)


def paint(text: str, style: str, stream: TextIO | None = None) -> str:
    """Text in an ANSI style, where the stream (standard output) is a terminal that takes one."""
    return f"\x1b[{style}m{text}\x1b[0m" if style and text and in_color(stream or sys.stdout) else text


def in_color(stream: TextIO) -> bool:
    return is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False


def width() -> int | None:
    """Columns that lines should fit in: `$COLUMNS`, else the terminal's; None where nothing has to fit."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns) > 0:
        return int(columns)
    if is_terminal(sys.stdout):
        with suppress(OSError, ValueError):
            return os.get_terminal_size(sys.stdout.fileno()).columns or None
    return None


def drawn(what: RenderableType, width: int) -> Iterator[str]:
    """A table, tree or text of rich's, line by line, as standard output can show it."""
    import io

    from rich.console import Console

    color = in_color(sys.stdout)
    console = Console(
        file=io.TextIOWrapper(io.BytesIO(), encoding=getattr(sys.stdout, "encoding", None) or "utf-8"),
        width=width,
        force_terminal=color,
        color_system="standard" if color else None,
        highlight=False,
        markup=False,
        emoji=False,
    )
    with console.capture() as captured:
        console.print(what)
    for line in captured.get().splitlines():
        yield line.rstrip()


def silence(stream: TextIO | None) -> None:
    """Lets a stream that cannot be written to swallow the rest, also what Python flushes when it ends."""
    if stream is None:
        return
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def human_size(size: int) -> str:
    """Bytes with a binary unit and three digits or so: `5.5 KiB`.

    >>> [human_size(n) for n in (0, 1023, 1024, 5662, 402_653_184, 10**15)]
    ['0 B', '1023 B', '1.0 KiB', '5.5 KiB', '384.0 MiB', '909.5 TiB']
    """
    if size < 1024:
        return f"{size} B"
    units = ("KiB", "MiB", "GiB", "TiB")
    amount, power = size / 1024, 0
    while amount >= 1023.95 and power < len(units) - 1:
        amount, power = amount / 1024, power + 1
    return f"{amount:.1f} {units[power]}"


def human_number(number: float | None, digits: int = 15) -> str:
    """A number without a needless `.0`; `-` where it is not known.

    Args:
        digits: of a number that is not whole.
    """
    if number is None:
        return "-"
    return f"{number:.15g}" if number == round(number, 0) else f"{number:.{digits}g}"


def human_time(moment: datetime, *, seconds: bool = False) -> str:
    """UTC."""
    return moment.strftime("%Y-%m-%d %H:%M:%S UTC" if seconds else "%Y-%m-%d %H:%M")


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Shows a spinner on a terminal's standard error while something takes longer than a second."""
    if not is_terminal(sys.stderr):
        yield
        return
    from threading import Timer

    shown: list[Any] = []

    def show() -> None:
        from rich.console import Console
        from rich.text import Text

        spinner = Console(stderr=True).status(Text(escaped(what)))
        shown.append(spinner)
        spinner.start()

    timer = Timer(SPINNER_AFTER_SECONDS, show)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        for spinner in shown:
            spinner.stop()


def _encodable(text: str, stream: TextIO) -> str:
    """Text that the stream's encoding holds: the rest in its escaped form."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
