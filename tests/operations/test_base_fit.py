"""Which bases an adapter's targets can be of."""

from __future__ import annotations

from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict

from registry.core.adapter_config import adapter_config
from registry.core.adapter_names import Target, targets_of
from registry.core.layout import Layout, TensorSpec
from registry.formats.live import tensor_spec
from registry.operations.base_fit import asked_targets, misfit, modules_of
from tests.operations.models import Zoo, lora, zoo


def base(*tensors: tuple[str, tuple[int, ...]], dtype: str = "F32") -> Layout:
    return Layout(tuple(TensorSpec(name, dtype, shape) for name, shape in tensors))


def linear(module: str, in_features: int = 8, out_features: int = 4) -> Target:
    return Target(module, 2, in_features, out_features, "linear")


def layout_of(model: Zoo) -> Layout:
    return Layout(tuple(tensor_spec(name, tensor) for name, tensor in model.state_dict().items()))


@pytest.mark.filterwarnings("ignore::UserWarning")  # of PEFT, about groups and a transposed Conv1D
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"target_modules": ["emb", "lin", "conv1", "conv2", "grouped", "conv3", "mha"]}, 8),
        ({"target_modules": ["transposed"], "fan_in_fan_out": True, "modules_to_save": ["head"]}, 1),
        ({"target_modules": [], "target_parameters": ["experts.up_proj", "experts.down_proj"]}, 2),
    ],
    ids=["modules", "transposed", "parameters"],
)
def test_every_kind_of_layer_is_found_in_the_model_that_it_was_made_for(
    options: dict[str, Any], count: int, wrapped: bool
) -> None:
    config = LoraConfig(r=2, **options)
    model = get_peft_model(zoo(), config)
    saved = get_peft_model_state_dict(model, save_embedding_layers=False)
    adapter = Layout(tuple(tensor_spec(name, tensor) for name, tensor in saved.items()))
    targets = asked_targets(targets_of(adapter, adapter_config(config.to_dict()))[0])
    assert len(targets) == count
    # As the model was saved alone, and with the adapter around it.
    there = Layout(tuple(tensor_spec(name, tensor) for name, tensor in model.state_dict().items()))
    assert misfit(targets, modules_of(there if wrapped else layout_of(zoo()))) is None


def test_the_first_difference_is_told() -> None:
    there = modules_of(base(("a.q.weight", (4, 8)), ("a.v.weight", (4, 9))))
    assert misfit([linear("a.q")], there) is None
    assert misfit([linear("a.q"), linear("a.v")], there) == "a.v has (out, in) (4, 9), and the adapter is for (4, 8)"
    assert misfit([linear("a.q"), linear("a.k")], there) == "it has no module a.k"
    assert misfit([linear("b.q")], there) == "it has no module b.q"


@pytest.mark.parametrize(
    ("target", "module", "fits"),
    [
        ("bert.layer.0.q", "layer.0.q", True),
        ("layer.0.q", "model.layer.0.q", True),
        ("layer.0.q", "model.bert.layer.0.q", True),
        ("layer.0.q", "a.b.c.layer.0.q", False),
        ("layer.0.q", "layer.1.q", False),
        ("x.q", "xq", False),
    ],
)
def test_a_prefix_that_one_side_alone_has_is_no_difference(target: str, module: str, fits: bool) -> None:
    assert (misfit([linear(target)], modules_of(base((f"{module}.weight", (4, 8))))) is None) is fits


def test_one_prefix_has_to_do_for_all_targets() -> None:
    there = modules_of(base(("x.q.weight", (4, 8)), ("y.v.weight", (4, 8))))
    assert misfit([linear("q"), linear("v")], there) == "it has no module x.v"


def test_of_packed_weights_only_the_module_is_asked() -> None:
    assert misfit([linear("q")], modules_of(base(("q.weight", (16, 1)), dtype="U8"))) is None
    assert misfit([linear("q")], modules_of(base(("q.qweight", (1, 4)), ("q.scales", (1, 4)), dtype="I32"))) is None


def test_whole_copies_are_not_asked_of_a_base() -> None:
    model = lora(modules_to_save=["head"])
    adapter = Layout(tuple(tensor_spec(name, one) for name, one in get_peft_model_state_dict(model).items()))
    targets, _ = targets_of(adapter, None)
    assert {target.module for target in targets} == {"q_proj", "v_proj", "head"}
    assert {target.module for target in asked_targets(targets)} == {"q_proj", "v_proj"}
