"""Inputs made for a model whose forward says clearly enough what it takes: small, seeded, the same in every process.
Where it does not, nothing is guessed."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from registry.core.errors import InvalidInput
from registry.formats.probe_tree import plain_inputs
from registry.formats.quiet_run import dtypes_of

SEED = 0
BATCH = 2
TOKENS = 8
MADE_FOR = "transformers models, diffusion policies, and modules that take one tensor into a linear, conv or embedding"


@dataclass(frozen=True)
class Call:
    """Arguments of one call."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def made_calls(model: nn.Module) -> Iterator[Call]:
    """Calls that the model may take, the best first; each is to be tried. Making one may run code of the model.

    Raises:
        InvalidInput: it is not clear what the model takes.
    """
    base = _base_of(model)
    draw = _Draw(dtypes_of(base)[0] or torch.float32)
    clear = False
    for makers in (_transformers_calls, _diffusion_calls, _one_tensor_calls):
        for call in makers(base, draw):
            clear = True
            yield call
    if not clear:
        raise InvalidInput(
            f"it is not clear what the forward of {type(base).__name__} takes; inputs are made for {MADE_FOR}"
        )


def _base_of(model: nn.Module) -> nn.Module:
    if "peft" in sys.modules:
        from peft import PeftModel

        if isinstance(model, PeftModel):
            return model.get_base_model()
    return model


class _Draw:
    """Draws from a generator of its own, so that the global one is left alone."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._generator = torch.Generator().manual_seed(SEED)
        self._dtype = dtype

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator, device="cpu", dtype=torch.float32).to(dtype or self._dtype)

    def whole(self, low: int, high: int, *shape: int) -> torch.Tensor:
        """Whole numbers, `low` to `high` - 1."""
        return torch.randint(low, high, shape, generator=self._generator, device="cpu", dtype=torch.int64)


# ---------------------------------------------------------------- transformers


def _transformers_calls(model: nn.Module, draw: _Draw) -> Iterator[Call]:
    if "transformers" not in sys.modules:
        return
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return
    takes = inspect.signature(model.forward).parameters
    # A cache is no tensor, and of no use for one call.
    rest: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}
    made: dict[str, Callable[[int], dict[str, torch.Tensor]]] = {
        "input_ids": lambda batch: _tokens(model, draw, batch, set(takes)),
        "pixel_values": lambda batch: _pixels(model, draw, batch),
        "input_values": lambda batch: {"input_values": draw.normal(batch, 4000)},
    }
    main = model.main_input_name
    if main in made and main in takes:
        for batch in (BATCH, 1):  # without a padding token, a classifier takes one text at a time
            yield Call((), made[main](batch) | rest)
        vision = getattr(model.config, "vision_config", None)
        if main == "input_ids" and "pixel_values" in takes and hasattr(vision, "image_size"):
            yield Call((), made[main](BATCH) | made["pixel_values"](BATCH) | rest)
    dummy = model.dummy_inputs
    if dummy and set(dummy) <= set(takes):
        yield Call((), plain_inputs(dummy, "dummy_inputs") | rest)


def _tokens(model: Any, draw: _Draw, batch: int, takes: set[str]) -> dict[str, torch.Tensor]:
    config = model.config.get_text_config()
    limits = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions"))
    length = min([TOKENS, *(limit // 2 for limit in limits if isinstance(limit, int) and limit > 1)])

    def drawn(embeddings_of: Callable[[], Any]) -> torch.Tensor:
        try:
            rows = getattr(embeddings_of(), "num_embeddings", None)
        except NotImplementedError:  # a model of text and images has none of its own
            rows = None
        sizes = (rows, getattr(config, "vocab_size", None))
        size = min(one for one in sizes if isinstance(one, int))
        ids = draw.whole(min(10, size // 2), size, batch, length)
        end = getattr(config, "eos_token_id", None)
        if isinstance(end, int) and 0 <= end < size:
            # Some classifiers look for the end of the text, and take one in each row.
            ids[ids == end] = 0 if end else min(1, size - 1)
            ids[:, -1] = end
        return ids

    found = {"input_ids": drawn(model.get_input_embeddings)}
    if "attention_mask" in takes:
        found["attention_mask"] = torch.ones(batch, length, dtype=torch.int64, device="cpu")
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
        found["decoder_input_ids"] = drawn(lambda: model.get_decoder().get_input_embeddings())
    return found


def _pixels(model: Any, draw: _Draw, batch: int) -> dict[str, torch.Tensor]:
    config = getattr(model.config, "vision_config", None) or model.config
    size = getattr(config, "image_size", None) or 64  # convolutions alone take any
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return {"pixel_values": draw.normal(batch, getattr(config, "num_channels", 3), height, width)}


# ---------------------------------------------------------------- other models


def _diffusion_calls(model: nn.Module, draw: _Draw) -> Iterator[Call]:
    """A policy's denoiser: forward(sample, timestep, cond), with its sizes as attributes."""
    sizes = [getattr(model, name, None) for name in ("input_dim", "T_action", "obs_dim", "T_obs")]
    if list(inspect.signature(model.forward).parameters)[:3] != ["sample", "timestep", "cond"]:
        return
    if all(type(size) is int and size > 0 for size in sizes):
        inputs, actions, observed, steps = (int(size) for size in sizes if size is not None)
        sample, cond = draw.normal(BATCH, actions, inputs), draw.normal(BATCH, steps, observed)
        yield Call((sample, draw.whole(0, 10, BATCH), cond))


def _one_tensor_calls(model: nn.Module, draw: _Draw) -> Iterator[Call]:
    """A module whose forward must be given one tensor, and whose first layer says of which shape."""
    if not _takes_one_tensor(model):
        return
    leaf = next((one for one in model.modules() if not list(one.children()) and list(one.parameters())), None)
    if isinstance(leaf, nn.Embedding | nn.EmbeddingBag):
        yield Call((draw.whole(0, leaf.num_embeddings, BATCH, TOKENS),))
        return
    weight = getattr(leaf, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dtype not in (
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    ):
        return
    if isinstance(leaf, nn.Linear):
        for shape in ((BATCH, leaf.in_features), (BATCH, 4, leaf.in_features)):
            yield Call((draw.normal(*shape, dtype=weight.dtype),))
    elif isinstance(leaf, nn.modules.conv._ConvNd):
        dimensions = len(leaf.kernel_size)
        for size in ((16, 64, 1024), (32, 64, 224), (8, 16, 32))[min(dimensions, 3) - 1]:
            yield Call((draw.normal(BATCH, leaf.in_channels, *(size,) * dimensions, dtype=weight.dtype),))


def _takes_one_tensor(model: nn.Module) -> bool:
    required = [
        one
        for one in inspect.signature(model.forward).parameters.values()
        if one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
    ]
    if len(required) != 1 or required[0].kind is inspect.Parameter.KEYWORD_ONLY:
        return False
    annotation = required[0].annotation
    name = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    return annotation is inspect.Parameter.empty or name.strip("\"'").endswith("Tensor")
