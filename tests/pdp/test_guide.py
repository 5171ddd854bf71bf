"""Every Python block of docs/lora-save-load.md runs, in order and as it stands, in one namespace. What a block takes
for granted (the sizes behind `...`, an optimizer, files) is put there before it, and what it must have done is
checked after it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pdp.lora_model import LoraTransformerForDiffusion
from pdp.utils.lora_utils import compare_lora_configs
from pdp.workspace import DiffusionPolicyWorkspace
from registry import Registry
from tests.pdp.models import FORWARD, SIZES, lora, output

PAGE = Path(__file__).parents[2] / "docs" / "lora-save-load.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
Namespace = dict[str, Any]
LORA = {"lora_r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "out_proj"]}


def as_on_the_page() -> LoraTransformerForDiffusion:
    return lora(lora_r=8, lora_alpha=16, lora_dropout=0.1)


def configuration(**policy: Any) -> dict[str, Any]:
    return {"policy": {"model": SIZES, **policy}, "output_dir": "run"}


def ready(namespace: Namespace) -> None:
    """What the page takes for granted throughout."""
    as_on_the_page().save_full_checkpoint("checkpoint.pth")
    namespace |= {"torch": torch, "compare_lora_configs": compare_lora_configs}


def with_optimizer(namespace: Namespace) -> None:
    optimizer = torch.optim.AdamW(namespace["lora_model"].get_optim_groups(1e-3), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    namespace |= {"optimizer": optimizer, "scheduler": scheduler}


def with_configurations(namespace: Namespace) -> None:
    ours = namespace["lora_config"]
    namespace |= {"saved_config": ours, "current_config": {**ours, "lora_r": 4}}


def exist(*names: str) -> Callable[[Namespace, str], None]:
    def check(namespace: Namespace, printed: str) -> None:
        assert all(Path(name).stat().st_size for name in names)
        assert not printed

    return check


def made_of_a_checkpoint(namespace: Namespace, printed: str) -> None:
    assert torch.equal(output(namespace["lora_model"]), output(as_on_the_page()))


def a_run_was_saved(namespace: Namespace, printed: str) -> None:
    workspace: DiffusionPolicyWorkspace = namespace["workspace"]
    workspace.saver.join()
    assert Path("workspace_lora.pth" if workspace.is_lora_model() else "standard.pth").stat().st_size


def merged_and_saved(namespace: Namespace, printed: str) -> None:
    payload = namespace["payload"]
    assert (payload["epoch"], payload["global_step"]) == (10, 1000)
    assert payload["metadata"] == {"description": "Fine-tuned model"}
    assert torch.allclose(output(namespace["merged_model"]), output(namespace["lora_model"].eval()), atol=1e-6)
    assert torch.load("merged_model.pth", weights_only=True)["model_type"] == "merged_lora"


def pushed(namespace: Namespace, printed: str) -> None:
    with Registry.open() as registry:
        version = registry.get("walk/perturb:prod")
        assert (version.base, version.metrics) == ("walk/base@1", {"reward": 871.0})
    assert namespace["lora_model"].base_reference == "walk/base@1"


def a_checkpoint_was_pushed(namespace: Namespace, printed: str) -> None:
    with Registry.open() as registry:
        assert registry.get("walk/run:night").kind == "checkpoint"
    assert namespace["reference"] == "registry://walk/run@1"


def prints(text: str) -> Callable[[Namespace, str], None]:
    def check(namespace: Namespace, printed: str) -> None:
        assert text in printed

    return check


BEFORE: dict[int, Callable[[Namespace], None]] = {0: ready, 5: with_optimizer, 8: with_configurations}
AFTER: dict[int, Callable[[Namespace, str], None]] = {
    0: exist("lora_adapters.pth", "lora_full.pth"),
    1: exist("adapters.pth"),
    2: exist("full_checkpoint.pth"),
    3: made_of_a_checkpoint,
    4: a_run_was_saved,
    5: merged_and_saved,
    6: exist(),
    7: exist("adapters.pth"),
    8: prints("Warning: Configuration mismatch!"),
    9: exist("adapters.pth"),
    10: exist("checkpoint.pth"),
    11: prints("Trainable parameters: "),
    12: pushed,
    13: a_checkpoint_was_pushed,
}


def runnable(block: str) -> str:
    block = block.replace("QKVTransformerForDiffusion(...)", f"QKVTransformerForDiffusion(**{SIZES!r})")
    assert "..." not in block
    return block if torch.cuda.is_available() else block.replace("'cuda'", "'cpu'")


def test_every_block_of_the_guide_runs_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: Namespace = {"__name__": "guide"}
    assert len(BLOCKS) == len(AFTER)
    for number, block in enumerate(BLOCKS):
        BEFORE.get(number, lambda _: None)(namespace)
        # The block of the workspace has two ways, for a run without and with a LoRA.
        for cfg in [configuration(), configuration(lora=LORA)] if number == 4 else [None]:
            if cfg is not None:
                namespace["cfg"] = cfg
            exec(compile(runnable(block), f"{PAGE.name}, block {number}", "exec"), namespace)
            AFTER[number](namespace, capsys.readouterr().out)


def test_an_error_in_the_guides_way_of_handling_them_is_one_readable_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = [one for one in BLOCKS if one.startswith("try:")]
    exec(block, {"lora_model": lora()})
    assert re.match(r"Error loading LoRA adapters: .*adapters\.pth", capsys.readouterr().out)


def test_the_recorded_inputs_are_of_the_sizes_of_the_page() -> None:
    assert FORWARD["cond"].shape[1:] == (SIZES["T_obs"], SIZES["obs_dim"])
