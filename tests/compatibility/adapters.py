"""Real adapters: made and saved by PEFT, with every tensor changed as training would change it, and loaded by PEFT with
all that it says caught. An adapter on disk is broken here by editing its two files."""

from __future__ import annotations

import json
import re
import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_HARMLESS = (
    "fan_in_fan_out is set to",
    "lora_bias=True",
    "Setting `save_embedding_layers` to `True`",
    "have invalid shape",
    "Model with `tie_word_embeddings=True`",
    "is_gradient_checkpointing",
    "There are modules in",
    "Could not find a config file",
    "Found missing adapter keys while loading the checkpoint: []",
)
"""What PEFT says of adapters that load as they should."""


def seed_of(name: str) -> int:
    """A seed for each name: of two adapters with the same tensors and another alpha a registry would say that one was
    edited."""
    return zlib.crc32(name.encode()) % 10_000


def train(model: nn.Module, seed: int = 1, strength: float = 0.3) -> None:
    """Changes every parameter that learns, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_((strength * noise).to(parameter.dtype))


def adapt(base: nn.Module, *, seed: int = 1, **options: Any) -> PeftModel:
    """A trained LoRA on a base, which it changes, in eval mode."""
    torch.manual_seed(seed)  # A begins as random numbers
    model = quietly(lambda: get_peft_model(base, LoraConfig(**({"r": 4, "lora_alpha": 8} | options))))
    train(model, seed)
    return model.eval()


def save(model: PeftModel, folder: Path) -> Path:
    """The folder that PEFT writes, but for the README.md, which takes PEFT longer than all the rest."""
    with patch.object(type(model), "create_or_update_model_card"):
        quietly(lambda: model.save_pretrained(folder))
    return folder


def quietly(action: Callable[[], Any]) -> Any:
    """Runs what warns of things that are no concern of a test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return action()


@dataclass(frozen=True)
class Loaded:
    """What PEFT did with an adapter.

    Attributes:
        model: None: it raised.
        error: class and first line of what it raised.
        warnings: those that say that something is wrong, each in one line.
    """

    model: PeftModel | None
    error: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def says_nothing(self) -> bool:
        return not self.error and not self.warnings


def load(base: nn.Module, folder: Path) -> Loaded:
    """`PeftModel.from_pretrained`, with what it raises and warns of."""
    return told(lambda: PeftModel.from_pretrained(base, str(folder)).eval())


def told(action: Callable[[], Any]) -> Loaded:
    """Runs something of PEFT's, and keeps what it says."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            model = action()
        except Exception as error:  # noqa: BLE001, whatever PEFT raises is what is recorded
            return Loaded(None, f"{type(error).__name__}: {first_line(str(error))}", _worrying(said))
    return Loaded(model, "", _worrying(said))


def _worrying(said: list[warnings.WarningMessage]) -> tuple[str, ...]:
    texts = (first_line(str(one.message)) for one in said if not issubclass(one.category, DeprecationWarning))
    return tuple(dict.fromkeys(text for text in texts if not any(part in text for part in _HARMLESS)))


def first_line(text: str) -> str:
    """The first line that says something, without what differs between two runs: paths, addresses, orders of sets."""
    line = next((one.strip() for one in text.splitlines() if one.strip()), "")
    if line.endswith(":"):
        line = " ".join(one.strip() for one in text.splitlines() if one.strip())
    line = re.sub(r"/\S*/", ".../", re.sub(r"0x[0-9a-f]+", "0x...", line))
    line = re.sub(r"\{('[^{}]*')\}", lambda found: "{" + ", ".join(sorted(found[1].split(", "))) + "}", line)
    line = re.sub(r"(\['[^']*'), .*", r"\1, ...", line)
    line = line.partition(": copying a param")[0]
    return line if len(line) <= 160 else f"{line[:157]}..."


# ---------------------------------------------------------------- breaking what is on disk


def edit_config(folder: Path, **changes: Any) -> None:
    """Sets keys of adapter_config.json; `...` takes one away."""
    document = read_config(folder)
    for key, value in changes.items():
        if value is ...:
            document.pop(key, None)
        else:
            document[key] = value
    (folder / CONFIG).write_text(json.dumps(document, indent=2, sort_keys=True), encoding="utf-8")


def read_config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    return found


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / WEIGHTS)


def write_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    apart = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    save_file(apart, folder / WEIGHTS, metadata={"format": "pt"})


def edit_tensors(folder: Path, edit: Callable[[str, Tensor], tuple[str, Tensor] | None]) -> int:
    """Passes each (name, tensor) through `edit`, which gives another pair, or None to drop it; counts the changed."""
    before = tensors_of(folder)
    after: dict[str, Tensor] = {}
    changed = 0
    for name, tensor in before.items():
        pair = edit(name, tensor)
        changed += pair is None or pair[0] != name or pair[1] is not tensor
        if pair is not None:
            after[pair[0]] = pair[1]
    write_tensors(folder, after)
    return changed


def rename(folder: Path, old: str, new: str) -> int:
    return edit_tensors(folder, lambda name, tensor: (name.replace(old, new), tensor))


def drop(folder: Path, part: str) -> int:
    return edit_tensors(folder, lambda name, tensor: None if part in name else (name, tensor))
