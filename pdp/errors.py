"""pdp's own refusals. They are part of the registry's error tree, so one `except RegistryError` catches all."""

from __future__ import annotations

import sys
from typing import ClassVar

from registry.core.errors import InvalidInput, NotFound, RegistryError


class ConfigError(InvalidInput):
    """A configuration with an unknown key, a value of another type, or a name that is not in the tables."""


class TargetsNotFound(InvalidInput):
    """LoRA targets that name no linear layer of the model."""


class CheckpointError(InvalidInput):
    """A checkpoint that does not hold what was asked of it."""


class SettingsMissing(CheckpointError):
    """An adapter that does not say with which settings it was trained."""


class TrainingDiverged(RegistryError, ArithmeticError):
    """The loss or a gradient is not finite.

    Attributes:
        step: the step at which it was found; 0 is the first.
    """

    exit_code: ClassVar[int] = 10

    def __init__(self, message: str, step: int) -> None:
        self.step = step
        super().__init__(message)


class TaskNotFound(NotFound):
    """A task that none of the modules has that the user named."""


class WorldNotFound(NotFound):
    """A world that a task does not have."""


class RolloutStopped(RegistryError, ArithmeticError):
    """A roll-out that cannot go on.

    Attributes:
        step: the control step at which it was found; 1 is the first.
        environment: the first of the environments that it was found in, from 0.
    """

    exit_code: ClassVar[int] = 10

    def __init__(self, message: str, *, step: int, environment: int) -> None:
        self.step = step
        self.environment = environment
        super().__init__(message)


class ActionNotFinite(RolloutStopped):
    """The policy's action is NaN or infinite."""


class SimulationDiverged(RolloutStopped):
    """The simulator's state is not finite any more."""


class CheckpointWarning(UserWarning):
    """What a lenient load let pass, in the words of the guide."""


def user_level() -> int:
    """`stacklevel` of whoever called pdp, for a warning of the function that asks."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("pdp."):
        level, frame = level + 1, frame.f_back
    return level
