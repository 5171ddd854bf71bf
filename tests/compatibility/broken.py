"""Every way to break an adapter on every family of models, and models that an adapter is not for. None of these pairs
may pass as fitting without a word."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.compatibility.adapters import drop, edit_config, read_config, rename, tensors_of
from tests.compatibility.breaking import PREFIX, edit_first, kohya, modules, stray, transposed, zero_b
from tests.compatibility.good_pairs import FIRST, MAIN

Says = str


@dataclass(frozen=True)
class Broken:
    """A pair that does not fit.

    Attributes:
        model: the example that the adapter was trained on.
        asked: the example that it is loaded into.
        says: the least that must be said: `error`, `undecided` or `warning`.
        codes: of which one at least must be among the findings.
        seed: of the weights of the model asked; None: those of the training.
        before: whether the whole adapter was pushed before.
    """

    model: str
    name: str
    says: Says
    codes: tuple[str, ...]
    breaks: Callable[[Path], object] | None = None
    options: tuple[tuple[str, Any], ...] = ()
    asked: str | None = None
    seed: int | None = None
    before: bool = False

    @property
    def slug(self) -> str:
        return f"{self.model} {self.name}".lower().replace(" ", "-").replace("_", "-")


def broken_pairs() -> Iterator[Broken]:
    for model, main in MAIN.items():
        first = FIRST[model]
        for name, says, codes, breaks in _ways(first):
            yield Broken(model, name, says, codes, breaks)
        dora = (("use_dora", True),)
        yield Broken(model, "dora flag off", "error", ("C12",), lambda at: edit_config(at, use_dora=False), dora)
        yield Broken(model, "dora vector lost", "error", ("C12",), lambda at: _drop_first(at, "magnitude"), dora)
        for key, value in (("lora_alpha", 99), ("use_rslora", True)):
            yield Broken(model, f"{key} edited", "undecided", ("C10",), _setting(key, value), before=True)
        yield Broken(model, "other weights", "error", ("C04",), seed=9)
        if "modules_to_save" in main:
            yield Broken(model, "copy lost", "error", ("C06",), lambda at: drop(at, ".classifier."))
    for model, other in _STRANGERS:
        yield Broken(model, f"into {other}", "error", ("C05", "C07", "C08", "C13", "C20", "C26"), asked=other)


_STRANGERS = (
    *(("bert", "gpt2"), ("bert", "llama"), ("gpt2", "bert"), ("gpt2", "llama"), ("llama", "gpt2"), ("llama", "unet")),
    *(("unet", "llama"), ("unet", "bench"), ("noise_net", "towers"), ("towers", "noise_net"), ("towers", "llama")),
    *(
        ("llama", "towers"),
        ("mixtral", "noise_net"),
        ("noise_net", "mixtral"),
        ("bench", "bert"),
        ("classifier", "gpt2"),
    ),
)


def _ways(first: str) -> Iterator[tuple[str, Says, tuple[str, ...], Callable[[Path], object]]]:
    """(name, what must be said, codes, what is done) for an adapter whose target `first` is."""
    yield "misspelt tuner", "error", ("C01",), lambda at: edit_config(at, peft_type="LOAR")
    yield "unknown key", "error", ("C02",), lambda at: edit_config(at, use_tora=True)
    yield "b lost", "error", ("C06",), lambda at: _drop_first(at, "lora_B")
    yield "a lost", "error", ("C06",), lambda at: _drop_first(at, "lora_A")
    yield "module lost", "error", ("C06",), _drop_module
    yield "half lost", "error", ("C06",), _drop_half
    yield "stray module", "error", ("C05",), stray
    yield "layer renamed", "error", ("C05", "C06", "C26"), lambda at: rename(at, f".{first}.", ".elsewhere.")
    yield "part renamed", "error", ("C05", "C06"), lambda at: rename(at, "lora_A.weight", "lora_C.weight")
    yield "no prefix", "error", ("C26",), lambda at: rename(at, PREFIX, "")
    yield "diffusion prefix", "error", ("C26",), lambda at: rename(at, PREFIX, "diffusion_model.")
    yield "prefix twice", "error", ("C05", "C26"), lambda at: rename(at, PREFIX, f"{PREFIX}{PREFIX}inner.")
    yield "kohya names", "error", ("C05", "C26"), kohya
    yield "other r", "error", ("C09",), lambda at: edit_config(at, r=read_config(at)["r"] + 3)
    yield "other rank pattern", "error", ("C09",), lambda at: edit_config(at, rank_pattern={first: 7})
    yield "wider rank", "error", ("C08", "C09"), lambda at: edit_first(at, "lora_A", lambda a: torch.cat([a, a]))
    yield "transposed a", "error", ("C08", "C09"), lambda at: edit_first(at, "lora_A", transposed)
    yield "transposed b", "error", ("C08", "C09"), lambda at: edit_first(at, "lora_B", transposed)
    yield "wider in", "error", ("C08",), lambda at: edit_first(at, "lora_A", lambda a: torch.cat([a, a], 1))
    yield "narrower out", "error", ("C08",), lambda at: edit_first(at, "lora_B", lambda b: b[:-1].contiguous())
    yield "flat tensor", "error", ("C08",), lambda at: edit_first(at, "lora_A", lambda a: a.flatten())
    yield "nan", "error", ("C17",), lambda at: edit_first(at, "lora_B", lambda b: b.clone().fill_(float("nan")))
    yield "inf", "error", ("C17",), lambda at: edit_first(at, "lora_A", lambda a: a.clone().fill_(float("inf")))
    yield "dora flag on", "error", ("C12",), lambda at: edit_config(at, use_dora=True)
    yield "lora bias on", "error", ("C06",), lambda at: edit_config(at, lora_bias=True)
    yield "no such target", "error", ("C07",), lambda at: edit_config(at, target_modules=["qq_proj"])
    yield "more targets", "error", ("C06",), lambda at: edit_config(at, target_modules=f".*({first}|{_MORE[first]})")
    yield "no such copy", "error", ("C06", "C13"), lambda at: edit_config(at, modules_to_save=["scorer"])
    yield "misspelt alpha pattern", "warning", ("C11",), lambda at: edit_config(at, alpha_pattern={"q_prj": 3})
    yield "misspelt rank pattern", "warning", ("C11",), lambda at: edit_config(at, rank_pattern={"q_prj": 3})
    yield "zeros", "warning", ("C27",), zero_b
    yield "alpha zero", "warning", ("C27",), lambda at: edit_config(at, lora_alpha=0)


_MORE = {
    "query": "key", "c_attn": "c_fc", "q_proj": "k_proj|up_proj|head", "to_q": "time_emb_proj", "lin": "conv2",
}  # fmt: skip
"""Another name that each model has, beside its first target."""


def _setting(key: str, value: Any) -> Callable[[Path], object]:
    return lambda folder: edit_config(folder, **{key: value})


def _drop_first(folder: Path, part: str) -> None:
    first = next(name for name in sorted(tensors_of(folder)) if part in name)
    drop(folder, first)


def _drop_module(folder: Path) -> None:
    drop(folder, f"{modules(folder)[0]}.")


def _drop_half(folder: Path) -> None:
    for module in modules(folder)[::2]:
        drop(folder, f"{module}.")
