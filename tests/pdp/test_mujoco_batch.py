"""Environments that step together: on real MuJoCo, with models of a few bodies."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import mujoco
import numpy
import pytest

from pdp.errors import RolloutStopped, SimulationDiverged
from pdp.mujoco_batch import MujocoBatch
from registry.core.errors import InvalidInput

FRAME_SKIP = 3
STEP = 0.01  # seconds of a physics step

# Two joints, motors with a memory of their own (`act`), and a floor to bounce on.
DOUBLE = """
<mujoco>
  <option timestep="{step}" integrator="implicitfast"/>
  <worldbody>
    <geom type="plane" size="5 5 0.1"/>
    <body pos="0 0 0.55">
      <joint name="shoulder" axis="0 1 0" damping="0.1" stiffness="{stiffness}"/>
      <geom type="capsule" fromto="0 0 0 0 0 0.3" size="0.03" mass="{mass}"/>
      <body pos="0 0 0.3">
        <joint name="elbow" axis="0 1 0" damping="0.1"/>
        <geom type="capsule" fromto="0 0 0 0 0 0.3" size="0.03" mass="0.5"/>
      </body>
    </body>
  </worldbody>
  <actuator>
    <motor joint="shoulder" gear="{gear}"/>
    <general joint="elbow" gear="{gear}" dyntype="filter" dynprm="0.05"/>
  </actuator>
</mujoco>
"""
SINGLE = """
<mujoco>
  <worldbody>
    <body><joint name="hinge" axis="0 1 0"/><geom size="0.1"/></body>
  </worldbody>
  <actuator><motor joint="hinge"/></actuator>
</mujoco>
"""


def model(*, mass: float = 1.0, gear: float = 2.0, stiffness: float = 0.0, step: float = STEP) -> Any:
    return mujoco.MjModel.from_xml_string(DOUBLE.format(mass=mass, gear=gear, stiffness=stiffness, step=step))


def controls(steps: int, environments: int, seed: int = 0) -> Any:
    """(steps, B, 2)"""
    return numpy.random.default_rng(seed).uniform(-1, 1, (steps, environments, 2))


def states(batch: MujocoBatch, given: Any) -> Any:
    """(steps, B, nstate) of an episode from near the models' own starts."""
    batch.reset()
    batch.qpos[:] += 0.1 * numpy.arange(1, len(batch) + 1)[:, None]
    found = []
    for control in given:
        batch.step(control)
        found.append(batch.state.copy())
    return numpy.stack(found)


def test_the_same_bits_come_of_one_thread_two_threads_and_another_run() -> None:
    models = [model(mass=1 + 0.1 * row) for row in range(5)]
    given = controls(60, 5)
    batch = MujocoBatch(models, FRAME_SKIP)
    first = states(batch, given)
    assert numpy.ptp(first[-1], axis=0).max() > 0.1, "the environments do not all do the same"
    assert numpy.array_equal(first, states(batch, given))
    for threads in (1, 2):
        assert numpy.array_equal(first, states(MujocoBatch(models, FRAME_SKIP, threads), given)), threads


def test_models_in_one_batch_do_as_each_does_alone() -> None:
    models = [model(), model(mass=3.0), model(gear=0.5), model(stiffness=4.0)]
    given = controls(60, len(models))
    together = states(MujocoBatch(models, FRAME_SKIP), given)
    for row, one in enumerate(models):
        # As often as in the batch, so that it starts from where it does there.
        alone = states(MujocoBatch([one] * len(models), FRAME_SKIP), given)
        assert numpy.array_equal(alone[:, row], together[:, row]), row
    assert numpy.ptp(together[-1], axis=0).max() > 0.1


def test_a_control_step_is_the_physics_steps_of_plain_mujoco() -> None:
    one = model()
    batch = MujocoBatch([one, one], FRAME_SKIP)
    assert batch.control_seconds == pytest.approx(FRAME_SKIP * STEP)
    batch.qpos[1] += 0.3
    batch.qvel[1] -= 0.2
    data = mujoco.MjData(one)
    data.qpos[:], data.qvel[:] = batch.qpos[1], batch.qvel[1]
    for control in controls(20, 2):
        batch.step(control)
        data.ctrl[:] = control[1]
        mujoco.mj_step(one, data, FRAME_SKIP)
        assert numpy.abs(batch.qpos[1] - data.qpos).max() < 1e-9
        assert numpy.abs(batch.qvel[1] - data.qvel).max() < 1e-9
        assert batch.state[1, 0] == pytest.approx(data.time)
    assert batch.steps == 20


def test_reset_puts_every_environment_at_its_models_start() -> None:
    models = [model(), model(mass=2.0)]
    models[1].qpos0[:] = (0.4, -0.2)
    batch = MujocoBatch(models, FRAME_SKIP)
    start = batch.state.copy()
    assert batch.qpos.tolist() == [[0.0, 0.0], [0.4, -0.2]]
    states(batch, controls(5, 2))
    assert batch.steps == 5
    assert not numpy.array_equal(batch.state, start)
    batch.reset()
    assert batch.steps == 0
    assert numpy.array_equal(batch.state, start)


def test_no_environment_is_refused() -> None:
    with pytest.raises(InvalidInput, match="no environments"):
        MujocoBatch([], FRAME_SKIP)


def test_models_of_different_sizes_are_refused() -> None:
    with pytest.raises(InvalidInput, match="different sizes"):
        MujocoBatch([model(), mujoco.MjModel.from_xml_string(SINGLE)], FRAME_SKIP)


@pytest.mark.parametrize(("frame_skip", "threads"), [(0, 1), (-1, 1), (2.5, 1), (3, 0), (3, -1)])
def test_steps_and_threads_out_of_range_are_refused(frame_skip: Any, threads: int) -> None:
    with pytest.raises(InvalidInput, match="expected whole numbers from 1"):
        MujocoBatch([model()], frame_skip, threads)


def test_a_state_of_an_earlier_time_can_be_put_back() -> None:
    batch = MujocoBatch([model()], FRAME_SKIP)
    before = batch.state.copy()
    found = []
    for _ in range(2):
        batch.state[:] = before
        for control in controls(3, 1):
            batch.step(control)
        found.append(batch.state.copy())
    numpy.testing.assert_array_equal(*found)


def test_models_of_different_time_steps_are_refused() -> None:
    with pytest.raises(InvalidInput, match="timestep"):
        MujocoBatch([model(), model(step=STEP / 2)], FRAME_SKIP)


@pytest.mark.parametrize("shape", [(1, 2), (3, 1), (2,), (3, 2, 1)])
def test_a_control_of_another_form_is_refused(shape: tuple[int, ...]) -> None:
    batch = MujocoBatch([model()] * 3, FRAME_SKIP)
    with pytest.raises(InvalidInput, match=r"expected \(3, 2\)"):
        batch.step(numpy.zeros(shape))


@pytest.mark.parametrize("wild", [{"actuator_gear": 1e9}, {"jnt_stiffness": 1e12}, {"actuator_gear": math.nan}])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_world_that_diverges_is_an_error_that_says_when_and_where_and_nothing_else_is_said(
    wild: dict[str, float],
    threads: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    broken = model()
    for name, value in wild.items():
        getattr(broken, name)[:] = value
    # The implicit one of the others would hold a stiff spring.
    broken.opt.integrator = mujoco.mjtIntegrator.mjINT_EULER
    batch = MujocoBatch([model(), model(), broken], FRAME_SKIP, threads)
    batch.qpos[:] += 0.1

    def episode() -> None:
        for control in controls(200, 3):
            batch.step(control)

    with pytest.raises(SimulationDiverged, match=r"step \d+ in 1 of 3 environments, the first of them 2") as found:
        episode()
    assert isinstance(found.value, RolloutStopped)
    assert (found.value.step, found.value.environment) == (batch.steps, 2)
    assert f"control step {batch.steps} " in str(found.value)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")
    batch.reset()
    assert numpy.isfinite(batch.state).all()


def test_a_control_that_is_not_finite_does_not_pass_for_a_step(capfd: pytest.CaptureFixture[str]) -> None:
    batch = MujocoBatch([model(), model()], FRAME_SKIP)
    given = controls(1, 2)[0]
    batch.step(given)
    given[1, 0] = numpy.nan
    with pytest.raises(SimulationDiverged) as found:
        batch.step(given)
    assert (found.value.step, found.value.environment) == (2, 1)
    assert capfd.readouterr() == ("", "")
