"""The network of a diffusion policy: an encoder over the diffusion step and the observations, and a decoder over noisy
actions. Attention has separate q, k and v projections, so that LoRA can target them by name."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from registry.core.errors import InvalidInput

OBS_TYPES = ("ref", None)
_EPS = 1e-6  # of the norms within blocks; `ln_f` has torch's own
_MLP_RATIO = 4


class QKVTransformerForDiffusion(nn.Module):
    """Predicts noise or clean actions from noisy actions, a diffusion step and observations.

    State-dict names are those of existing checkpoints. Every constructor argument stays readable as an attribute, and
    all of them as `constructor_arguments`.

    Args:
        input_dim: size of one action that goes in.
        output_dim: size of one action that comes out.
        obs_dim: size of one observation.
        emb_dim: width; even, and a multiple of `n_head`.
        T_obs: observations that it is conditioned on.
        T_action: actions that it predicts.
        n_head: attention heads. No shape shows it.
        p_drop_emb, p_drop_attn: dropout on embeddings, and on attention weights and residuals.
        obs_type: `ref` or None; recorded, of no effect on what is computed.
        causal_attn: action i sees actions 0 to i only (adds the buffer `mask`).
        past_action_visible: recorded for existing configurations, of no effect on the network.
        causal_cross_attn: action i sees memory tokens 0 to i only, the form of older code. No name or shape shows it.
            Memory token 0 is the diffusion step, token 1 + j observation j.

    Raises:
        InvalidInput: sizes that do not go together.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        obs_dim: int,
        emb_dim: int,
        T_obs: int,
        T_action: int,
        n_encoder_layers: int = 4,
        n_decoder_layers: int = 4,
        n_head: int = 4,
        p_drop_emb: float = 0.1,
        p_drop_attn: float = 0.1,
        obs_type: str | None = None,
        causal_attn: bool = False,
        past_action_visible: bool = False,
        *,
        causal_cross_attn: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"input_dim": input_dim, "output_dim": output_dim, "obs_dim": obs_dim, "emb_dim": emb_dim}
        sizes |= {"T_obs": T_obs, "T_action": T_action, "n_head": n_head}
        layers = {"n_encoder_layers": n_encoder_layers, "n_decoder_layers": n_decoder_layers}
        _check_sizes(sizes, layers, {"p_drop_emb": p_drop_emb, "p_drop_attn": p_drop_attn})
        if obs_type not in OBS_TYPES:
            raise InvalidInput(f"obs_type {obs_type!r}; expected 'ref' or None")
        self.input_dim = input_dim
        self.output_dim = output_dim
        self.obs_dim = obs_dim
        self.emb_dim = emb_dim
        self.T_obs = T_obs
        self.T_action = T_action
        self.n_encoder_layers = n_encoder_layers
        self.n_decoder_layers = n_decoder_layers
        self.n_head = n_head
        self.p_drop_emb = p_drop_emb
        self.p_drop_attn = p_drop_attn
        self.obs_type = obs_type
        self.causal_attn = causal_attn
        self.past_action_visible = past_action_visible
        self.causal_cross_attn = causal_cross_attn

        self.cond_obs_emb = nn.Linear(obs_dim, emb_dim)
        self.cond_pos_emb = nn.Parameter(torch.empty(1, 1 + T_obs, emb_dim))
        self.input_emb = nn.Linear(input_dim, emb_dim)
        self.pos_emb = nn.Parameter(torch.empty(1, T_action, emb_dim))
        self.drop = nn.Dropout(p_drop_emb)
        self.encoder = Blocks(EncoderBlock(emb_dim, n_head, p_drop_attn) for _ in range(n_encoder_layers))
        self.decoder = Blocks(DecoderBlock(emb_dim, n_head, p_drop_attn) for _ in range(n_decoder_layers))
        self.ln_f = nn.LayerNorm(emb_dim)
        self.head = nn.Linear(emb_dim, output_dim)
        if causal_attn:
            # True: this action is seen.
            self.register_buffer("mask", torch.ones(T_action, T_action, dtype=torch.bool).tril())
        self._initialise()

    @property
    def constructor_arguments(self) -> dict[str, Any]:
        """What to call the class with to get a network of this form; plain values."""
        return {name: getattr(self, name) for name in CONSTRUCTOR_ARGUMENTS}

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.cond_pos_emb, std=0.02)
        nn.init.normal_(self.pos_emb, std=0.02)

    def forward(self, sample: Tensor, timestep: Tensor | int, cond: Tensor, **kwargs: Any) -> Tensor:
        """One denoising step.

        Args:
            sample: (B, T_action, input_dim), noisy actions.
            timestep: 0-d or (B,), the diffusion step.
            cond: (B, T_obs, obs_dim).
            kwargs: ignored, as callers of existing code pass more.

        Returns:
            (B, T_action, output_dim).

        Raises:
            InvalidInput: an input of another shape.
        """
        self._check_inputs(sample, cond)
        steps = torch.as_tensor(timestep, device=sample.device)
        if tuple(steps.shape) not in ((), (1,), (sample.shape[0],)):
            raise InvalidInput(
                f"timestep: expected a number, a 0-d tensor or (B,) = ({sample.shape[0]},), found {tuple(steps.shape)}"
            )
        steps = steps.expand(sample.shape[0])
        step_token = sinusoidal_embedding(steps, self.emb_dim).to(sample.dtype)[:, None]
        tokens = torch.cat((step_token, self.cond_obs_emb(cond)), dim=1) + self.cond_pos_emb
        memory = self.drop(tokens)
        for block in self.encoder.blocks:
            memory = block(memory)
        x = self.drop(self.input_emb(sample) + self.pos_emb)
        seen_actions = self._seen_actions()
        seen_memory = None
        if self.causal_cross_attn:
            seen_memory = x.new_ones(self.T_action, 1 + self.T_obs, dtype=torch.bool).tril()
        for block in self.decoder.blocks:
            x = block(x, memory, seen_actions, seen_memory)
        output: Tensor = self.head(self.ln_f(x))
        return output

    def _seen_actions(self) -> Tensor | None:
        if not self.causal_attn:
            return None
        return self.get_buffer("mask")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        mask = state_dict.get(f"{prefix}mask")
        if isinstance(mask, Tensor) and mask.is_floating_point():
            # Older files hold the form that is added: 0 where it is seen, -inf where not.
            state_dict = {**state_dict, f"{prefix}mask": mask == 0}
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _check_inputs(self, sample: Tensor, cond: Tensor) -> None:
        expected = {
            "sample": (sample, (self.T_action, self.input_dim), "T_action, input_dim"),
            "cond": (cond, (self.T_obs, self.obs_dim), "T_obs, obs_dim"),
        }
        for name, (tensor, sizes, words) in expected.items():
            if tensor.dim() != 3 or tuple(tensor.shape[1:]) != sizes:
                raise InvalidInput(
                    f"{name}: expected (B, {words}) = (B, {sizes[0]}, {sizes[1]}), found {tuple(tensor.shape)}"
                )
        if sample.shape[0] != cond.shape[0]:
            raise InvalidInput(f"sample has a batch of {sample.shape[0]}, cond one of {cond.shape[0]}; give equal ones")

    @classmethod
    def from_checkpoint(
        cls, checkpoint_path: str | os.PathLike[str], *, use_ema: bool = False, registry: Any = None
    ) -> QKVTransformerForDiffusion:
        """The network of a base, a merged model or a workspace's checkpoint, from a file or a `registry://` URL; see
        `pdp.loading.load_network`."""
        from pdp.loading import load_network

        found = load_network(checkpoint_path, classes=[cls], use_ema=use_ema, registry=registry)
        if not isinstance(found, cls):
            raise InvalidInput(f"{checkpoint_path} is of a {type(found).__name__}; expected a {cls.__name__}")
        return found

    def get_optim_groups(self, weight_decay: float = 1e-3) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer: [decay, no_decay]. Weights of linear layers decay; biases, norms and
        position embeddings do not."""
        return optim_groups(self, weight_decay)


CONSTRUCTOR_ARGUMENTS = (
    *("input_dim", "output_dim", "obs_dim", "emb_dim", "T_obs", "T_action", "n_encoder_layers", "n_decoder_layers"),
    *("n_head", "p_drop_emb", "p_drop_attn", "obs_type", "causal_attn", "past_action_visible", "causal_cross_attn"),
)


class Blocks(nn.Module):
    """A stack of blocks, under the name that existing checkpoints have."""

    def __init__(self, blocks: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)


class Attention(nn.Module):
    """Multi-head attention with a linear layer each for queries, keys, values and the output."""

    def __init__(self, emb_dim: int, n_head: int, dropout: float) -> None:
        super().__init__()
        self.n_head = n_head
        self.dropout = dropout
        self.q_proj = nn.Linear(emb_dim, emb_dim)
        self.k_proj = nn.Linear(emb_dim, emb_dim)
        self.v_proj = nn.Linear(emb_dim, emb_dim)
        self.out_proj = nn.Linear(emb_dim, emb_dim)

    def forward(self, x: Tensor, memory: Tensor, seen: Tensor | None = None) -> Tensor:
        """
        Args:
            x: (B, T, E), where the queries come from.
            memory: (B, S, E), where keys and values come from.
            seen: (T, S) of bool, True where a query may look.
        """
        q, k, v = (self._split(y) for y in (self.q_proj(x), self.k_proj(memory), self.v_proj(memory)))
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropout)
        output: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return output

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.n_head, -1).transpose(1, 2)


class MLP(nn.Module):
    """Two linear layers with a tanh GELU between."""

    def __init__(self, emb_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(emb_dim, _MLP_RATIO * emb_dim)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(_MLP_RATIO * emb_dim, emb_dim)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.fc2(self.act(self.fc1(x)))
        return output


class EncoderBlock(nn.Module):
    """Self-attention and MLP, each on a normalised copy; the norms have no parameters."""

    def __init__(self, emb_dim: int, n_head: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(emb_dim, eps=_EPS, elementwise_affine=False)
        self.attn = Attention(emb_dim, n_head, dropout)
        self.mlp = MLP(emb_dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        x = x + self.drop(self.attn(normed, normed))
        output: Tensor = x + self.drop(self.mlp(self.norm(x)))
        return output


class DecoderBlock(nn.Module):
    """Self-attention, cross-attention to a memory that is not normalised, and MLP."""

    def __init__(self, emb_dim: int, n_head: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(emb_dim, eps=_EPS, elementwise_affine=False)
        self.self_attn = Attention(emb_dim, n_head, dropout)
        self.cross_attn = Attention(emb_dim, n_head, dropout)
        self.mlp = MLP(emb_dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor, seen_actions: Tensor | None, seen_memory: Tensor | None) -> Tensor:
        normed = self.norm(x)
        x = x + self.drop(self.self_attn(normed, normed, seen_actions))
        x = x + self.drop(self.cross_attn(self.norm(x), memory, seen_memory))
        output: Tensor = x + self.drop(self.mlp(self.norm(x)))
        return output


def sinusoidal_embedding(steps: Tensor, dim: int) -> Tensor:
    """(B,) diffusion steps to (B, dim): sines, then cosines, of frequencies from 1 down to 1/10000."""
    half = dim // 2
    exponents = torch.arange(half, device=steps.device, dtype=torch.float32) / max(half - 1, 1)
    angles = steps[:, None].float() * torch.exp(-math.log(10000) * exponents)
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


def optim_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters as [decay, no_decay]: matrices of layers decay, vectors, norms and bare parameters do not.

    Both groups are always there, so that optimizer states of models with and without biases load alike.
    """
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for path, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        in_layer = path.endswith(".weight") or path.rpartition(".")[2].startswith("lora_")
        (decay if parameter.dim() > 1 and in_layer else no_decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]


def _check_sizes(sizes: Mapping[str, Any], layers: Mapping[str, Any], dropouts: Mapping[str, Any]) -> None:
    for name, value in (*sizes.items(), *layers.items()):
        least = 0 if name in layers else 1
        if type(value) is not int or value < least:
            raise InvalidInput(f"{name} is {value!r}; expected a whole number from {least}")
    for name, value in dropouts.items():
        if type(value) not in (int, float) or not 0 <= value < 1:
            raise InvalidInput(f"{name} is {value!r}; expected a number from 0 to below 1")
    if sizes["emb_dim"] % 2:
        raise InvalidInput(f"emb_dim is {sizes['emb_dim']}; the embedding of the diffusion step needs an even one")
    if sizes["emb_dim"] % sizes["n_head"]:
        raise InvalidInput(f"emb_dim {sizes['emb_dim']} is no multiple of n_head {sizes['n_head']}")
