"""Many MuJoCo environments that step together: one call of `mujoco.rollout` for all of them, each with a model of its
own. The same states and controls give the same bits, for any number of threads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any

import numpy

try:
    import mujoco
    from mujoco.rollout import Rollout
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"{error}; to simulate: pip install 'lora-registry[simulation]'", name=error.name
    ) from error

from pdp.errors import SimulationDiverged
from registry.core.errors import InvalidInput

FULL = mujoco.mjtState.mjSTATE_FULLPHYSICS


class MujocoBatch:
    """Environments with one model each; the models have the same sizes and time step.

    Args:
        models: one for each environment; the same object may stand several times. Their flag `autoreset` is switched
            off.
        frame_skip: physics steps of one control step.
        threads: that step them.

    Attributes:
        state: (B, nstate) float64, MuJoCo's full physics state (time, qpos, qvel, act, ...) of each environment. Write
            to it to set an environment.
        steps: control steps since the last `reset`.

    Raises:
        InvalidInput: no model, or models of different sizes.
    """

    def __init__(self, models: Sequence[Any], frame_skip: int, threads: int = 1) -> None:
        if not models:
            raise InvalidInput("there are no environments; give one model at least")
        if threads < 1 or type(frame_skip) is not int or frame_skip < 1:
            raise InvalidInput(f"frame_skip {frame_skip}, threads {threads}: expected whole numbers from 1")
        first = models[0]
        sizes = {(one.nq, one.nv, one.nu, one.na, mujoco.mj_stateSize(one, FULL), one.opt.timestep) for one in models}
        if len(sizes) > 1:
            raise InvalidInput(
                f"models of different sizes (nq, nv, nu, na, nstate, timestep) in one batch: {sorted(sizes)}"
            )
        self.models = tuple(models)
        self.frame_skip = frame_skip
        for model in set(self.models):
            # MuJoCo would go on from the start, as if nothing had been.
            model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_AUTORESET
        self._data = [mujoco.MjData(first) for _ in range(threads)]
        self._pool = Rollout(nthread=threads if threads > 1 else 0)
        self._nq, self._nv, self._nu = first.nq, first.nv, first.nu
        self._control_seconds = first.opt.timestep * frame_skip
        self.state = numpy.zeros((len(models), mujoco.mj_stateSize(first, FULL)))
        self.steps = 0
        self.reset()

    def __len__(self) -> int:
        return len(self.models)

    @property
    def control_seconds(self) -> float:
        """Seconds of one control step."""
        return float(self._control_seconds)

    @property
    def qpos(self) -> Any:
        """(B, nq): a view of the state, behind the time."""
        return self.state[:, 1 : 1 + self._nq]

    @property
    def qvel(self) -> Any:
        """(B, nv): a view of the state."""
        return self.state[:, 1 + self._nq : 1 + self._nq + self._nv]

    def reset(self) -> None:
        """Puts every environment at its model's own start."""
        for row, model in enumerate(self.models):
            data = mujoco.MjData(model)
            mujoco.mj_getState(model, data, self.state[row], FULL)
        self.steps = 0

    def step(self, control: Any) -> None:
        """One control step of all environments.

        Args:
            control: (B, nu) float64, held for the physics steps of the control step.

        Raises:
            InvalidInput: control of another form.
            SimulationDiverged: a state is not finite afterwards, or grew beyond what MuJoCo computes with.
        """
        control = numpy.asarray(control, dtype=numpy.float64)
        if control.shape != (len(self), self._nu):
            raise InvalidInput(f"control is of the form {control.shape}; expected ({len(self)}, {self._nu})")
        held = numpy.repeat(control[:, None, :], self.frame_skip, axis=1)
        before = self.state[:, 0].copy()
        with _quiet():
            states, _ = self._pool.rollout(list(self.models), self._data, self.state, held)
        self.state[:] = states[:, -1]
        self.steps += 1
        with numpy.errstate(invalid="ignore"):
            # MuJoCo stops a rollout at the first state that it cannot go on from, and so does its clock.
            late = self.state[:, 0] - before < (1 - 0.5 / self.frame_skip) * self._control_seconds
            bad = ~(numpy.abs(self.state) < mujoco.mjMAXVAL).all(axis=1) | late
        if bad.any():
            row = int(bad.argmax())
            raise SimulationDiverged(
                f"the simulation diverged at control step {self.steps} in {int(bad.sum())} of {len(self)} "
                f"environments, the first of them {row}: its state is not finite any more, or too large; "
                "actions this strong, or a world this far from the model's own, need a smaller time step",
                step=self.steps,
                environment=row,
            )


_quieting = Lock()
_quiet_ones: list[Any] = []
"""What MuJoCo told its warnings to before, once for each batch that steps at this moment: the handler is the
process's."""


@contextmanager
def _quiet() -> Iterator[None]:
    """MuJoCo tells of a state that it cannot go on from on standard error and in a file; here it is an error."""
    with _quieting:
        _quiet_ones.append(_quiet_ones[0] if _quiet_ones else mujoco.get_mju_user_warning())
        mujoco.set_mju_user_warning(_say_nothing)
    try:
        yield
    finally:
        with _quieting:
            before = _quiet_ones.pop()
            if not _quiet_ones:
                mujoco.set_mju_user_warning(before)


def _say_nothing(_text: str) -> None:
    pass
