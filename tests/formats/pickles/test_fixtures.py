"""Files of the original framework, in every form that is in the wild, and with OmegaConf and dill in them."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from registry.formats.pickles import TensorRef, read_pickle_bytes, walk
from tests.formats.pickles.compare import assert_reads_like_torch, read

LEGACY = Path(__file__).parents[1] / "legacy"
EXPECTED = json.loads((LEGACY / "expected.json").read_text())
FILES = sorted(path.name for path in LEGACY.iterdir() if path.suffix in (".pth", ".ckpt"))
DILL = ("lora_checkpoint_later.pth", "workspace.ckpt")


def tensors(name: str) -> dict[str, list[str]]:
    """sha256 of the bytes of every tensor, by the last part of the way to it."""
    found: dict[str, list[str]] = {}
    result = read(LEGACY / name)
    assert (result.form, result.opaque) == ("torch zip", ())
    with (LEGACY / name).open("rb") as file:
        for path, value in walk(result.tree, what=name):
            if isinstance(value, TensorRef):
                digest = hashlib.sha256(b"".join(value.chunks(file))).hexdigest()
                found.setdefault(str(path[-1]), []).append(digest)
    return found


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_the_original_framework_reads(name: str) -> None:
    assert tensors(name)


@pytest.mark.parametrize(
    ("name", "prefix", "times"),
    [
        ("lora_adapters.pth", "", 1),
        ("lora_full.pth", "", 1),
        ("lora_checkpoint.pth", "", 2),  # model and ema_model
        ("lora_checkpoint_later.pth", "", 1),
        ("lora_checkpoint_later.pth", "base_model.", 1),  # the same tensors by a second name
    ],
)
def test_adapter_tensors_are_those_that_were_saved(name: str, prefix: str, times: int) -> None:
    found = tensors(name)
    for key, digest in EXPECTED["adapter_tensors"].items():
        key = prefix + key.removeprefix("base_model.model.") if prefix else key
        assert found[key] == [digest] * times


def test_merged_tensors_are_those_that_were_saved() -> None:
    assert tensors("merged.pth") == {key: [digest] for key, digest in EXPECTED["merged_tensors"].items()}


@pytest.mark.parametrize("name", [name for name in FILES if name not in DILL])
def test_it_reads_what_torch_reads(name: str) -> None:
    assert_reads_like_torch(LEGACY / name)


def test_a_configuration_object_becomes_plain_data() -> None:
    for name in DILL:
        tree = read(LEGACY / name).tree
        assert isinstance(tree, dict)
        assert tree["cfg"] == {
            "_target_": "pdp.workspace.DiffusionPolicyWorkspace",
            "policy": {"model": EXPECTED["model"]},
            "training": {"seed": 1, "num_epochs": 3},
        }
        assert type(tree["cfg"]["policy"]["model"]) is dict


def test_dill_bytes_within_a_workspace_read_under_the_remaining_limits() -> None:
    result = read(LEGACY / "workspace.ckpt")
    assert isinstance(result.tree, dict)
    left = result.budget.opcodes
    values = {
        key: read_pickle_bytes(raw, what=key, budget=result.budget).tree for key, raw in result.tree["pickles"].items()
    }
    assert values == {"global_step": 1000, "epoch": 10}
    assert result.budget.opcodes < left


def test_two_names_of_one_tensor_share_its_storage() -> None:
    tree = read(LEGACY / "lora_checkpoint_later.pth").tree
    assert isinstance(tree, dict)
    state = tree["state_dicts"]
    one, other = state["model"]["base_model.pos_emb"], state["lora_model"]["base_model.model.pos_emb"]
    assert one.storage is other.storage


def test_reading_imports_no_tensor_library() -> None:
    program = (
        "import sys; from registry.formats.pickles import read_pickle_file\n"
        "path = sys.argv[1]; file = open(path, 'rb'); size = file.seek(0, 2)\n"
        "tree = read_pickle_file(file, size=size, what=path).tree\n"
        "b''.join(next(iter(tree['state_dicts']['model'].values())).chunks(file)); file.close()\n"
        "print(sorted({'torch', 'numpy', 'dill', 'omegaconf', 'pickle'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(LEGACY / "workspace.ckpt")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
