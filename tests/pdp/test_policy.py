"""The policy: what it asks of a network, its loss, and its actions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor, nn

from pdp.errors import ConfigError
from pdp.normalizer import LinearNormalizer
from pdp.policy import DiffusionPolicy
from pdp.policy_loading import make_noise_scheduler
from registry.core.errors import InvalidInput
from tests.pdp.models import lora, network

NOISE: dict[str, Any] = {"num_train_timesteps": 10, "beta_schedule": "squaredcos_cap_v2"}
DATA = {"obs": torch.randn(64, 11) * 3 + 1, "action": torch.randn(64, 3) * 50 + 100}


class Oracle(nn.Module):
    """Knows the actions (in units of the network), whatever it is shown."""

    input_dim = output_dim = 3
    obs_dim, T_obs, T_action = 11, 4, 2

    def __init__(self, clean: Tensor, scheduler: Any) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))
        self.clean = clean
        self.scheduler = scheduler

    def forward(self, sample: Tensor, timestep: Tensor, cond: Tensor) -> Tensor:
        if self.scheduler.config.prediction_type == "sample":
            return self.clean + self.bias
        alpha = self.scheduler.alphas_cumprod[torch.as_tensor(timestep)].reshape(-1, 1, 1)
        return (sample - alpha.sqrt() * self.clean) / (1 - alpha).sqrt() + self.bias


def normalizer() -> LinearNormalizer:
    made = LinearNormalizer()
    made.fit(DATA)
    return made


def policy(model: nn.Module | None = None, kind: type = DDPMScheduler, **options: Any) -> DiffusionPolicy:
    made = DiffusionPolicy(model or network(), kind(**{**NOISE, "prediction_type": "sample", **options}))
    made.set_normalizer(normalizer())
    return made.eval()


def batch(size: int = 5) -> dict[str, Tensor]:
    return {"obs": torch.randn(size, 4, 11), "action": torch.randn(size, 2, 3) * 50 + 100}


@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize("prediction", ["sample", "epsilon"])
def test_a_perfect_network_gives_its_actions_in_the_datas_own_units_and_no_loss(kind: type, prediction: str) -> None:
    scheduler = kind(**NOISE, prediction_type=prediction)
    given = batch()
    clean = normalizer().normalize({"action": given["action"]})["action"].clamp(-1, 1)
    actions = normalizer().unnormalize({"action": clean})["action"]
    made = DiffusionPolicy(Oracle(clean, scheduler), scheduler)
    made.set_normalizer(normalizer())
    found = made.predict_action({"obs": given["obs"]})["action"]
    assert torch.allclose(found, actions, atol=0.05)
    assert made.compute_loss({"obs": given["obs"], "action": actions}).item() == pytest.approx(0, abs=1e-6)


def test_the_loss_is_that_of_its_definition() -> None:
    made, given = policy(), batch()
    torch.manual_seed(4)
    found = made.compute_loss(given)
    torch.manual_seed(4)
    normal = made.normalizer.normalize(given)
    noise = torch.randn(5, 2, 3)
    steps = torch.randint(0, 10, (5,))
    alpha = made.noise_scheduler.alphas_cumprod[steps].reshape(-1, 1, 1)
    noisy = alpha.sqrt() * normal["action"] + (1 - alpha).sqrt() * noise
    expected = (made.model(noisy, steps, normal["obs"]) - normal["action"]).square().mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    found.backward()
    assert any(one.grad is not None for one in made.model.parameters())


def test_actions_are_a_function_of_observations_and_generator() -> None:
    made, obs = policy(lora()), torch.randn(3, 4, 11)

    def act(seed: int, x: Tensor = obs) -> Tensor:
        return made.predict_action({"obs": x}, generator=torch.Generator().manual_seed(seed))["action"]

    assert act(1).shape == (3, 2, 3)
    assert torch.equal(act(1), act(1))
    assert not torch.equal(act(1), act(2))
    assert not torch.equal(act(1), act(1, obs + 1))
    assert not act(1).requires_grad


def test_fewer_denoising_steps_may_be_taken() -> None:
    calls = []
    model = network()
    model.register_forward_hook(lambda *_: calls.append(1))
    made = DiffusionPolicy(model, DDIMScheduler(**NOISE, prediction_type="sample"), num_inference_steps=4)
    made.set_normalizer(normalizer())
    made.predict_action({"obs": torch.randn(1, 4, 11)})
    assert len(calls) == 4
    with pytest.raises(InvalidInput, match="num_inference_steps is 11; expected 1 to 10"):
        DiffusionPolicy(model, made.noise_scheduler, num_inference_steps=11)


def test_arrays_are_taken_as_they_come_from_a_simulator() -> None:
    made, obs = policy(), torch.randn(2, 4, 11)
    found, expected = (
        made.predict_action({"obs": one}, generator=torch.Generator().manual_seed(1))["action"]
        for one in (obs.double().numpy(), obs)
    )
    assert torch.allclose(found, expected, atol=1e-6)
    losses = []
    for one in (
        batch := {"obs": obs, "action": torch.randn(2, 2, 3)},
        {k: v.double().numpy() for k, v in batch.items()},
    ):
        torch.manual_seed(0)
        losses.append(made.compute_loss(one).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize(
    ("obs", "named"),
    [
        ([1.0], "obs: expected a tensor or an array, found a list"),
        (numpy.full((1, 4, 11), "a"), "obs: expected numbers, found an array of <U1"),
    ],
)
def test_observations_that_are_no_numbers_are_named(obs: Any, named: str) -> None:
    for way in (policy().predict_action, policy().compute_loss):
        with pytest.raises(InvalidInput, match=named):
            way({"obs": obs, "action": torch.zeros(1, 2, 3)})


@pytest.mark.parametrize("value", [numpy.nan, -numpy.inf, 1e300])
def test_a_policy_does_not_act_on_what_is_not_finite(value: float) -> None:
    obs = numpy.zeros((3, 4, 11))
    obs[1:, 2, 3] = value
    for one in (obs, torch.tensor(obs)):
        with pytest.raises(InvalidInput, match="obs: row 1 of the batch has values that are not finite"):
            policy().predict_action({"obs": one})


@pytest.mark.parametrize("steps", [0, 1.5, True, "3", [2]])
def test_numbers_of_denoising_steps_that_cannot_be_are_named(steps: Any) -> None:
    with pytest.raises(InvalidInput, match="num_inference_steps is"):
        DiffusionPolicy(network(), DDPMScheduler(**NOISE, prediction_type="sample"), num_inference_steps=steps)


def test_a_window_is_as_long_as_observations_and_actions_that_share_one_step() -> None:
    made = policy()
    assert (made.T_range, made.T_obs, made.T_action, made.obs_dim, made.action_dim) == (5, 4, 2, 11, 3)


def test_the_state_dict_holds_network_and_normaliser() -> None:
    names = set(policy().state_dict())
    assert {"model.head.weight", "normalizer.params_dict.obs.scale"} <= names
    fresh = DiffusionPolicy(network(), DDPMScheduler(**NOISE, prediction_type="sample"))
    fresh.load_state_dict(policy().state_dict())
    assert fresh.normalizer.is_fitted


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"action": torch.zeros(1, 2, 3)}, "obs is missing; found action"),
        ({"obs": torch.zeros(1, 3, 11)}, r"obs: expected \(B, 4, 11\), found \(1, 3, 11\)"),
        ({"obs": torch.zeros(4, 11)}, r"obs: expected \(B, 4, 11\), found \(4, 11\)"),
    ],
)
def test_inputs_of_another_form_are_named(given: Mapping[str, Tensor], named: str) -> None:
    with pytest.raises(InvalidInput, match=named):
        policy().predict_action(given)
    with pytest.raises(InvalidInput, match=named):
        policy().compute_loss({"action": torch.zeros(1, 2, 3), **given})


def test_a_policy_needs_a_normaliser_of_its_sizes() -> None:
    made = DiffusionPolicy(network(), DDPMScheduler(**NOISE, prediction_type="sample"))
    with pytest.raises(InvalidInput, match="no normaliser yet"):
        made.predict_action({"obs": torch.zeros(1, 4, 11)})
    with pytest.raises(InvalidInput, match="is not fitted"):
        made.set_normalizer(LinearNormalizer())
    other = LinearNormalizer()
    other.fit({"obs": torch.randn(5, 12)})
    with pytest.raises(InvalidInput, match="obs has 12 dimensions, the network 11"):
        made.set_normalizer(other)
    other.fit({"obs": torch.randn(5, 11)})
    with pytest.raises(InvalidInput, match="action has no dimensions, the network 3"):
        made.set_normalizer(other)


def test_what_the_policy_does_not_do_is_refused() -> None:
    with pytest.raises(InvalidInput, match="prediction_type is 'v_prediction'"):
        policy(prediction_type="v_prediction")
    for model in (network(past_action_visible=True), lora(network(past_action_visible=True))):
        with pytest.raises(InvalidInput, match="past_action_visible=True"):
            policy(model)


def test_schedulers_are_made_by_name_from_a_table() -> None:
    assert isinstance(make_noise_scheduler(NOISE), DDPMScheduler)
    for name in ("DDIMScheduler", "diffusers.DDIMScheduler", "diffusers.schedulers.scheduling_ddim.DDIMScheduler"):
        assert isinstance(make_noise_scheduler({**NOISE, "_target_": name}), DDIMScheduler)
    with pytest.raises(ConfigError, match="did you mean DDIMScheduler"):
        make_noise_scheduler({"_target_": "DDIMSheduler"})
    with pytest.raises(ConfigError, match="no argument num_train_timestep; did you mean num_train_timesteps"):
        make_noise_scheduler({"num_train_timestep": 10})
