"""Ways to break an adapter on disk that take more than a line, and ways to use one that are not `from_pretrained`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.compatibility import models
from tests.compatibility.adapters import (
    adapt,
    edit_config,
    edit_tensors,
    load,
    rename,
    save,
    tensors_of,
    told,
    train,
    write_tensors,
)
from tests.compatibility.fault import Fault, Trained, outcome

PREFIX = "base_model.model."
_EXPERTS = 4


def edit_first(folder: Path, part: str, change: Callable[[Tensor], Tensor]) -> None:
    """Changes the first tensor, by name, that has this part in it."""
    first = next(name for name in sorted(tensors_of(folder)) if part in name)
    edit_tensors(folder, lambda name, tensor: (name, change(tensor) if name == first else tensor))


def transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 1).contiguous()


def all_transposed(folder: Path) -> None:
    edit_tensors(folder, lambda name, tensor: (name, transposed(tensor)))


def with_nan(tensor: Tensor) -> Tensor:
    broken = tensor.clone()
    broken.flatten()[0] = float("nan")
    return broken


def zero_b(folder: Path) -> None:
    edit_tensors(folder, lambda name, tensor: (name, torch.zeros_like(tensor) if "lora_B" in name else tensor))


def written_by_18(folder: Path) -> None:
    """Lays factors of experts out as PEFT 0.18 read them: A belonged to the first of the two dimensions, B to the
    second, so that each expert's factors change places."""
    before, after = tensors_of(folder), {}
    for name, a in before.items():
        if "lora_A" in name:
            b_name = name.replace("lora_A", "lora_B")
            by_expert = before[b_name].reshape(before[b_name].shape[0], -1, _EXPERTS)  # (out, r, experts)
            after[name] = by_expert.permute(2, 1, 0).reshape(-1, before[b_name].shape[0])
            after[b_name] = a.reshape(_EXPERTS, -1, a.shape[1]).permute(2, 1, 0).reshape(a.shape[1], -1)
    write_tensors(folder, after)
    edit_config(folder, peft_version="0.18.1")


def modules(folder: Path) -> list[str]:
    """Names of wrapped modules, with PEFT's prefix."""
    return sorted({name.partition(".lora_")[0] for name in tensors_of(folder) if ".lora_" in name})


def stray(folder: Path) -> None:
    """Adds the tensors of the first module once more, under a path that no model has."""
    tensors = tensors_of(folder)
    first = modules(folder)[0]
    copies = {
        f"{PREFIX}attic.proj{name[len(first) :]}": tensors[name] for name in tensors if name.startswith(f"{first}.")
    }
    write_tensors(folder, tensors | copies)


def renamed_copy(folder: Path) -> None:
    assert rename(folder, f"{PREFIX}head.", f"{PREFIX}scorer.")
    edit_config(folder, modules_to_save=["scorer"])


def onto_norm(folder: Path) -> None:
    """Adds factors of the right size for a layer that has none, and targets it."""
    tensors = tensors_of(folder)
    wide = 2 * models.WIDTH
    tensors[f"{PREFIX}norm.lora_A.weight"] = torch.ones(4, wide)
    tensors[f"{PREFIX}norm.lora_B.weight"] = torch.ones(wide, 4)
    write_tensors(folder, tensors)
    edit_config(folder, target_modules=["q_proj", "v_proj", "norm"])


def kohya(folder: Path) -> None:
    """Names as kohya's scripts have them, in which dots are lost."""

    def edit(name: str, tensor: Tensor) -> tuple[str, Tensor]:
        path, _, rest = name.removeprefix(PREFIX).partition(".lora_")
        part = "lora_down.weight" if rest.startswith("A") else "lora_up.weight"
        return (f"lora_unet_{path.replace('.', '_')}.{part}", tensor) if rest else (name, tensor)

    edit_tensors(folder, edit)


# ---------------------------------------------------------------- folders that PEFT's save_pretrained would not make


def two_in_one_file(folder: Path) -> Tensor:
    """The state dict of a model with two adapters, saved as one; gives the first one's output."""
    model = adapt(models.fresh("towers"), target_modules=["q_proj", "v_proj"])
    trained = models.output("towers", model)
    save(model, folder)
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    train(model, 3)
    write_tensors(folder, {name: value for name, value in model.state_dict().items() if "lora_" in name})
    return trained


def ia3(folder: Path) -> Tensor:
    from peft import IA3Config, get_peft_model

    config = IA3Config(target_modules=["q_proj", "v_proj"], feedforward_modules=[])
    model = get_peft_model(models.fresh("towers"), config)
    train(model)
    save(model.eval(), folder)
    return models.output("towers", model)


# ---------------------------------------------------------------- other ways to use an adapter


def plain_algebra(fault: Fault, trained: Trained) -> str:
    """Adds what the file says to the base that is on disk, as servers do that know A, B and alpha alone."""
    base = fault.loaded_into()
    tensors = tensors_of(trained.folder)
    with torch.no_grad():
        for name, a in tensors.items():
            if "lora_A" in name:
                path = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
                b = tensors[name.replace("lora_A", "lora_B")]
                base.get_submodule(path).weight.add_(2 * b @ a)  # type: ignore[operator]
    return outcome(fault, told(lambda: base), trained.output, None, "adds to the plain base")


def merges_eight_bits(fault: Fault, trained: Trained) -> str:
    """Merged in eight bits, and then computed in 32: no CPU computes in eight."""
    loaded = load(fault.loaded_into(), trained.folder)
    model: Any = loaded.model
    assert model is not None, loaded.error
    merged = told(lambda: model.merge_and_unload().float())
    said = (*loaded.warnings, *merged.warnings)
    return outcome(fault, replace(merged, warnings=said), trained.output, None, "merges")


def loads_second(fault: Fault, trained: Trained) -> str:
    """`load_adapter` into a model that carries an adapter already."""
    first: Any = fault.loaded_into()
    loaded = told(lambda: first.load_adapter(str(trained.folder), "second") and first)
    return outcome(fault, loaded, trained.output, None)
