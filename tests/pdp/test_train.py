"""`python -m pdp.train`, as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from pdp.configuration import check_override, read_config
from pdp.errors import ConfigError
from registry import Registry
from registry.core.errors import InvalidInput
from tests.pdp.datasets import write_synthetic

ROOT = Path(__file__).parents[2]
SMALL = [
    *("policy.model.obs_dim=11", "policy.model.input_dim=3", "policy.model.emb_dim=32", "policy.model.T_obs=2"),
    *("policy.model.n_encoder_layers=1", "policy.model.n_decoder_layers=1", "training.lr_warmup_steps=2"),
]


def train(folder: Path, *words: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pdp.train", *words]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done


def parents(registry: Registry, reference: str) -> set[tuple[str, str]]:
    log = registry.log(reference)
    return {(edge.relation, log.names[edge.parent_id]) for edge in log.ancestors if edge.child_id == log.id}


@pytest.mark.slow
def test_a_base_and_a_lora_on_it_are_trained_and_pushed(tmp_path: Path) -> None:
    write_synthetic(tmp_path / "walk.zarr")
    write_synthetic(tmp_path / "payload.h5", seed=1)
    with Registry.init(tmp_path / ".registry") as registry:
        shown = train(
            tmp_path,
            *("--config-name", "base", "dataset.path=walk.zarr", *SMALL, "training.num_epochs=2"),
            *(
                "hydra.run.dir=runs/base",
                "registry.push=registry://walk/run",
                "registry.push_policy=registry://walk/base:v1",
            ),
        ).stdout
        assert "train_loss" in shown
        assert (tmp_path / "runs" / "base" / "checkpoints" / "latest.ckpt").stat().st_size
        metrics = [json.loads(line) for line in (tmp_path / "runs/base/metrics.jsonl").read_text().splitlines()]
        assert metrics[-1]["epoch"] == 2
        assert registry.get("walk/base:v1").metrics["val_loss"] == metrics[-1]["val_loss"]
        assert parents(registry, "walk/base:v1") == {("extracted_from", "walk/run@1")}
        train(
            tmp_path,
            *("--config-name", "lora", "dataset.path=payload.h5", "training.num_epochs=1"),
            *("policy.lora.base_model_path=registry://walk/base:v1", "hydra.run.dir=runs/lora"),
            *("registry.push_adapter=registry://walk/payload:prod", "training.lr_warmup_steps=2"),
        )
        adapter = registry.get("walk/payload:prod")
        assert (adapter.base, adapter.r, adapter.kind) == ("walk/base@1", 8, "adapter")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["training.num_epoch=3"],
            "unknown key training.num_epoch in the configuration; did you mean training.num_epochs?",
        ),
        (["+training.sed=3"], "unknown key training.sed in the configuration; did you mean training.seed?"),
        (["dataset.path=nowhere.zarr", *SMALL], "no such data set: nowhere.zarr"),
    ],
)
def test_a_mistake_is_one_clear_line(words: list[str], said: str, tmp_path: Path) -> None:
    done = train(tmp_path, "hydra.run.dir=run", *words, status=4 if "such" in said else 3)
    assert said in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_terminal_shows_how_far_training_is(tmp_path: Path) -> None:
    import os
    import pty

    from tests.pdp.runs import configuration

    configuration(tmp_path)
    script = "from tests.pdp.runs import *; import sys; workspace(Path(sys.argv[1])).run()"
    terminal, its = pty.openpty()
    command = [sys.executable, "-c", script, str(tmp_path)]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    child = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=its)
    os.close(its)
    shown = ""
    with open(terminal, "rb", buffering=0) as reader, suppress(OSError):  # EIO: the child has closed its end
        while data := reader.read(4096):
            shown += data.decode(errors="replace")
    assert child.wait(300) == 0, shown
    assert "training" in shown
    assert "24/24" in shown


def test_overrides_are_checked_before_hydra_sees_them() -> None:
    for fine in (
        "training.seed=1",
        "policy.model.anything=2",
        "hydra.run.dir=x",
        "policy=other",
        "+new=1",
        "--multirun",
    ):
        check_override(fine)
    with pytest.raises(ConfigError, match=r"did you mean dataloader\.batch_size"):
        check_override("dataloader.batchsize=3")


def test_every_key_of_the_configurations_that_come_along_is_known() -> None:
    from omegaconf import OmegaConf

    for path in sorted((ROOT / "pdp" / "config").glob("*.yaml")):
        given = OmegaConf.load(path)
        given.pop("defaults", None)
        if OmegaConf.select(given, "policy.model") is not None:
            given.policy.model = {}
        if OmegaConf.select(given, "policy.lora") is not None:
            with pytest.raises(InvalidInput, match=r"policy\.lora\.base_model_path not set in the configuration"):
                read_config(given)
            given.policy.lora.base_model_path = "registry://walk/base"
        read_config(given)
    with pytest.raises(InvalidInput, match="cannot be resolved"):
        read_config(OmegaConf.create({"name": "${nothing}"}))
