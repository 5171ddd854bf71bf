"""Files of an older framework go in, and one of them is loaded: pickles of torch.save and dill, read without running
a line of them. `make demo` runs it after the main job, or

    python examples/legacy_files.py [--keep FOLDER]

The files are those that the tests use. The adapter is loaded into a plain model with PEFT, merged there, and compared
with the merged model that the old framework saved.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from registry import Registry

LEGACY = Path(__file__).resolve().parents[1] / "tests" / "formats" / "legacy"
FILES = (
    "lora_adapters.pth",
    "lora_full.pth",
    "lora_checkpoint.pth",
    "lora_checkpoint_later.pth",
    "merged.pth",
    "workspace.ckpt",
)
PREFIX = "base_model.model."


def base_of(full: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The base's own tensors in a model with an adapter, under the names that they had before."""
    return {
        name.removeprefix(PREFIX).replace(".base_layer.", "."): tensor
        for name, tensor in full.items()
        if ".lora_" not in name
    }


class Layers(nn.Module):
    """Modules for a state dict: a Linear where it has a matrix with a bias, else the bare parameters."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            path, _, last = name.rpartition(".")
            parent: nn.Module = self
            for part in path.split(".") if path else []:
                if part not in dict(parent.named_children()):
                    weight = tensors.get(f"{path}.weight")
                    linear = part == path.rpartition(".")[2] and weight is not None and weight.dim() == 2
                    parent.add_module(part, nn.Linear(*weight.shape[::-1]) if linear else nn.Module())
                parent = parent.get_submodule(part)
            if last not in dict(parent.named_parameters(recurse=False)):
                parent.register_parameter(last, nn.Parameter(tensor.clone()))
        self.load_state_dict(dict(tensors))


def command(*words: str) -> None:
    """Runs the command line on the demo's registry, as a user would type it."""
    print("$ registry", *words, flush=True)
    subprocess.run([sys.executable, "-m", "registry", "--registry", str(FOLDER), *words], check=True)


def main() -> None:
    registry = Registry.init(FOLDER)
    print("\n# Six files of an older framework, two of them made with dill", flush=True)
    for name in FILES:
        command("push", str(LEGACY / name), f"legacy/{Path(name).stem.replace('_', '-')}")
    command("list", "legacy/*")

    print("\n# The adapter, loaded into a plain model and merged, against the merged model that was saved", flush=True)
    model = Layers(base_of(registry.load("legacy/lora-full")))
    merged = registry.load("legacy/lora-adapters", model).merge_and_unload().state_dict()
    saved = registry.load("legacy/merged")
    difference = max((merged[name] - tensor).abs().max().item() for name, tensor in saved.items())
    print(f"{len(saved)} tensors, largest difference {difference:g}")
    if merged.keys() != saved.keys() or difference > 1e-6:
        raise SystemExit("the merged model is not the one that was saved")

    print("\n# A file comes out as it went in, byte for byte", flush=True)
    pulled = registry.pull("legacy/workspace", FOLDER.parent / "workspace.ckpt").path
    same = pulled.read_bytes() == (LEGACY / "workspace.ckpt").read_bytes()
    print("workspace.ckpt is the same file:", same)
    optimizer = registry.load("legacy/workspace", component="optimizer")
    print(f"and its optimizer is a state dict again: {len(optimizer['state'])} parameters")
    if not same:
        raise SystemExit("the file is another one")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="make the registry here and leave it")
    kept = parser.parse_args().keep
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory(prefix="registry-legacy-") as temporary:
        FOLDER = (kept or Path(temporary)) / "registry"
        FOLDER.parent.mkdir(parents=True, exist_ok=True)
        main()
