"""Every way to save and load a LoRA of a diffusion policy: a small network, two files of each kind, a registry, a
training run that goes on where it stopped. `make demo` runs it, or

    python examples/lora_save_load_example.py [--keep FOLDER]

It trains for some seconds on the CPU, on synthetic data, and says what it measured.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import warnings
from pathlib import Path

import numpy
import torch
from torch import Tensor

from pdp.data import write_dataset
from pdp.lora_model import LoraTransformerForDiffusion
from pdp.modules_v2 import QKVTransformerForDiffusion
from pdp.policy import DiffusionPolicy
from pdp.utils.lora_utils import (
    compare_lora_configs,
    load_lora_checkpoint,
    merge_lora_weights,
    print_lora_model_summary,
    save_lora_checkpoint,
    save_merged_model,
)
from pdp.workspace import DiffusionPolicyWorkspace
from registry import Incompatible, Registry

SIZES = {"obs_dim": 8, "input_dim": 3, "output_dim": 3, "emb_dim": 32, "T_obs": 2, "T_action": 4}
NETWORK = {**SIZES, "n_encoder_layers": 1, "n_decoder_layers": 2, "n_head": 4, "p_drop_emb": 0.0, "p_drop_attn": 0.0}
LORA = {"lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": ["mlp", "q_proj", "v_proj", "out_proj"]}


def title(text: str) -> None:
    print(f"\n# {text}", flush=True)


def demonstrations(path: str, gain: float) -> None:
    """Episodes of a world in which the right action is a linear function of two observations, times a gain."""
    draw = numpy.random.default_rng(0)
    law = draw.normal(size=(2 * SIZES["obs_dim"], SIZES["input_dim"])) / 4
    obs, action = [], []
    for _ in range(20):
        steps = numpy.arange(60)[:, None]
        seen = numpy.sin(draw.uniform(0.05, 0.4, SIZES["obs_dim"]) * steps + draw.uniform(0, 6, SIZES["obs_dim"]))
        before = numpy.concatenate((seen[:1], seen[:-1]))
        obs.append(seen)
        action.append(gain * numpy.concatenate((seen, before), axis=1) @ law)
    ends = 60 * numpy.arange(1, 21)
    write_dataset(path, numpy.concatenate(obs), numpy.concatenate(action), ends, recipe={"gain": gain}, force=True)


def configuration(data: str, **changed: object) -> dict[str, object]:
    return {
        "policy": {"model": NETWORK},
        "dataset": {"path": data, "val_ratio": 0.1},
        "dataloader": {"batch_size": 64},
        "optimizer": {"lr": 2e-3},
        "training": {"num_epochs": 30, "lr_warmup_steps": 20, "save_checkpoint_every": 0, "val_every": 30},
        **changed,
    }


def output(model: torch.nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    sample, cond = torch.randn(4, 4, 3, generator=generator), torch.randn(4, 2, 8, generator=generator)
    with torch.no_grad():
        found: Tensor = model(sample, torch.arange(4), cond)
    return found


def difference(a: torch.nn.Module, b: torch.nn.Module) -> float:
    return float((output(a) - output(b)).abs().max())


def error_in(policy: DiffusionPolicy, data: str) -> float:
    """Mean distance of the policy's first action to the demonstrated one."""
    from pdp.data import SequenceDataset

    windows = SequenceDataset(data, policy.T_obs, policy.T_action)
    picked = [windows[place] for place in range(0, len(windows), 7)]
    obs, action = (torch.stack([one[key] for one in picked]) for key in ("obs", "action"))
    found = policy.predict_action({"obs": obs}, generator=torch.Generator().manual_seed(0))["action"]
    return float((found[:, 0] - action[:, 0]).norm(dim=-1).mean())


def files(lora_model: LoraTransformerForDiffusion) -> None:
    title("The adapter alone, and network and adapter in one file")
    for suffix in (".pth", ".safetensors"):
        lora_model.save_lora_adapters(f"adapters{suffix}")
        lora_model.save_full_checkpoint(f"full{suffix}")
        made = LoraTransformerForDiffusion.from_checkpoint(f"full{suffix}")
        sizes = ", ".join(
            f"{name} {Path(name).stat().st_size:,} bytes" for name in (f"adapters{suffix}", f"full{suffix}")
        )
        print(f"{sizes}; made again from the file, outputs differ by {difference(made, lora_model):g}")

    title("A checkpoint in training, with its optimizer")
    optimizer = torch.optim.AdamW(lora_model.get_optim_groups(1e-3), lr=1e-3)
    save_lora_checkpoint(
        lora_model, "checkpoint.pth", optimizer, epoch=10, global_step=1000, metadata={"why": "example"}
    )
    payload = load_lora_checkpoint("checkpoint.pth", lora_model, optimizer)
    print(f"epoch {payload['epoch']}, step {payload['global_step']}, {payload['metadata']}")

    title("Another configuration is warned of, another network is refused")
    other = LoraTransformerForDiffusion(QKVTransformerForDiffusion(**NETWORK), **{**LORA, "lora_alpha": 32})
    print("the same configuration:", compare_lora_configs(lora_model.settings, other.settings))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        other.load_lora_adapters("adapters.pth")
    print("\n".join(str(one.message) for one in caught))
    wider = LoraTransformerForDiffusion(QKVTransformerForDiffusion(**{**NETWORK, "n_head": 2}), **LORA)
    try:
        wider.load_lora_adapters("adapters.pth")
    except Incompatible as refusal:
        print(refusal)

    title("Merged into a plain network")
    merged = merge_lora_weights(lora_model, alpha=1.0)
    save_merged_model(merged, "merged_model.pth")
    plain = QKVTransformerForDiffusion.from_checkpoint("merged_model.pth")
    print(f"a {type(plain).__name__} without PEFT; outputs differ by {difference(plain, lora_model):.1g}")


def main() -> None:
    torch.manual_seed(0)
    registry = Registry.init()  # ./.registry, which every registry:// URL below means
    demonstrations("world.zarr", gain=1.0)
    demonstrations("payload.zarr", gain=0.4)

    title("A policy is trained, and pushed as a base")
    run = DiffusionPolicyWorkspace(
        configuration("world.zarr", registry={"push_policy": "registry://walk/base:v1"}), "base"
    )
    print({name: round(value, 4) for name, value in run.run().items()})

    title("A LoRA on it, for a world in which it fails, is trained half of the way and pushed")
    changed = {
        "policy": {"lora": {**LORA, "base_model_path": "registry://walk/base:v1"}},
        "registry": {"push_adapter": "registry://walk/payload:prod"},
    }
    first = DiffusionPolicyWorkspace(configuration("payload.zarr", **changed), "lora")
    half = first.trainer.plan() // 2
    first.run(until_step=half)
    reference = first.save_checkpoint("registry://walk/run", use_thread=False)
    print(f"step {first.global_step}: {reference}")

    title("It goes on from the registry, and is bit for bit the run that never stopped")
    second = DiffusionPolicyWorkspace.create_from_checkpoint(reference, output_dir="again")
    second.run()
    whole = DiffusionPolicyWorkspace(configuration("payload.zarr", **changed), "whole")
    whole.run()
    same = all(torch.equal(one, whole.model.state_dict()[name]) for name, one in second.model.state_dict().items())
    print("equal parameters:", same)
    if not same:
        raise SystemExit("the run that went on is another one")

    title("Policies out of the registry, in the changed world")
    for name in ("walk/base:v1", "walk/payload:prod"):
        policy = DiffusionPolicy.from_checkpoint(f"registry://{name}")
        print(f"{name:18} mean error of the action {error_in(policy, 'payload.zarr'):.3f}")
    print([(version.reference, version.base) for version in registry.find(pattern="walk/*", order_by="name")])

    lora_model = LoraTransformerForDiffusion.from_checkpoint("registry://walk/payload:prod")
    print_lora_model_summary(lora_model)
    files(lora_model)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="work here, and leave what was made")
    kept = parser.parse_args().keep
    os.environ.pop("REGISTRY_URL", None)
    with tempfile.TemporaryDirectory(prefix="pdp-example-") as temporary:
        folder = Path(kept or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)
        main()
        os.chdir("/")
