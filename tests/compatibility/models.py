"""Small models of every family that people train LoRAs on: transformers, diffusers, pdp's network, torch's own layers.
Each is seeded, built once a process and copied from then on, and comes with an input, so that what an adapter does to
it can be compared number by number."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 32
TOKENS = 40


@dataclass(frozen=True)
class Example:
    """A model and what to feed it.

    Attributes:
        build: the model with random weights.
        feed: its output for a fixed input, as one row of float32.
        folder: whether `save_pretrained` saves it, so that it can be pushed as a folder.
    """

    name: str
    build: Callable[[], nn.Module]
    feed: Callable[[nn.Module, torch.dtype], Tensor]
    folder: bool = True


class Bench(nn.Module):
    """One layer of each kind, and a head that shares the embedding's weight; its output has a row for each of them."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.emb = nn.Embedding(TOKENS, 16)
        self.lin = nn.Linear(16, 16)
        self.wide = nn.Linear(16, 24, bias=False)
        self.conv1 = nn.Conv1d(8, 12, 3)
        self.conv2 = nn.Conv2d(4, 6, 3)
        self.grouped = nn.Conv2d(4, 8, 3, groups=2)
        self.mha = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, TOKENS, bias=False)
        if tied:
            self.head.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        """(B, 8) token numbers in, everything that came out of the layers in one row."""
        e = self.emb(ids)
        image = e.reshape(len(ids), 4, 4, 8)
        x = self.norm(self.lin(e))
        rows = (self.wide(x), self.conv1(e), self.conv2(image), self.grouped(image), self.mha(x, x, x)[0], self.head(x))
        return torch.cat([row.flatten() for row in rows])


class Towers(nn.Module):
    """Two stacks of the same layers; the second one's blocks end in a square layer, as attention's do."""

    def __init__(self, depth: int = 3, width: int = WIDTH, labels: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(width, width), "v_proj": nn.Linear(width, width)}) for _ in range(depth)
        )
        self.up_proj = nn.Linear(width, 2 * width)
        self.norm = nn.LayerNorm(2 * width)
        self.head = nn.Linear(2 * width, labels)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block["v_proj"](torch.relu(block["q_proj"](x))))
        out: Tensor = self.head(self.norm(self.up_proj(x)))
        return out


def ids() -> Tensor:
    return torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [9, 8, 7, 6, 5, 4, 3, 2]])


def _feed_ids(model: nn.Module, dtype: torch.dtype) -> Tensor:
    out = model(input_ids=ids())
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def _noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7)).to(dtype)


# ---------------------------------------------------------------- transformers


def bert_config(**changes: Any) -> Any:
    from transformers import BertConfig

    sizes: dict[str, Any] = {"vocab_size": TOKENS, "hidden_size": WIDTH, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 16}
    return BertConfig(**(sizes | changes))


def bert(**changes: Any) -> nn.Module:
    """In the form of MiniLM: a body with a pooler."""
    from transformers import BertModel

    return BertModel(bert_config(**changes))


def classifier(**changes: Any) -> nn.Module:
    from transformers import BertForSequenceClassification

    return BertForSequenceClassification(bert_config(**({"num_labels": 3} | changes)))


def gpt2(**changes: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {"vocab_size": TOKENS, "n_positions": 16, "n_embd": WIDTH, "n_layer": 2, "n_head": 4}
    sizes |= {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**(sizes | changes)))


def llama_config(**changes: Any) -> Any:
    from transformers import LlamaConfig

    sizes: dict[str, Any] = {"vocab_size": TOKENS, "hidden_size": WIDTH, "intermediate_size": 48}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaConfig(**(sizes | {"max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 0} | changes))


def llama(**changes: Any) -> nn.Module:
    """With grouped queries: k_proj and v_proj are half as wide as q_proj."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(llama_config(**changes))


def llama_body(**changes: Any) -> nn.Module:
    from transformers import LlamaModel

    return LlamaModel(llama_config(**changes))


def mixtral(**changes: Any) -> nn.Module:
    """With the experts of a layer in one tensor, as transformers 5 has them."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes: dict[str, Any] = {"vocab_size": TOKENS, "hidden_size": WIDTH, "intermediate_size": 24}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    sizes |= {"num_experts_per_tok": 2, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 0}
    return MixtralForCausalLM(MixtralConfig(**(sizes | changes)))


# ---------------------------------------------------------------- the others


def unet(**changes: Any) -> nn.Module:
    from diffusers import UNet2DConditionModel

    sizes: dict[str, Any] = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1}
    sizes |= {"block_out_channels": (8, 16), "cross_attention_dim": 12, "norm_num_groups": 4, "attention_head_dim": 4}
    sizes |= {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    sizes |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    return UNet2DConditionModel(**(sizes | changes))


def _feed_unet(model: nn.Module, dtype: torch.dtype) -> Tensor:
    out: Tensor = model(_noise(1, 4, 8, 8, dtype=dtype), 3, encoder_hidden_states=_noise(1, 5, 12, dtype=dtype)).sample
    return out


def noise_net(**changes: Any) -> nn.Module:
    """The network of pdp's diffusion policy."""
    from pdp.modules_v2 import QKVTransformerForDiffusion

    sizes: dict[str, Any] = {"input_dim": 3, "output_dim": 3, "obs_dim": 5, "emb_dim": WIDTH, "T_obs": 2, "T_action": 4}
    return QKVTransformerForDiffusion(**(sizes | {"n_encoder_layers": 1, "n_decoder_layers": 2} | changes))


def _feed_noise_net(model: nn.Module, dtype: torch.dtype) -> Tensor:
    out: Tensor = model(_noise(2, 4, 3, dtype=dtype), 5, _noise(2, 2, 5, dtype=dtype))
    return out


def towers(**changes: Any) -> nn.Module:
    return Towers(**changes)


EXAMPLES = {
    one.name: one
    for one in (
        Example("bert", bert, _feed_ids),
        Example("classifier", classifier, _feed_ids),
        Example("gpt2", gpt2, _feed_ids),
        Example("llama", llama, _feed_ids),
        Example("mixtral", mixtral, _feed_ids),
        Example("unet", unet, _feed_unet),
        Example("noise_net", noise_net, _feed_noise_net, folder=False),
        Example("bench", Bench, lambda model, dtype: model(ids()), folder=False),
        Example("untied_bench", lambda: Bench(tied=False), lambda model, dtype: model(ids()), folder=False),
        Example("towers", Towers, lambda model, dtype: model(_noise(3, WIDTH, dtype=dtype)), folder=False),
    )
}


def build(make: Callable[..., nn.Module], seed: int = 0, **changes: Any) -> nn.Module:
    """A model of this form, in eval mode. Zeros that it starts with become small numbers: a zero says nothing."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make(**changes).eval()
    generator = torch.Generator().manual_seed(seed + 1000)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@cache
def _original(name: str, dtype: torch.dtype) -> nn.Module:
    return build(EXAMPLES[name].build).to(dtype)


def fresh(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A copy of an example's model, always with the same weights."""
    return copy.deepcopy(_original(name, dtype))


def output(name: str, model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """What a model of this example, wrapped or not, gives for the fixed input."""
    with torch.no_grad():
        return EXAMPLES[name].feed(model, dtype).flatten().float()
