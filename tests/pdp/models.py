"""Small networks and LoRAs for the tests of pdp, of the sizes of the older framework's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pdp.lora_model import LoraTransformerForDiffusion
from pdp.modules_v2 import QKVTransformerForDiffusion

LEGACY = Path(__file__).parents[1] / "formats" / "legacy"
EXPECTED: dict[str, Any] = json.loads((LEGACY / "expected.json").read_bytes())
FORWARD: dict[str, Tensor] = torch.load(LEGACY / "forward.pth", weights_only=True)
SIZES: dict[str, Any] = EXPECTED["model"]
TARGETS = ["q_proj", "k_proj", "out_proj"]


def network(seed: int = 0, **arguments: Any) -> QKVTransformerForDiffusion:
    torch.manual_seed(seed)
    return QKVTransformerForDiffusion(**{**SIZES, **arguments}).eval()


def lora(base: nn.Module | None = None, *, seed: int = 1, **settings: Any) -> LoraTransformerForDiffusion:
    """A LoRA on a network, whose every tensor does something."""
    model = LoraTransformerForDiffusion(
        network() if base is None else base,
        **{"lora_r": 4, "lora_alpha": 8, "target_modules": TARGETS, **settings},
    )
    train(model, seed)
    return model.eval()


def train(model: nn.Module, seed: int = 1) -> None:
    """Changes every parameter that learns."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def output(model: nn.Module) -> Tensor:
    """What a network, wrapped or not, gives for the recorded inputs."""
    with torch.no_grad():
        found: Tensor = model(FORWARD["sample"], FORWARD["timestep"], FORWARD["cond"])
        return found


def close(a: Tensor, b: Tensor, *, at_most: float = 1e-6) -> bool:
    return bool((a - b).abs().max() <= at_most)


def same_tensors(a: nn.Module, b: nn.Module) -> bool:
    mine, others = a.state_dict(), b.state_dict()
    return mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)
