"""Checkpoints that somebody else made, to be read by somebody who does not know what is in them: nothing in them is
resolved, imported, computed without bound, or turned into a path."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from pdp.errors import CheckpointError, CheckpointWarning, ConfigError
from pdp.lora_model import LoraTransformerForDiffusion
from pdp.modules_v2 import QKVTransformerForDiffusion
from pdp.workspace import DiffusionPolicyWorkspace
from registry.core.errors import InvalidInput
from tests.pdp.models import lora, network
from tests.pdp.runs import configuration, workspace


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a real run saved."""
    folder = tmp_path_factory.mktemp("good")
    run = workspace(folder)
    run.run(until_step=3)
    payload: dict[str, Any] = torch.load(run.get_checkpoint_path(), weights_only=True)
    return payload


def changed(payload: dict[str, Any], path: str, value: Any, folder: Path) -> Path:
    """The same checkpoint with another value at a dotted path."""
    tree = copy.deepcopy(payload)
    *above, last = path.split(".")
    node = tree
    for part in above:
        node = node[part]
    node[last] = value
    torch.save(tree, folder / "changed.ckpt")
    return folder / "changed.ckpt"


@pytest.mark.parametrize(
    "text", ["${oc.env:SECRET}", "${marked:1}", "before ${oc.env:SECRET}", "${a", "${nowhere.at.all}"]
)
def test_nothing_in_a_recorded_configuration_is_resolved(
    text: str, good: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "s3cr3t")
    calls: list[Any] = []
    OmegaConf.register_new_resolver("marked", calls.append, replace=True)
    try:
        path = changed(good, "cfg.name", text, tmp_path)
        with pytest.warns(CheckpointWarning, match="that would have to be computed are left out: name"):
            made = DiffusionPolicyWorkspace.create_from_checkpoint(path, output_dir=tmp_path)
        assert made.cfg.name is None
        assert not calls
        with pytest.raises(ConfigError, match="name is"):
            DiffusionPolicyWorkspace({"name": text})
    finally:
        OmegaConf.clear_resolver("marked")


def test_values_that_point_to_others_are_followed_as_data(good: dict[str, Any], tmp_path: Path) -> None:
    path = changed(good, "cfg.policy.model.output_dim", "${policy.model.input_dim}", tmp_path)
    made = DiffusionPolicyWorkspace.create_from_checkpoint(path, output_dir=tmp_path)
    assert made.cfg.policy.model.output_dim == 3
    path = changed(good, "cfg.name", "${name}", tmp_path)  # to itself
    with pytest.warns(CheckpointWarning, match="left out: name"):
        DiffusionPolicyWorkspace.create_from_checkpoint(path, output_dir=tmp_path)


@pytest.mark.parametrize("name", ["/somewhere/else", "../up.jsonl", "a/b", "", ".hidden"])
def test_a_recorded_configuration_does_not_say_where_to_write(name: str, good: dict[str, Any], tmp_path: Path) -> None:
    path = changed(good, "cfg.logging.metrics_file", name, tmp_path)
    with pytest.raises(ConfigError, match=r"logging\.metrics_file is .*; expected the name of a file"):
        DiffusionPolicyWorkspace.create_from_checkpoint(path, output_dir=tmp_path)


def test_where_a_run_wrote_and_pushed_is_not_taken_over(
    good: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tree = copy.deepcopy(good)
    tree["cfg"]["output_dir"] = str(tmp_path / "theirs")
    tree["cfg"]["registry"] |= {"url": str(tmp_path / "other"), "push": "registry://theirs/run"}
    tree["cfg"]["training"]["resume"] = "elsewhere.ckpt"
    torch.save(tree, "changed.ckpt")
    made = DiffusionPolicyWorkspace.create_from_checkpoint("changed.ckpt", overrides={"training.max_steps": 3})
    made.run()
    assert made.output_dir.is_relative_to("outputs")
    assert not made.pushed
    assert not (tmp_path / "theirs").exists()


def test_names_of_best_checkpoints_from_elsewhere_delete_nothing(good: dict[str, Any], tmp_path: Path) -> None:
    path = changed(good, "pickles.topk", {"kept": {"precious.ckpt": 99.0, "latest.ckpt": 98.0}}, tmp_path)
    run = workspace(tmp_path, checkpoint__topk={"k": 1, "format_str": "best-{epoch}.ckpt"})
    folder = Path(run.get_checkpoint_path()).parent
    folder.mkdir(parents=True)
    (folder / "precious.ckpt").write_text("mine")
    run.load_checkpoint(path)
    run.run()
    assert (folder / "precious.ckpt").read_text() == "mine"
    assert (folder / "latest.ckpt").exists()


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("pickles.model_config.arguments.emb_dim", 200_000, "emb_dim"),
        ("pickles.model_config.arguments.T_obs", 10**9, "T_obs"),
        ("pickles.model_config.arguments.n_encoder_layers", 10**9, "n_encoder_layers"),
        ("pickles.model_config.arguments.obs_dim", 12, "obs_dim=12, and its tensors have 11"),
        ("pickles.model_config.arguments.n_heads", 4, "no argument n_heads; did you mean n_head"),
        ("pickles.model_config.class", "os.system", "looked up, never imported"),
        ("pickles.model_config.class", "subprocess.Popen", "looked up, never imported"),
    ],
)
def test_a_network_that_its_own_weights_contradict_is_not_built(
    path: str, value: Any, named: str, good: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput, match=named):
        QKVTransformerForDiffusion.from_checkpoint(changed(good, path, value, tmp_path))


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("pickles.global_step", "abc", "global_step"),
        ("pickles.global_step", float("nan"), "global_step"),
        ("pickles.global_step", 10**30, "global_step"),
        ("pickles.epoch", [1], "epoch"),
        ("pickles.epoch_loss", {"sum": "x"}, "epoch_loss"),
        ("pickles.ema_counters", {"decay": float("inf"), "optimization_step": 1}, "decay|average"),
        ("pickles.metrics", {"a": "b"}, "metrics"),
        ("state_dicts.optimizer", {"state": {}, "param_groups": [{}]}, "optimizer"),
        ("state_dicts.rng", {"torch": torch.zeros(2, dtype=torch.uint8)}, "random generators"),
        ("state_dicts.normalizer", {"params_dict.obs.scale": torch.ones(11)}, "normaliser"),
        ("state_dicts.ema_model", {"head.weight": torch.ones(2, 2)}, "ema|fit"),
    ],
)
def test_a_part_that_is_wrong_refuses_all_of_it(
    path: str, value: Any, named: str, good: dict[str, Any], tmp_path: Path
) -> None:
    run = workspace(tmp_path, training__seed=9)
    before = run.state_tree()
    kept = {name: one.clone() for name, one in before["state_dicts"]["model"].items()}
    average = {name: one.clone() for name, one in before["state_dicts"]["ema_model"].items()}
    with pytest.raises(InvalidInput if "ema_model" not in path else Exception, match=f"(?i){named}"):
        run.load_checkpoint(changed(good, path, value, tmp_path))
    after = run.state_tree()
    assert all(torch.equal(after["state_dicts"]["model"][name], one) for name, one in kept.items())
    assert all(torch.equal(after["state_dicts"]["ema_model"][name], one) for name, one in average.items())
    assert (run.global_step, run.epoch, run.optimizer.state_dict()["state"]) == (0, 0, {})


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("lora_r", 10**9, "lora_r is 1000000000"),
        ("lora_r", 60_000, "says rank 60000, and the largest of its tensors is 4"),
        ("lora_alpha", 10**400, "lora_alpha is"),
        ("lora_alpha", float("nan"), "lora_alpha is nan"),
        ("lora_options", {"rank_pattern": {"q_proj": 10**9}}, "rank_pattern"),
        ("lora_options", {"rank_pattern": {"([a-z0-9_.]+)+!": 4}}, "expected the name of a module"),
        ("lora_options", {"alpha_pattern": {"q_proj": float("nan")}}, "alpha_pattern"),
        ("lora_options", {"rank_pattern": "q_proj"}, "expected a mapping"),
        ("lora_options", {"init_lora_weights": "pissa_niter_2000000000"}, "init_lora_weights"),
        ("lora_options", {"init_lora_weights": "loftq"}, "init_lora_weights"),
        ("lora_options", {"megatron_config": {"tensor_model_parallel_size": 1}}, "unknown option megatron_config"),
        ("lora_options", {"auto_mapping": {"a": 1}}, "unknown option auto_mapping"),
        ("lora_options", {"use_dora": "yes"}, "use_dora is 'yes'"),
        ("lora_options", {1: 2, "use_dora": True}, "1 is no name of an option"),
        ("target_modules", ["(.*)*x"], r"match no linear layer"),
    ],
)
def test_settings_that_ask_for_more_than_there_is_are_refused(key: str, value: Any, named: str, tmp_path: Path) -> None:
    lora().save_full_checkpoint(tmp_path / "f.pth")
    saved = torch.load(tmp_path / "f.pth", weights_only=True)
    saved["lora_config"][key] = value
    torch.save(saved, tmp_path / "f.pth")
    with pytest.raises(InvalidInput, match=named):
        LoraTransformerForDiffusion.from_checkpoint(tmp_path / "f.pth")


def test_a_header_is_held_against_its_tensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    lora().save_lora_adapters(tmp_path / "a.safetensors")
    torch.save(network().state_dict(), tmp_path / "base.pth")
    config = {"peft_type": "LORA", "r": 10**9, "lora_alpha": 8, "target_modules": ["q_proj"]}
    save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", {"adapter_config": json.dumps(config)})
    with pytest.raises(InvalidInput, match="lora_r is 1000000000"):
        LoraTransformerForDiffusion.from_checkpoint(tmp_path / "b.safetensors", tmp_path / "base.pth")


def test_names_of_blocks_do_not_say_how_many_are_built(tmp_path: Path) -> None:
    for name in ("encoder.blocks.999999999.mlp.fc1.weight", "encoder.blocks.x.mlp.fc1.weight"):
        torch.save({**network().state_dict(), name: torch.zeros(1)}, tmp_path / "m.pth")
        with pytest.raises(CheckpointError, match="some are missing"):
            QKVTransformerForDiffusion.from_checkpoint(tmp_path / "m.pth")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training__seed", 2**70),
        ("dataset__seed", -1),
        ("optimizer__betas", [0.9]),
        ("optimizer__betas", [2.0, 0.9]),
        ("optimizer__eps", -1.0),
        ("optimizer__weight_decay", -1.0),
        ("optimizer__lr", float("nan")),
        ("training__max_grad_norm", -1.0),
        ("policy__noise_scheduler", {"num_train_timesteps": "x"}),
        ("policy__noise_scheduler", {"beta_schedule": "none"}),
        ("registry__push", "walk/run"),
        ("training__lr_scheduler", "polynomial"),
    ],
)
def test_numbers_and_names_that_cannot_be_are_refused_before_training(key: str, value: Any, tmp_path: Path) -> None:
    changes = {key: value} | ({"training__lr_warmup_steps": 24} if value == "polynomial" else {})
    with pytest.raises(ConfigError, match=key.split("__")[-1].split("_")[0]):
        DiffusionPolicyWorkspace(configuration(tmp_path, **changes), tmp_path / "run").run()
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("topk", "named"),
    [
        ({"k": 1, "monitor_key": "val_los"}, "no metric val_los to choose checkpoints by; did you mean val_loss"),
        ({"k": 1, "format_str": "{epoch:>1000000000}"}, "format_str has {epoch:>1000000000}"),
        ({"k": 1, "format_str": "../{epoch}"}, "expected the name of a file"),
        ({"k": 1, "format_str": "{reward}"}, "does not go with the metrics"),
    ],
)
def test_names_of_best_checkpoints_are_tried_before_training(topk: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=named):
        workspace(tmp_path, checkpoint__topk=topk).run()
    assert not (tmp_path / "run").exists()


def test_a_schedule_of_another_kind_begins_anew_and_that_is_said(good: dict[str, Any], tmp_path: Path) -> None:
    run = workspace(tmp_path)
    with pytest.warns(CheckpointWarning, match=r"(?s)scheduler of .* does not fit this LambdaLR.*begins anew"):
        run.load_checkpoint(changed(good, "state_dicts.scheduler", {"T_max": 100, "last_epoch": 5}, tmp_path))
    with pytest.warns(CheckpointWarning, match="begins anew"):
        run.run(until_step=5)
