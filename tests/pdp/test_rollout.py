"""A policy that acts: what it sees, which of its actions are carried out, and what stops it. The simulation is one that
only counts; the policy is a real one, with a network of random weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy
import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from pdp.errors import ActionNotFinite, RolloutStopped, SimulationDiverged
from pdp.modules_v2 import QKVTransformerForDiffusion
from pdp.normalizer import LinearNormalizer
from pdp.policy import DiffusionPolicy
from pdp.rollout import Rollout, mean_and_interval, roll_out
from pdp.simulation import Simulation
from registry.core.errors import Incompatible, InvalidInput

OBS_DIM, ACTION_DIM = 5, 2
WORLDS = ("flat", "flat", "slope")


class Counting:
    """Its observations say the environment, the step, and what was done last."""

    obs_dim, action_dim = OBS_DIM, ACTION_DIM

    def __init__(self, worlds: Sequence[str] = WORLDS, *, diverges_at: int | None = None) -> None:
        self.worlds = tuple(worlds)
        self.diverges_at = diverges_at
        self.actions: list[Any] = []
        self.given: list[Any] = []

    def reset(self, seed: int) -> Any:
        self.actions.clear()
        self.given[:] = [self._observe(numpy.full((len(self.worlds), ACTION_DIM), seed))]
        return self.given[-1]

    def step(self, action: Any) -> Any:
        self.actions.append(action)
        if len(self.actions) == self.diverges_at:
            raise SimulationDiverged("it fell apart", step=self.diverges_at, environment=1)
        self.given.append(self._observe(action))
        return self.given[-1]

    def _observe(self, last: Any) -> Any:
        rows = numpy.arange(len(self.worlds), dtype=float)[:, None]
        return numpy.concatenate((rows, 0 * rows + len(self.actions), last, 0 * rows), axis=1)

    def measures(self) -> dict[str, Any]:
        total = sum(self.actions)[:, 0] if self.actions else numpy.zeros(len(self.worlds))
        return {"way": total, "success": numpy.arange(len(self.worlds)) % 2.0}


class Noting(DiffusionPolicy):
    """Keeps what it was asked and what it answered."""

    def predict_action(self, obs_dict: Any, **options: Any) -> Any:
        found = super().predict_action(obs_dict, **options)
        self.asked.append(obs_dict["obs"].clone())
        self.answered.append(found["action"].clone())
        return found


def policy(*, T_obs: int = 3, T_action: int = 4, **sizes: int) -> Noting:
    torch.manual_seed(0)
    given = {"obs_dim": OBS_DIM, "input_dim": ACTION_DIM, "output_dim": ACTION_DIM, "emb_dim": 16, "n_head": 2, **sizes}
    network = QKVTransformerForDiffusion(
        **given, T_obs=T_obs, T_action=T_action, n_encoder_layers=1, n_decoder_layers=1, p_drop_emb=0.0, p_drop_attn=0.0
    )
    with torch.no_grad():
        network.head.weight.mul_(50)  # else it says nearly the same whatever it sees
    made = Noting(
        network,
        DDPMScheduler(num_train_timesteps=5, beta_schedule="squaredcos_cap_v2", prediction_type="sample"),
    )
    normalizer = LinearNormalizer()
    obs, action = (torch.randn(50, size) for size in (given["obs_dim"], given["output_dim"]))
    normalizer.fit({"obs": obs, "action": action})
    made.set_normalizer(normalizer)
    made.asked, made.answered = [], []
    return made.eval()


def test_the_simulation_is_one() -> None:
    simulation: Simulation = Counting()
    assert simulation.worlds == WORLDS


def test_the_first_observation_is_repeated_until_there_are_enough() -> None:
    acting, simulation = policy(T_obs=3), Counting()
    roll_out(acting, simulation, steps=4)
    for step, asked in enumerate(acting.asked):
        expected = [simulation.given[max(step - back, 0)] for back in (2, 1, 0)]
        assert asked.shape == (3, 3, OBS_DIM)
        assert numpy.array_equal(asked.numpy(), numpy.stack(expected, axis=1).astype(numpy.float32)), step


@pytest.mark.parametrize("execute", [1, 2, 3, 4])
def test_the_first_actions_of_a_prediction_are_carried_out_one_after_another(execute: int) -> None:
    acting, simulation = policy(T_action=4), Counting()
    steps = 9
    roll_out(acting, simulation, steps=steps, execute=execute)
    assert len(acting.answered) == math.ceil(steps / execute)
    expected = torch.cat([one[:, :execute] for one in acting.answered], dim=1)[:, :steps]
    assert numpy.array_equal(numpy.stack(simulation.actions, axis=1), expected.numpy().astype(numpy.float64))
    assert not torch.equal(acting.answered[0][:, 0], acting.answered[0][:, 1]), "its actions are not all the same"
    # Each prediction is from the observation right before its first action.
    for number, asked in enumerate(acting.asked):
        assert asked[0, -1, 1] == number * execute


def test_the_same_seed_gives_the_same_bits_and_another_gives_others() -> None:
    acting, simulation = policy(), Counting()
    found = []
    for seed in (4, 4, 5):
        roll_out(acting, simulation, steps=6, execute=2, seed=seed)
        found.append(numpy.stack(simulation.actions))
        torch.randn(7)  # the global generator has no part in it
    assert numpy.array_equal(found[0], found[1])
    assert not numpy.array_equal(found[0], found[2])


def test_the_seed_is_that_of_the_starts_and_of_the_noise() -> None:
    acting, simulation = policy(), Counting()
    roll_out(acting, simulation, steps=1, seed=7)
    assert simulation.given[0][:, 2].tolist() == [7.0, 7.0, 7.0]
    start = acting.asked[-1]
    again = acting.predict_action({"obs": start}, generator=torch.Generator().manual_seed(7))["action"]
    assert torch.equal(again, acting.answered[0])


def test_watch_is_called_before_each_step_and_what_it_does_holds_from_the_next_prediction_on() -> None:
    acting, simulation = policy(), Counting()
    seen = []

    def watch(step: int) -> None:
        seen.append((step, len(simulation.actions)))
        if step == 3:
            with torch.no_grad():
                acting.model.head.weight.zero_()
                acting.model.head.bias.zero_()

    roll_out(acting, simulation, steps=6, execute=2, watch=watch)
    assert seen == [(step, step) for step in range(6)]
    zero = acting.normalizer.unnormalize({"action": torch.zeros(3, ACTION_DIM)})["action"].numpy()
    silent = [bool(numpy.allclose(action, zero)) for action in simulation.actions]
    assert silent == [False, False, False, False, True, True]


def test_a_policy_in_training_acts_without_dropout_and_trains_on() -> None:
    made = policy()
    for module in made.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    first = roll_out(made, Counting(), steps=4).measures["way"]
    made.train()
    assert numpy.array_equal(roll_out(made, Counting(), steps=4).measures["way"], first)
    assert made.training
    assert made.model.training


def test_a_rollout_says_what_came_of_each_world() -> None:
    simulation = Counting()
    found = roll_out(policy(), simulation, steps=3)
    assert isinstance(found, Rollout)
    assert (found.worlds, found.steps) == (WORLDS, 3)
    assert found.seconds > 0
    assert numpy.array_equal(found.measures["way"], numpy.stack(simulation.actions)[:, :, 0].sum(axis=0))
    assert found.of_world("flat")["success"].tolist() == [0.0, 1.0]
    assert found.of_world("slope")["way"].tolist() == [found.measures["way"][2]]


def test_nan_in_the_weights_stops_it_at_the_first_step_and_nothing_is_carried_out() -> None:
    acting, simulation = policy(), Counting()
    with torch.no_grad():
        acting.model.head.bias[0] = math.nan
    with pytest.raises(
        ActionNotFinite, match=r"control step 1 of 5, in 3 of 3 environments.*\(world flat\).*NaN"
    ) as found:
        roll_out(acting, simulation, steps=5)
    assert isinstance(found.value, RolloutStopped)
    assert (found.value.step, found.value.environment) == (1, 0)
    assert simulation.actions == []


def test_nan_that_comes_later_is_found_at_the_step_and_in_the_environment_that_it_comes_in() -> None:
    class Spoilt(Noting):
        def predict_action(self, obs_dict: Any, **options: Any) -> Any:
            found = super().predict_action(obs_dict, **options)
            if len(self.answered) == 2:
                found["action"][2, 1, 0] = math.inf
            return found

    acting, simulation = policy(), Counting()
    acting.__class__ = Spoilt
    with pytest.raises(ActionNotFinite, match=r"step 4 of 9, in 1 of 3 environments.*2 \(world slope\)") as found:
        roll_out(acting, simulation, steps=9, execute=2)
    assert (found.value.step, found.value.environment) == (4, 2)
    assert len(simulation.actions) == 3


def test_a_simulation_that_diverges_is_not_hidden() -> None:
    with pytest.raises(SimulationDiverged) as found:
        roll_out(policy(), Counting(diverges_at=3), steps=5)
    assert (found.value.step, found.value.environment) == (3, 1)


@pytest.mark.parametrize("execute", [0, -1, 5])
def test_more_actions_than_are_predicted_cannot_be_carried_out(execute: int) -> None:
    acting, simulation = policy(T_action=4), Counting()
    with pytest.raises(InvalidInput, match=f"execute is {execute}.*T_action = 4"):
        roll_out(acting, simulation, steps=5, execute=execute)
    assert acting.asked == []
    assert simulation.given == []


@pytest.mark.parametrize("steps", [0, -3])
def test_an_episode_without_steps_is_refused(steps: int) -> None:
    with pytest.raises(InvalidInput, match=f"steps is {steps}"):
        roll_out(policy(), Counting(), steps=steps)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"obs_dim": 6}, "obs_dim: the simulation has 5, the policy 6"),
        ({"input_dim": 3, "output_dim": 3}, "action_dim: the simulation has 2, the policy 3"),
        ({"obs_dim": 6, "input_dim": 3, "output_dim": 3}, "obs_dim: .*; action_dim: "),
    ],
)
def test_a_policy_of_another_task_is_refused(sizes: dict[str, int], said: str) -> None:
    simulation = Counting()
    with pytest.raises(Incompatible, match=said):
        roll_out(policy(**sizes), simulation, steps=5)
    assert simulation.given == []


def test_mean_and_interval_are_those_of_the_formula() -> None:
    values = [1.0, 2.0, 4.0, 9.0]
    mean = sum(values) / 4
    deviation = math.sqrt(sum((one - mean) ** 2 for one in values) / 3)
    assert mean_and_interval(values) == pytest.approx((mean, 1.96 * deviation / 2))
    assert mean_and_interval(numpy.full(9, 2.5)) == (2.5, 0.0)


def test_one_value_has_a_mean_and_no_interval() -> None:
    mean, interval = mean_and_interval([3.0])
    assert mean == 3.0
    assert math.isnan(interval)


def test_no_value_has_no_mean() -> None:
    with pytest.raises(InvalidInput, match="no roll-outs"):
        mean_and_interval([])


class Reusing(Counting):
    """Fills one buffer again and again, as many simulators do."""

    buffer = numpy.zeros((len(WORLDS), OBS_DIM), dtype=numpy.float32)

    def reset(self, seed: int) -> Any:
        self.buffer[:] = super().reset(seed)
        return self.buffer

    def step(self, action: Any) -> Any:
        self.buffer[:] = super().step(action)
        return self.buffer


def test_a_simulation_may_use_its_buffer_again() -> None:
    made, other = policy(), policy()
    roll_out(made, Reusing(), steps=5)
    roll_out(other, Counting(), steps=5)
    assert all(torch.equal(a, b) for a, b in zip(made.asked, other.asked, strict=True))


@pytest.mark.parametrize(
    "wrong", [None, numpy.zeros((2, OBS_DIM)), numpy.zeros((3, OBS_DIM + 1)), (numpy.zeros((3, OBS_DIM)), {}), "x"]
)
@pytest.mark.parametrize("who", ["reset", "step"])
def test_observations_of_another_form_are_refused(who: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counting, who, lambda self, given: wrong)
    with pytest.raises(InvalidInput, match=rf"{who}\(\) of the simulation gave"):
        roll_out(policy(), Counting(), steps=5)


@pytest.mark.parametrize(
    ("measures", "words"),
    [
        (None, "gave a NoneType"),
        ({"way": numpy.zeros(4)}, r"the measure way is of the form \(4,\) .*expected numbers, \(3,\)"),
        ({"way": numpy.zeros((3, 2))}, "of the form"),
        ({"way": ["a", "b", "c"]}, "expected numbers"),
        ({"way": numpy.array([1, 2, math.nan])}, "of environment 2 is nan"),
        ({"a b": numpy.zeros(3)}, "measure key 'a b' must be"),
        ({"rollouts": numpy.zeros(3)}, "rollouts has a name that is noted for something else"),
        ({"way_ci95": numpy.zeros(3)}, "way_ci95 has a name"),
    ],
)
def test_measures_of_another_form_are_refused_before_anything_is_done(
    measures: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Counting, "measures", lambda self: measures)
    simulation = Counting()
    with pytest.raises(InvalidInput, match=words):
        roll_out(policy(), simulation, steps=5)
    assert simulation.actions == []
