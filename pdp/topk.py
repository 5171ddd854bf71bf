"""The best checkpoints of a run: which to keep, under which name, and which to let go."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple

from pdp.training_state import told
from registry.core.errors import InvalidInput, StorageError
from registry.core.reference import shown

LONGEST_NAME = 200
COUNTS = ("epoch", "global_step")
"""Metrics that are whole numbers; all others are floats."""


class _Asked(NamedTuple):
    """A path that was given out, of which is not known yet whether something was saved there.

    Attributes:
        file: what was there before; None for nothing.
        kept: what was kept before.
    """

    name: str
    file: tuple[int, ...] | None
    kept: dict[str, float]


class TopKCheckpointManager:
    """Keeps the k checkpoints with the best value of a metric.

    A file that is displaced is deleted by `prune`, or at the next question, if the one that displaces it was really
    written by then. If it was not, all is kept as it was before the question: a save that fails loses nothing.

    Args:
        save_dir: folder of the files.
        monitor_key: the metric.
        mode: `min` or `max`: which value is the best.
        k: how many; 0 keeps none.
        format_str: name of a file, from the metrics.

    Raises:
        InvalidInput: an unknown mode, a k below 0, or a format_str that is none.
    """

    def __init__(
        self,
        save_dir: str,
        monitor_key: str,
        mode: str = "min",
        k: int = 1,
        format_str: str = "epoch={epoch:03d}-train_loss={train_loss:.3f}.ckpt",
    ) -> None:
        if mode not in ("min", "max"):
            raise InvalidInput(f"mode is {shown(repr(mode))}; expected min or max")
        if k < 0:
            raise InvalidInput(f"k is {k}; expected 0 or more")
        _check_format(format_str)
        self.save_dir = Path(save_dir)
        self.monitor_key = monitor_key
        self.mode = mode
        self.k = k
        self.format_str = format_str
        self._kept: dict[str, float] = {}
        self._asked: _Asked | None = None

    def check(self, names: Iterable[str]) -> None:
        """Tries metric and name of a file with dummy numbers, before training begins. Where none is kept, all will do.

        Args:
            names: of the metrics that there will be.

        Raises:
            InvalidInput: `monitor_key` or a value in `format_str` is not among them, with the near name; or they give
                no name of a file.
        """
        if self.k:
            dummies = {name: 1 if name in COUNTS else 1.0 for name in names}
            self._value(dummies)
            self._name(dummies)

    def get_ckpt_path(self, data: Mapping[str, Any]) -> str | None:
        """Where to save a checkpoint with these metrics; None where it is not among the best, or its value is NaN.

        Raises:
            InvalidInput: the metric, or a value in the name, is missing; or the name leads out of the folder.
            StorageError: a displaced file cannot be deleted.
        """
        self.prune()
        if self.k == 0:
            return None
        value = self._value(data)
        if math.isnan(value):
            return None
        worst = self._worst() if len(self._kept) >= self.k else None
        if worst is not None and not self._is_better(value, self._kept[worst]):
            return None
        name = self._name(data)
        self._asked = _Asked(name, _file(self.save_dir / name), dict(self._kept))
        # A file that is written over makes no other one too many.
        if worst is not None and name not in self._kept:
            del self._kept[worst]
        self._kept[name] = value
        return str(self.save_dir / name)

    def prune(self) -> None:
        """Deletes what the checkpoint that was saved last displaced; if it was not saved, forgets it instead.

        Raises:
            StorageError: a file cannot be deleted.
        """
        asked, self._asked = self._asked, None
        if asked is None:
            return
        if _file(self.save_dir / asked.name) in (None, asked.file):
            self._kept = asked.kept
            return
        for name in asked.kept.keys() - self._kept.keys():
            path = self.save_dir / name
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise StorageError(
                    f"{shown(str(path), 200)} is no more among the best checkpoints, and cannot be deleted ({error}); "
                    "delete it by hand"
                ) from error

    def state_dict(self) -> dict[str, Any]:
        """The names that are kept, with their values."""
        return {"kept": dict(self._kept)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what is kept; of other files than those in the folder nothing is known.

        Raises:
            InvalidInput: not what `state_dict` gives; nothing is changed.
        """
        self.fit_state(state, "what was given")()

    def fit_state(self, state: Any, what: str) -> Callable[[], None]:
        """Looks at a state.

        Args:
            what: names the checkpoint.

        Returns:
            A function that takes it over; until it is called, nothing is changed.

        Raises:
            InvalidInput: not what `state_dict` gives.
        """
        try:
            kept = {str(name): float(value) for name, value in state["kept"].items()}
            if any(math.isnan(value) for value in kept.values()):
                raise ValueError("a value is NaN")
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
            raise InvalidInput(
                f"{what}: state of the best checkpoints: expected kept, with a number for each name, found "
                f"{told(state)}; save the checkpoint again with one"
            ) from error
        found = {name: value for name, value in kept.items() if _is_plain(name) and _file(self.save_dir / name)}

        def take() -> None:
            self._kept, self._asked = found, None

        return take

    def _worst(self) -> str:
        choose = max if self.mode == "min" else min
        return choose(self._kept, key=lambda name: self._kept[name])

    def _is_better(self, value: float, other: float) -> bool:
        return value < other if self.mode == "min" else value > other

    def _value(self, data: Mapping[str, Any]) -> float:
        if self.monitor_key not in data:
            raise InvalidInput(
                f"there is no metric {shown(str(self.monitor_key))} to choose checkpoints by; "
                f"{_near(self.monitor_key, data)}"
            )
        value = data[self.monitor_key]
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
            raise InvalidInput(f"the metric {shown(self.monitor_key)} is {told(value)}; expected a number") from error

    def _name(self, data: Mapping[str, Any]) -> str:
        try:
            name = self.format_str.format(**data)
        except KeyError as error:
            raise InvalidInput(
                f"format_str {shown(self.format_str, 100)} does not go with the metrics "
                f"{', '.join(sorted(map(str, data)))}: there is no {shown(str(error.args[0]))}; "
                f"{_near(str(error.args[0]), data)}"
            ) from error
        except (IndexError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
            raise InvalidInput(
                f"format_str {shown(self.format_str, 100)} does not go with the metrics "
                f"{', '.join(sorted(map(str, data)))}: {type(error).__name__} {error}"
            ) from error
        if not _is_plain(name):
            raise InvalidInput(
                f"format_str gives {shown(name, 100)}; expected the name of a file in the folder, of at most "
                f"{LONGEST_NAME} characters"
            )
        return name


def _near(name: str, data: Mapping[str, Any]) -> str:
    known = sorted(map(str, data))
    near = get_close_matches(str(name), known, n=1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"


def _check_format(text: str) -> None:
    """
    Raises:
        InvalidInput: it cannot be read, or it may give a name that fills the memory.
    """
    try:
        fields = [(field, spec or "") for _, field, spec, _ in Formatter().parse(text) if field is not None]
    except (ValueError, TypeError) as error:
        raise InvalidInput(
            f"format_str is {told(text)}: {error}; expected a name such as epoch={{epoch:03d}}.ckpt"
        ) from error
    for field, spec in fields:
        if "{" in spec or re.search(r"\d{4}", spec):
            raise InvalidInput(
                f"format_str has {shown('{' + field + ':' + spec + '}')}; expected width and precision as numbers "
                "of at most 3 digits"
            )


def _is_plain(name: str) -> bool:
    return (
        bool(name)
        and name.isprintable()
        and len(name.encode()) <= LONGEST_NAME
        and Path(name).name == name
        and not name.startswith(".")
    )


def _file(path: Path) -> tuple[int, ...] | None:
    """What tells a file from one that is written in its place; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns) if path.is_file() else None
