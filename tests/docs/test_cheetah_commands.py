"""The commands with which README.md trains, lists, checks and deploys a LoRA are typed as they stand there, with fewer
steps. In full they take some minutes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from registry import Registry

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHORTER = {
    "examples.cheetah.demonstrations": "--episodes 6 --steps 40",
    "pdp.train": "training.max_steps=6 dataloader.batch_size=32 training.lr_warmup_steps=2",
    "pdp.evaluate": "--rollouts 2 --steps 10",
}


def test_the_commands_of_the_readme_train_list_check_and_deploy_a_lora(tmp_path: Path) -> None:
    base, lora = BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(lora.splitlines()) == 5
    # As in a checkout, but with what they write here.
    for name in ("examples", "pdp", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "100",
    }
    shown = {}
    for command in ["registry init", *base.splitlines(), *lora.splitlines()]:
        shorter = next((f" {more}" for name, more in SHORTER.items() if name in command), "")
        done = subprocess.run(
            ["bash", "-c", command + shorter],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=200,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        shown[command.split()[0:3][-1] if "-m" in command else command.split()[1]] = done.stdout
    assert "cheetah/gear" in shown["list"]
    assert "fits" in shown["check"]
    assert "noted" in shown["pdp.evaluate"]
    with Registry.open(tmp_path / ".registry") as registry:
        version = registry.get("cheetah/gear:prod")
        assert version.base == "cheetah/base@1"
        assert {"gear/speed", "gear/success", "original/speed"} <= version.metrics.keys()
        assert "speed" not in version.metrics  # of episodes as short as these
