"""The best checkpoints of a run: which to keep, under which name, and which to let go."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from registry.core.errors import InvalidInput
from registry.core.reference import shown


class TopKCheckpointManager:
    """Keeps the k checkpoints with the best value of a metric.

    A file that is displaced is deleted by `prune`, or at the next question: not before the one that displaces it is
    written, so that a save that fails loses nothing.

    Args:
        save_dir: folder of the files.
        monitor_key: the metric.
        mode: `min` or `max`: which value is the best.
        k: how many; 0 keeps none.
        format_str: name of a file, from the metrics.

    Raises:
        InvalidInput: an unknown mode, or a k below 0.
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
        self.save_dir = Path(save_dir)
        self.monitor_key = monitor_key
        self.mode = mode
        self.k = k
        self.format_str = format_str
        self._kept: dict[str, float] = {}
        self._displaced: list[str] = []

    def get_ckpt_path(self, data: Mapping[str, Any]) -> str | None:
        """Where to save a checkpoint with these metrics; None where it is not among the best, or its value is NaN.

        Raises:
            InvalidInput: the metric, or a value in the name, is missing; or the name leads out of the folder.
        """
        self.prune()
        if self.k == 0:
            return None
        if self.monitor_key not in data:
            known = ", ".join(sorted(map(str, data)))
            raise InvalidInput(
                f"there is no metric {shown(self.monitor_key)} to choose checkpoints by; there are {known}"
            )
        try:
            value = float(data[self.monitor_key])
        except (TypeError, ValueError, RuntimeError) as error:
            raise InvalidInput(
                f"the metric {shown(self.monitor_key)} is {shown(repr(data[self.monitor_key]))}; expected a number"
            ) from error
        if math.isnan(value):
            return None
        worst = self._worst() if len(self._kept) >= self.k else None
        if worst is not None and not self._is_better(value, self._kept[worst]):
            return None
        name = self._name(data)
        # A file that is written over makes no other one too many.
        if worst is not None and name not in self._kept:
            del self._kept[worst]
            self._displaced.append(worst)
        self._kept[name] = value
        return str(self.save_dir / name)

    def prune(self) -> None:
        """Deletes the files that were displaced."""
        while self._displaced:
            (self.save_dir / self._displaced.pop()).unlink(missing_ok=True)

    def state_dict(self) -> dict[str, Any]:
        """The names that are kept, with their values."""
        return {"kept": dict(self._kept)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what is kept; of other files than those in the folder nothing is known.

        Raises:
            InvalidInput: not what `state_dict` gives.
        """
        try:
            kept = {str(name): float(value) for name, value in state["kept"].items() if _is_plain(str(name))}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidInput(
                f"state of the best checkpoints: expected kept, with a number for each name, found {shown(str(state))}"
            ) from error
        self._kept = {name: value for name, value in kept.items() if (self.save_dir / name).is_file()}
        self._displaced = []

    def _worst(self) -> str:
        choose = max if self.mode == "min" else min
        return choose(self._kept, key=lambda name: self._kept[name])

    def _is_better(self, value: float, other: float) -> bool:
        return value < other if self.mode == "min" else value > other

    def _name(self, data: Mapping[str, Any]) -> str:
        try:
            name = self.format_str.format(**data)
        except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
            raise InvalidInput(
                f"format_str {shown(self.format_str, 100)} does not go with the metrics "
                f"{', '.join(sorted(map(str, data)))}: "
                f"{type(error).__name__} {error}"
            ) from error
        if not _is_plain(name):
            raise InvalidInput(f"format_str gives {shown(name, 100)}; expected the name of a file in the folder")
        return name


def _is_plain(name: str) -> bool:
    return bool(name) and Path(name).name == name and not name.startswith(".") and "\0" not in name
