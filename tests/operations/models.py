"""Tiny models with every kind of layer that LoRA can wrap, and adapters on them whose tensors all do something."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

QV: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


class Walker(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(16, 16)
        self.v_proj = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(self.v_proj(torch.relu(self.q_proj(x))))))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(3, 16, 8))
        self.down_proj = nn.Parameter(torch.randn(3, 8, 16))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("eud,bd->ebu", self.up_proj, x) @ self.down_proj.mT


class Zoo(nn.Module):
    """One layer of each kind; its output has a row for each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(10, 8)
        self.lin = nn.Linear(8, 6)
        self.conv1 = nn.Conv1d(8, 12, 3)
        self.conv2 = nn.Conv2d(4, 6, 3)
        self.grouped = nn.Conv2d(4, 8, 3, groups=2)
        self.conv3 = nn.Conv3d(2, 4, (3, 1, 2))
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
        self.transposed = Conv1D(12, 8)
        self.experts = Experts()
        self.head = nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4))

    def forward(self, ids: Tensor) -> Tensor:
        """(2, 8) token numbers in, everything that came out of the layers in one row."""
        e = self.emb(ids)
        image = e.reshape(2, 4, 4, 4)
        rows = (
            *(self.lin(e), self.conv1(e.mT), self.conv2(image), self.grouped(image)),
            *(self.conv3(e.reshape(2, 2, 4, 2, 4)), self.mha(e, e, e)[0], self.transposed(e)),
            *(self.experts(e[:, 0]), self.head(e)),
        )
        return torch.cat([row.flatten() for row in rows])


def walker(seed: int = 0) -> Walker:
    torch.manual_seed(seed)
    return Walker().eval()


def zoo() -> Zoo:
    torch.manual_seed(0)
    return Zoo().eval()


def steps() -> Tensor:
    """Input of a Walker."""
    return torch.randn(3, 16, generator=torch.Generator().manual_seed(1))


def output(model: nn.Module) -> Tensor:
    """What a Zoo, wrapped or not, gives for fixed token numbers. Without gradients: with them attention has another
    kernel, and its last bits."""
    with torch.no_grad():
        return model(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [9, 8, 7, 6, 5, 4, 3, 0]]))


def train(model: nn.Module, seed: int = 1) -> None:
    """Changes every parameter that learns, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_((0.1 * noise).to(parameter.dtype))


def lora(base: nn.Module | None = None, *, adapter: str = "default", seed: int = 1, **options: Any) -> PeftModel:
    """A trained LoRA on a base (a Walker by default), in eval mode."""
    model = get_peft_model(base if base is not None else walker(), LoraConfig(**(QV | options)), adapter_name=adapter)
    train(model, seed)
    return model.eval()


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that a refused load must leave as it was: objects, flags, values and attributes."""
    return {
        "modules": [(path, id(module), type(module), module.training) for path, module in model.named_modules()],
        "tensors": [
            (path, id(tensor), tensor.data_ptr(), tensor.requires_grad, tensor.detach().clone())
            for path, tensor in named_tensors(model)
        ],
        "attributes": {path: sorted(vars(module)) for path, module in model.named_modules()},
        "hooks": [
            (path, list(module._forward_hooks), list(module._forward_pre_hooks))
            for path, module in model.named_modules()
        ],
    }


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = state_of(model)
    for part in ("modules", "attributes", "hooks"):
        assert after[part] == before[part]
    assert [one[:-1] for one in after["tensors"]] == [one[:-1] for one in before["tensors"]]
    for was, now in zip(before["tensors"], after["tensors"], strict=True):
        assert_same_bits(was[-1], now[-1], was[0])


def assert_same_bits(expected: Tensor, actual: Tensor, name: str = "") -> None:
    assert (expected.dtype, expected.shape) == (actual.dtype, actual.shape), name
    ours, theirs = (one.detach().contiguous().reshape(-1).view(torch.uint8) for one in (expected, actual))
    assert torch.equal(ours, theirs), name
