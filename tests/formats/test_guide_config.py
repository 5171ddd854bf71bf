"""LoRA settings as pdp saves them, with options, become PEFT's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from registry import Registry
from registry.core.errors import InvalidConfig, InvalidInput
from registry.formats.guide_config import config_from_settings

NAMES = ["q.lora_A.weight", "q.lora_B.weight"]
SETTINGS: dict[str, Any] = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.1}


def test_options_stand_beside_and_change_nothing_of_the_settings() -> None:
    options = {
        "use_rslora": True,
        "bias": "all",
        "rank_pattern": {"q": 2},
        "modules_to_save": ("head",),
        "init_lora_weights": "gaussian",
        **{"r": 99, "lora_alpha": 99, "lora_dropout": 0.9, "peft_type": "LOHA", "target_modules": ["other"]},
    }
    found = config_from_settings({**SETTINGS, "lora_options": options}, NAMES, "it")
    assert (found.peft_type, found.r, found.lora_alpha, found.lora_dropout) == ("LORA", 4, 8, 0.1)
    assert (found.use_rslora, found.bias, found.rank_pattern, found.modules_to_save) == (
        True,
        "all",
        {"q": 2},
        ("head",),
    )
    assert found.target_modules == ("q",)


@pytest.mark.parametrize("options", [None, {}])
def test_no_options_are_no_options(options: object) -> None:
    plain = config_from_settings(SETTINGS, NAMES, "it")
    assert config_from_settings({**SETTINGS, "lora_options": options}, NAMES, "it") == plain
    assert plain.bias == "none"


def shared(levels: int) -> Any:
    value: Any = [0]
    for _ in range(levels):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["use_rslora"], "lora_options is a list; expected a dict of keys"),
        ("use_rslora", "lora_options is a str"),
        ({1: True}, "lora_options is keys that are not text"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"init_lora_weights": object()}, "a object"),
        ({"rank_pattern": shared(30)}, "expected at most 100000 values"),
    ],
)
def test_options_of_another_form_are_refused(options: object, why: str) -> None:
    with pytest.raises(InvalidInput, match=why) as caught:
        config_from_settings({**SETTINGS, "lora_options": options}, NAMES, "it")
    assert isinstance(caught.value, InvalidConfig) == ("at most" not in why)


class Walker(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.v = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.v(torch.relu(self.q(x)))


@pytest.mark.parametrize("form", ["adapter", "full"])
def test_a_pushed_pth_computes_with_its_options(tmp_path: Path, form: str) -> None:
    options: dict[str, Any] = {"use_rslora": True, "rank_pattern": {"v": 2}, "alpha_pattern": {"v": 32}}
    torch.manual_seed(0)
    base = Walker()
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q", "v"], **options))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    settings = {
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "target_modules": ["q", "v"],
        "lora_options": options,
    }
    state = model.state_dict()
    adapter = {name: tensor for name, tensor in state.items() if "lora_" in name}
    payload = (
        {**settings, "lora_state_dict": adapter}
        if form == "adapter"
        else {"model_state_dict": state, "lora_config": settings}
    )
    torch.save(payload, tmp_path / "lora.pth")
    with Registry.init(tmp_path / "registry") as registry:
        pushed = registry.push(tmp_path / "lora.pth", "a/lora")
        assert pushed.findings == ()
        assert registry.get("a/lora").use_rslora
        live = registry.push(model, "a/live", kind=None if form == "adapter" else "checkpoint", probe=False)
        assert registry.get("a/lora").content_digest == registry.get(live.reference).content_digest
        if form == "adapter":
            fresh = Walker()
            fresh.load_state_dict(weights)
            x = torch.randn(3, 8)
            assert torch.equal(registry.load("a/lora", fresh)(x), model(x))
