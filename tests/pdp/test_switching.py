"""Adapters that are put on a policy and taken off while it acts. What does not fit is refused, and the policy then acts
as before, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pdp.errors import CheckpointError
from pdp.lora_model import LoraTransformerForDiffusion
from pdp.normalizer import LinearNormalizer
from pdp.policy import DiffusionPolicy
from pdp.policy_loading import DEFAULT_NOISE, make_noise_scheduler
from registry import Registry
from registry.core.errors import Incompatible, InvalidInput
from tests.pdp.models import SIZES, lora, network


@pytest.fixture
def registry(tmp_path: Path) -> Any:
    """A base, and on it two adapters of different ranks and targets."""
    with Registry.init(tmp_path / "registry") as registry:
        registry.push(network(), "robot/base:v1")
        for name, settings in {
            "one": {},
            "two": {"lora_r": 6, "lora_alpha": 3, "target_modules": ["mlp"]},
        }.items():
            model = lora(seed=len(name) + len(settings), **settings)
            model.save_lora_adapters(f"registry://robot/{name}:prod", base="robot/base:v1", registry=registry)
        yield registry


@pytest.fixture
def policy() -> DiffusionPolicy:
    return policy_of(network())


def policy_of(model: torch.nn.Module) -> DiffusionPolicy:
    made = DiffusionPolicy(model, make_noise_scheduler(DEFAULT_NOISE)).eval()
    normalizer = LinearNormalizer()
    generator = torch.Generator().manual_seed(0)
    sizes = {"obs": SIZES["obs_dim"], "action": SIZES["input_dim"]}
    normalizer.fit({key: torch.randn(50, size, generator=generator) for key, size in sizes.items()})
    made.set_normalizer(normalizer)
    return made


def action(policy: DiffusionPolicy) -> Tensor:
    obs = torch.linspace(-1, 1, 3 * policy.T_obs * policy.obs_dim).reshape(3, policy.T_obs, policy.obs_dim)
    return policy.predict_action({"obs": obs}, generator=torch.Generator().manual_seed(1))["action"]


def loaded(registry: Registry, name: str) -> Tensor:
    """What a policy does that is made of base and adapter together."""
    model = LoraTransformerForDiffusion.from_checkpoint(f"registry://robot/{name}:prod", registry=registry)
    return action(policy_of(model))


def test_an_adapter_comes_and_goes_bit_for_bit(policy: DiffusionPolicy, registry: Registry) -> None:
    before = action(policy)
    policy.load_adapter("registry://robot/one:prod", registry=registry)
    assert torch.equal(action(policy), loaded(registry, "one"))
    assert not torch.allclose(action(policy), before, atol=1e-3)
    policy.unload_adapter()
    assert torch.equal(action(policy), before)
    assert type(policy.model) is type(network())


def test_another_adapter_takes_the_place_of_the_first(policy: DiffusionPolicy, registry: Registry) -> None:
    policy.load_adapter("registry://robot/one:prod", registry=registry)
    policy.load_adapter("registry://robot/two:prod", registry=registry)
    assert torch.equal(action(policy), loaded(registry, "two"))
    policy.load_adapter("registry://robot/one:prod", registry=registry)
    assert torch.equal(action(policy), loaded(registry, "one"))


def test_a_file_is_as_good_as_a_version(policy: DiffusionPolicy, registry: Registry, tmp_path: Path) -> None:
    lora(seed=3).save_lora_adapters(str(tmp_path / "one.pth"))
    policy.load_adapter(tmp_path / "one.pth")
    assert torch.equal(action(policy), loaded(registry, "one"))


@pytest.mark.parametrize("changed", [{"T_action": 8}, {"emb_dim": 64}, {"n_head": 2}, {"n_decoder_layers": 3}])
def test_an_adapter_of_another_network_is_refused_and_the_one_there_stays(
    registry: Registry, changed: dict[str, int]
) -> None:
    registry.push(network(**changed), "robot/other:v1")
    policy = policy_of(network(**changed))
    other = lora(network(**changed), seed=3)
    other.save_lora_adapters("registry://robot/mine:prod", base="robot/other:v1", registry=registry)
    policy.load_adapter("registry://robot/mine:prod", registry=registry)
    before, model = action(policy), policy.model
    with pytest.raises(Incompatible) as refusal:
        policy.load_adapter("registry://robot/one:prod", registry=registry)
    assert policy.model is model
    assert torch.equal(action(policy), before)
    [name] = changed
    if name in ("T_action", "n_head"):  # no shape of the adapter shows them
        assert name in str(refusal.value)
    policy.unload_adapter()


def test_an_adapter_of_other_weights_is_refused(registry: Registry) -> None:
    policy = policy_of(network(seed=5))
    before = action(policy)
    with pytest.raises(Incompatible, match="other weights"):
        policy.load_adapter("registry://robot/one:prod", registry=registry)
    assert torch.equal(action(policy), before)


def test_what_is_no_adapter_is_refused(policy: DiffusionPolicy, registry: Registry) -> None:
    with pytest.raises(CheckpointError, match="holds no LoRA"):
        policy.load_adapter("registry://robot/base:v1", registry=registry)
    with pytest.raises(InvalidInput, match="the policy has no adapter"):
        policy.unload_adapter()


def test_modes_stay_what_they_were(policy: DiffusionPolicy, registry: Registry) -> None:
    policy.load_adapter("registry://robot/one:prod", registry=registry)
    assert not any(module.training for module in policy.model.modules())
    policy.unload_adapter()
    assert not any(module.training for module in policy.model.modules())


def test_a_checkpoint_with_another_network_within_is_refused(policy: DiffusionPolicy, tmp_path: Path) -> None:
    other = lora(network(seed=5), seed=3)
    other.save_full_checkpoint(str(tmp_path / "other.pth"))
    before = action(policy)
    with pytest.raises(Incompatible, match="holds a network of other weights than the policy's"):
        policy.load_adapter(tmp_path / "other.pth")
    assert torch.equal(action(policy), before)
    mine = lora(network(), seed=3)
    mine.save_full_checkpoint(str(tmp_path / "mine.pth"))
    policy.load_adapter(tmp_path / "mine.pth")
    assert not torch.equal(action(policy), before)


def test_what_trains_in_the_network_trains_again_without_the_adapter(
    policy: DiffusionPolicy, registry: Registry
) -> None:
    first = next(policy.model.parameters()).requires_grad_(False)
    flags = [parameter.requires_grad for parameter in policy.model.parameters()]
    assert any(flags)
    policy.load_adapter("registry://robot/one:prod", registry=registry)
    policy.load_adapter("registry://robot/two:prod", registry=registry)
    policy.unload_adapter()
    assert [parameter.requires_grad for parameter in policy.model.parameters()] == flags
    assert not first.requires_grad


@pytest.mark.parametrize("there", [None, "two"])
@pytest.mark.parametrize("moment", ["on_base", "train"])
def test_an_interrupt_at_any_moment_leaves_the_policy_as_it_was(
    policy: DiffusionPolicy, registry: Registry, monkeypatch: pytest.MonkeyPatch, there: str | None, moment: str
) -> None:
    if there is not None:
        policy.load_adapter(f"registry://robot/{there}:prod", registry=registry)
    before = action(policy)
    whole = getattr(LoraTransformerForDiffusion, moment)

    def interrupted(*arguments: Any, **options: Any) -> None:
        whole(*arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LoraTransformerForDiffusion, moment, interrupted)
        with pytest.raises(KeyboardInterrupt):
            policy.load_adapter("registry://robot/one:prod", registry=registry)
    assert torch.equal(action(policy), before)
    policy.load_adapter("registry://robot/one:prod", registry=registry)
    assert torch.equal(action(policy), loaded(registry, "one"))


def test_an_interrupt_while_it_is_taken_off_leaves_it_on(
    policy: DiffusionPolicy, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy.load_adapter("registry://robot/one:prod", registry=registry)
    before = action(policy)
    model: Any = policy.model
    whole = model.lora_model.unload

    def interrupted() -> None:
        whole()
        raise KeyboardInterrupt

    model.lora_model.unload = interrupted
    with pytest.raises(KeyboardInterrupt):
        policy.unload_adapter()
    del model.lora_model.unload
    assert torch.equal(action(policy), before)
    policy.unload_adapter()
