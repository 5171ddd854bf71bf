"""The network: its names, its function, and what it refuses."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch

from pdp.modules_v2 import CONSTRUCTOR_ARGUMENTS, QKVTransformerForDiffusion, sinusoidal_embedding
from registry.core.errors import InvalidInput
from tests.pdp.models import EXPECTED, FORWARD, LEGACY, SIZES, close, network, output


def test_the_state_dict_has_the_names_and_shapes_of_existing_checkpoints() -> None:
    saved = torch.load(LEGACY / "merged.pth", weights_only=True)["model_state_dict"]
    own = network().state_dict()
    assert {name: one.shape for name, one in own.items()} == {name: one.shape for name, one in saved.items()}
    assert set(own) == set(EXPECTED["merged_tensors"])


@pytest.mark.parametrize("causal", [False, True])
def test_the_recorded_outputs_are_given_with_and_without_causal_cross_attention(causal: bool) -> None:
    model = network(causal_cross_attn=causal)
    model.load_state_dict(torch.load(LEGACY / "merged.pth", weights_only=True)["model_state_dict"])
    recorded = FORWARD["output_causal_cross_attention" if causal else "output"]
    assert close(output(model), recorded)
    assert not close(output(model), FORWARD["output" if causal else "output_causal_cross_attention"])


def test_causal_attention_adds_a_mask_and_hides_later_actions() -> None:
    model = network(causal_attn=True)
    assert model.state_dict()["mask"].shape == (2, 2)
    before = output(model)
    changed = FORWARD["sample"].clone()
    changed[:, 1] += 1
    with torch.no_grad():
        after = model(changed, FORWARD["timestep"], FORWARD["cond"])
    assert torch.equal(before[:, 0], after[:, 0])
    assert not torch.equal(before[:, 1], after[:, 1])
    assert "mask" not in network().state_dict()


def test_a_mask_of_the_form_that_is_added_means_the_same() -> None:
    model = network(causal_attn=True)
    added = torch.zeros(2, 2).masked_fill(~model.get_buffer("mask"), float("-inf"))
    other = network(seed=1, causal_attn=True)
    other.load_state_dict({**model.state_dict(), "mask": added})
    assert torch.equal(output(other), output(model))


def test_constructor_arguments_are_attributes_and_make_the_same_network() -> None:
    model = network(causal_cross_attn=True, p_drop_emb=0.3)
    assert set(CONSTRUCTOR_ARGUMENTS) == set(inspect.signature(QKVTransformerForDiffusion).parameters)
    again = QKVTransformerForDiffusion(**model.constructor_arguments)
    assert again.constructor_arguments == model.constructor_arguments
    assert (model.obs_dim, model.T_action, model.n_head, model.obs_type) == (11, 2, 4, "ref")
    again.load_state_dict(model.state_dict())
    assert torch.equal(output(again.eval()), output(model))


def test_a_step_may_be_a_number_a_scalar_or_one_for_each_sample() -> None:
    model = network()
    with torch.no_grad():
        whole = model(FORWARD["sample"], torch.tensor([3, 3, 3, 3]), FORWARD["cond"])
        for step in (3, torch.tensor(3), torch.tensor([3])):
            assert torch.equal(model(FORWARD["sample"], step, FORWARD["cond"], unknown=None), whole)


def test_the_step_token_is_sines_then_cosines_of_falling_frequencies() -> None:
    found = sinusoidal_embedding(torch.tensor([5]), 8)[0]
    frequencies = [math.exp(-math.log(10000) * i / 3) for i in range(4)]
    expected = [math.sin(5 * f) for f in frequencies] + [math.cos(5 * f) for f in frequencies]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_weights_begin_small_and_biases_at_zero() -> None:
    model = network(emb_dim=128)
    state = model.state_dict()
    assert state["encoder.blocks.0.mlp.fc1.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert state["pos_emb"].std().item() == pytest.approx(0.02, rel=0.3)
    assert all(not one.any() for name, one in state.items() if name.endswith("bias"))


def test_optimizer_groups_hold_each_parameter_once_and_only_matrices_of_layers_decay() -> None:
    model = network()
    decay, no_decay = model.get_optim_groups(weight_decay=0.1)
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.1, 0.0)
    held = [id(one) for one in (*decay["params"], *no_decay["params"])]
    assert sorted(held) == sorted(map(id, model.parameters()))
    decaying = {id(one) for one in decay["params"]}
    names = {name for name, one in model.named_parameters() if id(one) in decaying}
    assert "head.weight" in names
    assert not names & {"pos_emb", "cond_pos_emb", "ln_f.weight", "head.bias"}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"emb_dim": 30}, "no multiple of n_head"),
        ({"emb_dim": 33, "n_head": 3}, "even"),
        ({"T_obs": 0}, "T_obs is 0"),
        ({"obs_dim": "11"}, "obs_dim is '11'"),
        ({"n_encoder_layers": -1}, "n_encoder_layers is -1"),
        ({"p_drop_attn": 1.0}, "p_drop_attn is 1.0"),
        ({"obs_type": "image"}, "obs_type 'image'"),
    ],
)
def test_arguments_that_do_not_go_together_are_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidInput, match=named):
        QKVTransformerForDiffusion(**{**SIZES, **arguments})


def test_inputs_of_another_shape_are_named_with_both_shapes() -> None:
    model = network()
    with pytest.raises(InvalidInput, match=r"cond: expected \(B, T_obs, obs_dim\) = \(B, 4, 11\), found \(4, 4, 12\)"):
        model(FORWARD["sample"], 0, torch.zeros(4, 4, 12))
    with pytest.raises(InvalidInput, match="sample: expected"):
        model(torch.zeros(4, 3), 0, FORWARD["cond"])
    for steps, shape in ((torch.tensor([1, 2, 3]), r"\(3,\)"), (torch.zeros(4, 1), r"\(4, 1\)")):
        with pytest.raises(
            InvalidInput, match=rf"timestep: expected a number, a 0-d tensor or \(B,\) = \(4,\), found {shape}"
        ):
            model(FORWARD["sample"], steps, FORWARD["cond"])
    with pytest.raises(InvalidInput, match="batch of 3"):
        model(FORWARD["sample"][:3], 0, FORWARD["cond"])
