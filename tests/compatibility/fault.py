"""What a fault is: a real adapter that was trained on one model, broken in exactly one way or loaded into another, and
what is expected of a check. `peft_does` runs the installed PEFT on it and says in a few words what came of it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tests.compatibility import models
from tests.compatibility.adapters import Loaded, adapt, first_line, load, save, seed_of, told

Says = Literal["error", "undecided", "warning", "info"]
VERDICTS = {"error": "does not fit", "undecided": "undecided", "warning": "fits", "info": "fits"}


@dataclass(frozen=True)
class Fault:
    """One way in which an adapter loads wrongly.

    Attributes:
        code: of the finding that must say so.
        name: the fault in a few words, unique.
        model: the example whose input is fed.
        says: severity of that finding.
        options: of the LoraConfig.
        base: the model that it is trained on; by default the example's.
        asked: the model that it is loaded into; by default the base.
        breaks: what is done to the saved folder.
        purpose: of the check.
        peft: version that the check is asked about; None: the installed one.
        before: whether the unbroken adapter was pushed before.
        made: saves another folder than the usual one, and gives the trained output.
        does: what PEFT is asked to do; by default to load.
        only: sides to ask, where the other one cannot know.
        files: further files of base and adapter, as (of the base, of the adapter).
    """

    code: str
    name: str
    model: str
    says: Says
    options: dict[str, Any] = field(default_factory=dict)
    base: Callable[[], nn.Module] | None = None
    asked: Callable[[], nn.Module] | None = None
    breaks: Callable[[Path], object] | None = None
    purpose: str = "load"
    peft: str | None = None
    before: bool = False
    made: Callable[[Path], Tensor] | None = None
    does: Callable[[Fault, Trained], str] | None = None
    only: Literal["version", "live", "both"] = "both"
    files: tuple[dict[str, str], dict[str, str]] = ({}, {})

    @property
    def verdict(self) -> str:
        return VERDICTS[self.says]

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", f"{self.code} {self.name}".lower()).strip("-")

    def trained_on(self) -> nn.Module:
        return models.fresh(self.model) if self.base is None else self.base()

    def loaded_into(self) -> nn.Module:
        return self.trained_on() if self.asked is None else self.asked()

    def output(self, model: nn.Module) -> Tensor:
        return models.output(self.model, model)

    def make(self, folder: Path, *, whole: bool = False) -> Trained:
        """The adapter on disk.

        Args:
            whole: leave it as it was trained.
        """
        if self.made is not None:
            trained = self.made(folder)
        else:
            adapted = adapt(self.trained_on(), seed=seed_of(self.slug), **self.options)
            trained = self.output(adapted)
            save(adapted, folder)
        for name, text in self.files[1].items():
            (folder / name).write_text(text, encoding="utf-8")
        if self.breaks is not None and not whole:
            self.breaks(folder)
        return Trained(folder, trained)


@dataclass(frozen=True)
class Trained:
    """An adapter on disk, and what its model gave in training."""

    folder: Path
    output: Tensor


def peft_does(fault: Fault, trained: Trained) -> str:
    """What PEFT makes of it, in a few words: the same on every machine, so without numbers."""
    return (fault.does or loads)(fault, trained)


def loads(fault: Fault, trained: Trained) -> str:
    base = fault.loaded_into()
    plain = _fed(fault, base)
    return outcome(fault, load(base, trained.folder), trained.output, plain)


def loads_beside(fault: Fault, trained: Trained) -> str:
    """`load_adapter` into a model that has the whole adapter already, under another name."""
    first = adapt(fault.loaded_into(), **fault.options, seed=5)
    return outcome(fault, told(lambda: _beside(first, trained.folder)), trained.output, None)


def _beside(model: Any, folder: Path) -> Any:
    model.load_adapter(str(folder), adapter_name="second")
    model.set_adapter("second")
    return model.eval()


def merges(fault: Fault, trained: Trained) -> str:
    """Loads, and merges into the base's weights."""
    base = fault.loaded_into()
    plain = _fed(fault, base)
    loaded = load(base, trained.folder)
    if loaded.model is None:
        return f"raises {loaded.error}"
    merged = told(loaded.model.merge_and_unload)
    said = tuple(dict.fromkeys((*loaded.warnings, *merged.warnings)))
    return outcome(fault, Loaded(merged.model, merged.error, said), trained.output, plain, "merges")


def swaps(fault: Fault, trained: Trained) -> str:
    """Hot-swaps it into a slot that holds a plain LoRA of the same targets."""
    from peft.utils.hotswap import hotswap_adapter

    plain_options = {key: fault.options[key] for key in ("target_modules", "r", "lora_alpha") if key in fault.options}
    slot = adapt(fault.loaded_into(), **plain_options, seed=5)

    def swap() -> Any:
        hotswap_adapter(slot, str(trained.folder), "default")
        return slot

    return outcome(fault, told(swap), trained.output, None, "swaps")


def outcome(fault: Fault, loaded: Loaded, trained: Tensor, plain: Tensor | None, verb: str = "loads") -> str:
    """In words: what it says, and which output the model has then."""
    said = f"warns “{loaded.warnings[0]}”" if loaded.warnings else ""
    if loaded.error:
        return f"raises {loaded.error}"
    how = f"{verb} and {said}" if said else f"{verb} silently"
    assert loaded.model is not None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = fault.output(loaded.model)
    except Exception as error:  # noqa: BLE001, whatever the forward pass raises is what is recorded
        return f"{how}; the forward pass raises {type(error).__name__}: {first_line(str(error))}"
    return f"{how}; {gives(found, trained, plain)}"


def gives(found: Tensor, trained: Tensor, plain: Tensor | None) -> str:
    if not torch.isfinite(found).all():
        return "the output is NaN"
    if plain is not None and found.shape == plain.shape and torch.equal(found, plain):
        return "the output is the base's"
    if found.shape == trained.shape and torch.allclose(found, trained, atol=1e-4, rtol=1e-4):
        return "the output is the trained one"
    return "the output is not the trained one"


def _fed(fault: Fault, model: nn.Module) -> Tensor | None:
    try:
        return fault.output(model)
    except Exception:  # noqa: BLE001, a model that takes another input has nothing to compare
        return None
