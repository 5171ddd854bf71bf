"""A run: what it trains and writes, that it goes on exactly where it stopped, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from omegaconf import OmegaConf

from pdp.data import SequenceDataset
from pdp.errors import CheckpointError, CheckpointWarning, ConfigError, TrainingDiverged
from pdp.policy import DiffusionPolicy
from pdp.workspace import DiffusionPolicyWorkspace
from registry import Registry
from registry.core.errors import Incompatible, InvalidInput, NoSpace, SourceNotFound
from tests.pdp.models import LEGACY, same_tensors
from tests.pdp.runs import LORA, configuration, differing, workspace

ROOT = Path(__file__).parents[2]


def lines(run: DiffusionPolicyWorkspace) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.output_dir / "metrics.jsonl").read_text().splitlines()]


def everything(run: DiffusionPolicyWorkspace) -> dict[str, Any]:
    """All of a run's state, as it saved it at the end of its training, or saves it now."""
    if not Path(run.get_checkpoint_path()).exists():
        run.save_checkpoint(use_thread=False)
    tree: dict[str, Any] = torch.load(run.get_checkpoint_path(), weights_only=True)
    del tree["cfg"]
    return tree


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("lora", [None, LORA])
def test_a_run_learns_and_writes_its_metrics_and_latest(lora: Any, tmp_path: Path) -> None:
    run = workspace(tmp_path, policy__lora=lora, training__num_epochs=12)
    before = {name: one.clone() for name, one in run.model.state_dict().items()}
    metrics = run.run()
    written = lines(run)
    steps = [one for one in written if "lr" in one]
    ends = [one for one in written if "end_of_epoch" in one]
    assert [one["global_step"] for one in steps] == list(range(1, 12 * 8 + 1))
    assert (run.global_step, run.epoch, len(ends)) == (96, 12, 12)
    assert ends[-1]["train_loss"] < (0.7 if lora is None else 0.95) * ends[0]["train_loss"]
    assert metrics["val_loss"] == ends[-1]["val_loss"] < ends[0]["val_loss"]
    assert steps[0]["lr"] == 0
    assert max(one["lr"] for one in steps) == pytest.approx(1e-3)
    assert steps[-1]["lr"] < 1e-5
    assert Path(run.get_checkpoint_path()).stat().st_size
    after = run.model.state_dict()
    changed = {name for name, one in before.items() if not torch.equal(after[name], one)}
    assert all((".lora_" in name) == (lora is not None) for name in changed)
    assert changed


def test_the_policy_of_a_checkpoint_acts(tmp_path: Path) -> None:
    run = workspace(tmp_path)
    run.run()
    made = DiffusionPolicy.from_checkpoint(run.get_checkpoint_path())
    obs = torch.randn(5, 2, 11)
    acting = run.trainer._acting()
    found = made.predict_action({"obs": obs}, generator=torch.Generator().manual_seed(0))["action"]
    expected = acting.predict_action({"obs": obs}, generator=torch.Generator().manual_seed(0))["action"]
    assert found.shape == (5, 4, 3)
    assert torch.equal(found, expected)
    raw = DiffusionPolicy.from_checkpoint(run.get_checkpoint_path(), use_ema=False)
    assert same_tensors(raw.model, run.model)


def test_rollouts_are_logged_and_do_not_disturb_training(tmp_path: Path) -> None:
    def rollout(policy: DiffusionPolicy) -> dict[str, float]:
        assert not policy.training
        torch.randn(100)
        numpy.random.rand()
        return {"reward": 7.0}

    cfg = configuration(tmp_path, training__rollout_every=1)
    with_rollouts = DiffusionPolicyWorkspace(cfg, tmp_path / "a", rollout=rollout)
    assert with_rollouts.run()["reward"] == 7.0
    without = workspace(tmp_path, "b", training__val_every=0)
    without.run()
    assert same_tensors(with_rollouts.model, without.model)


def test_without_an_average_rollouts_act_without_dropout_and_training_goes_on_with_it(tmp_path: Path) -> None:
    def rollout(policy: DiffusionPolicy) -> dict[str, float]:
        assert not policy.training
        assert not any(module.training for module in policy.modules())
        policy.eval()
        return {"reward": 1.0, "global_step": 99.0}

    cfg = configuration(tmp_path, training__rollout_every=1, training__use_ema=False)
    with_rollouts = DiffusionPolicyWorkspace(cfg, tmp_path / "a", rollout=rollout)
    with_rollouts.run()
    without = workspace(tmp_path, "b", training__val_every=0, training__use_ema=False)
    without.run()
    assert same_tensors(with_rollouts.model, without.model)
    assert lines(with_rollouts)[-1]["global_step"] == 24


def test_rollouts_that_nobody_makes_are_missed(tmp_path: Path) -> None:
    with pytest.warns(CheckpointWarning, match="no rollout= was given"):
        workspace(tmp_path, training__rollout_every=1).run(until_step=1)


def test_an_epoch_without_the_metric_is_not_ranked_by_an_older_value(tmp_path: Path) -> None:
    topk = {"k": 5, "monitor_key": "val_loss", "format_str": "best-{epoch}.ckpt"}
    run = workspace(tmp_path, checkpoint__topk=topk, training__val_every=2, training__num_epochs=5)
    run.run()
    names = sorted(path.name for path in (run.output_dir / "checkpoints").iterdir())
    assert names == ["best-2.ckpt", "best-4.ckpt", "latest.ckpt"]


def test_the_best_checkpoints_are_kept_beside_the_latest(tmp_path: Path) -> None:
    run = workspace(tmp_path, checkpoint__topk={"k": 2, "format_str": "best-{epoch}.ckpt"})
    run.run()
    names = sorted(path.name for path in (run.output_dir / "checkpoints").iterdir())
    assert names == ["best-2.ckpt", "best-3.ckpt", "latest.ckpt"]


def test_saving_under_a_tag_writes_latest_as_well(tmp_path: Path) -> None:
    run = workspace(tmp_path)
    for use_thread in (False, True):
        path = run.save_checkpoint(tag="best", use_thread=use_thread)
        run.saver.join()
        assert Path(path).read_bytes() == Path(run.get_checkpoint_path()).read_bytes()
        Path(run.get_checkpoint_path()).unlink()


# ---------------------------------------------------------------- going on


@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("stop", [8, 13])
def test_a_run_that_stops_and_goes_on_is_bit_for_bit_the_one_that_did_not(stop: int, lora: Any, tmp_path: Path) -> None:
    whole = workspace(tmp_path, "whole", policy__lora=lora)
    whole.run()
    first = workspace(tmp_path, "parts", policy__lora=lora)
    first.run(until_step=stop)
    torch.manual_seed(99)
    second = workspace(tmp_path, "parts", policy__lora=lora)
    second.load_checkpoint()
    assert (second.global_step, second.epoch) == (stop, stop // 8)
    second.run()
    assert not differing(everything(whole), everything(second))
    assert lines(whole) == lines(second)


def test_a_run_goes_on_through_a_registry_in_another_process(tmp_path: Path) -> None:
    whole = workspace(tmp_path, "whole")
    whole.run()
    with Registry.init(tmp_path / "registry") as registry:
        first = workspace(tmp_path, "first", registry=registry)
        first.run(until_step=13)
        assert first.save_checkpoint("registry://walk/run:half", use_thread=False) == "registry://walk/run@1"
        roles = set(registry.show("walk/run:half").contents.components)
        assert roles == {"model", "ema", "normalizer", "optimizer", "scheduler", "rng", "training"}
    script = (
        "import sys\n"
        "from pdp.workspace import DiffusionPolicyWorkspace\n"
        "url, folder = sys.argv[1:]\n"
        "run = DiffusionPolicyWorkspace.create_from_checkpoint(\n"
        "    'registry://walk/run:half', registry=url, output_dir=folder)\n"
        "assert run.global_step == 13\n"
        "run.run()\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "registry"), str(tmp_path / "second")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    second = torch.load(tmp_path / "second" / "checkpoints" / "latest.ckpt", weights_only=True)
    del second["cfg"]
    assert not differing(everything(whole), second)


def test_workers_of_the_loader_change_nothing(tmp_path: Path) -> None:
    whole = workspace(tmp_path, "whole")
    whole.run(until_step=12)
    other = workspace(tmp_path, "workers", dataloader__num_workers=2)
    other.run(until_step=5)
    other.run(until_step=12)
    assert same_tensors(whole.model, other.model)


def test_resume_in_the_configuration_goes_on_from_latest(tmp_path: Path) -> None:
    whole = workspace(tmp_path, "whole")
    whole.run()
    first = workspace(tmp_path, "parts")
    first.run(until_step=11)
    named = workspace(tmp_path, "named", training__resume=first.get_checkpoint_path())
    named.run()
    assert same_tensors(whole.model, named.model)
    second = workspace(tmp_path, "parts", training__resume=True)
    second.run()
    assert not differing(everything(whole), everything(second))
    fresh = workspace(tmp_path, "fresh", training__resume=True)
    fresh.run()
    assert same_tensors(whole.model, fresh.model)


def test_a_checkpoint_that_is_loaded_and_saved_again_is_still_the_same(tmp_path: Path) -> None:
    whole = workspace(tmp_path, "whole")
    whole.run()
    first = workspace(tmp_path, "first")
    first.run(until_step=11)
    again = workspace(tmp_path, "again")
    again.load_checkpoint(first.get_checkpoint_path())
    torch.randn(7)
    again.save_checkpoint(tmp_path / "converted.safetensors", use_thread=False)
    third = workspace(tmp_path, "third")
    third.load_checkpoint(tmp_path / "converted.safetensors")
    third.run()
    assert same_tensors(whole.model, third.model)


def test_a_new_optimizer_keeps_the_place_in_the_schedule(tmp_path: Path) -> None:
    first = workspace(tmp_path, "first")
    first.run(until_step=12)
    rate = lines(first)[-1]["lr"]
    first.load_checkpoint(load_optimizer=False)
    first.run(until_step=14)
    assert lines(first)[-2]["lr"] == pytest.approx(rate, rel=0.2)
    assert lines(first)[-2]["lr"] < rate


def test_metrics_come_back_with_a_run(tmp_path: Path) -> None:
    run = workspace(tmp_path)
    metrics = run.run()
    other = workspace(tmp_path)
    other.load_checkpoint()
    assert other.metrics == metrics
    assert other.run() == metrics


def test_another_learning_rate_does_not_change_a_schedule_that_goes_on_and_that_is_said(tmp_path: Path) -> None:
    workspace(tmp_path, "run").run(until_step=6)
    second = workspace(tmp_path, "run", optimizer__lr=5e-3)
    second.load_checkpoint()
    with pytest.warns(
        CheckpointWarning, match=r"optimizer.lr is 0.005, and the schedule .* has 0.001; it keeps its own"
    ):
        second.run(until_step=7)


def test_other_data_are_warned_of_when_a_run_goes_on(tmp_path: Path) -> None:
    first = workspace(tmp_path, "run")
    first.run(until_step=4)
    second = workspace(tmp_path, "run", dataloader__batch_size=8)
    second.load_checkpoint()
    with pytest.warns(CheckpointWarning, match="does not go on exactly .*batch_size: 16 before, 8 now"):
        second.run(until_step=5)


# ---------------------------------------------------------------- the registry


def test_pushed_checkpoints_know_where_they_came_from_and_their_metrics(tmp_path: Path) -> None:
    with Registry.init(tmp_path / "registry") as registry:
        run = workspace(tmp_path, registry=registry)
        run.run(until_step=8)
        run.save_checkpoint("registry://walk/run", tag="first", use_thread=False)
        again = run.save_checkpoint("registry://walk/run", use_thread=False)
        assert again == "registry://walk/run@1"
        run.run(until_step=16)
        run.save_checkpoint("registry://walk/run", use_thread=True)
        run.saver.join()
        one, two = registry.get("walk/run@1"), registry.get("walk/run@2")
        assert (one.tags, one.kind) == (("first",), "checkpoint")
        assert (one.metadata["epoch"], two.metadata["epoch"], two.metadata["global_step"]) == (1, 2, 16)
        assert two.metrics["train_loss"] == run.metrics["train_loss"] != one.metrics["train_loss"]
        log = registry.log("walk/run@2")
        assert {(edge.relation, log.names[edge.parent_id]) for edge in log.ancestors} == {
            ("continued_from", "walk/run@1")
        }
        other = workspace(tmp_path, "other", registry=registry)
        other.load_checkpoint("registry://walk/run@1")
        other.run(until_step=12)
        other.save_checkpoint("registry://walk/fork", use_thread=False)
        log = registry.log("walk/fork")
        assert "walk/run@1" in {log.names[edge.parent_id] for edge in log.ancestors}


@pytest.mark.parametrize("url", ["registry://walk", "registry://walk/run:latest", "registry://walk/run@1"])
def test_a_url_that_cannot_be_pushed_to_is_refused_before_anything_is_done(url: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"walk|latest"):
        workspace(tmp_path).save_checkpoint(url)
    with pytest.raises(InvalidInput, match=r"walk|latest"):
        workspace(tmp_path, registry__push=url)
    with pytest.raises(InvalidInput, match="a push has no option metric; did you mean metrics"):
        workspace(tmp_path).save_checkpoint("registry://walk/run", metric={})


def test_a_lora_run_has_its_base_and_stores_it_once(tmp_path: Path) -> None:
    with Registry.init(tmp_path / "registry") as registry:
        base = workspace(tmp_path, "base", registry=registry, registry__push_policy="registry://walk/base:v1")
        base.run()
        cfg = {
            "policy__model": None,
            "policy__noise_scheduler": None,
            "policy__lora": {**LORA, "base_model_path": "registry://walk/base:v1"},
            "registry__push": "registry://walk/lora-run",
            "registry__push_adapter": "registry://walk/perturb:prod",
        }
        run = workspace(tmp_path, "lora", registry=registry, **cfg)
        assert not differing(dict(run.policy.normalizer.state_dict()), dict(base.policy.normalizer.state_dict()))
        assert run.policy.noise_scheduler.config.prediction_type == "sample"
        run.run()
        adapter, checkpoint = registry.get("walk/perturb:prod"), registry.get("walk/lora-run")
        assert adapter.base == checkpoint.base == "walk/base@1"
        assert adapter.metrics["val_loss"] == run.metrics["val_loss"]
        assert "reused" in {role for _, role in registry.show("walk/lora-run").contents.blobs}
        policy = DiffusionPolicy.from_checkpoint("registry://walk/perturb:prod", registry=registry)
        obs = torch.randn(3, 2, 11)
        acting = run.trainer._acting()
        found, expected = (
            one.predict_action({"obs": obs}, generator=torch.Generator().manual_seed(0))["action"]
            for one in (policy, acting)
        )
        assert torch.allclose(found, expected, atol=1e-6)
        restored = DiffusionPolicyWorkspace.create_from_checkpoint(
            "registry://walk/lora-run", registry=registry, output_dir=tmp_path / "again"
        )
        assert restored.base_reference == "walk/base@1"
        assert same_tensors(restored.model, run.model)


def test_a_lora_is_not_put_on_a_checkpoint_that_has_one(tmp_path: Path) -> None:
    path = workspace(tmp_path, policy__lora=LORA).save_checkpoint(use_thread=False)
    with pytest.raises(ConfigError, match="holds a LoRA; merge it first"):
        workspace(tmp_path, policy__lora={**LORA, "base_model_path": path})


def test_a_lora_on_a_checkpoint_with_an_average_says_which_weights_it_takes(tmp_path: Path) -> None:
    path = workspace(tmp_path).save_checkpoint(use_thread=False)
    with pytest.warns(CheckpointWarning, match="the LoRA is put on the weights themselves"):
        workspace(tmp_path, policy__lora={**LORA, "base_model_path": path})


def test_a_base_without_constructor_arguments_is_read_off_its_shapes(tmp_path: Path) -> None:
    lora = {**LORA, "base_model_path": str(LEGACY / "merged.pth")}
    with pytest.warns(CheckpointWarning, match="n_head=4"):
        run = workspace(tmp_path, policy__model=None, policy__lora=lora)
    assert (run.policy.obs_dim, run.policy.T_obs) == (11, 4)


def test_a_workspace_of_an_adapter_alone_takes_its_base_or_is_refused(tmp_path: Path) -> None:
    with Registry.init(tmp_path / "registry") as registry:
        base = workspace(tmp_path, "base", registry=registry)
        base.save_policy("registry://walk/base")
        run = workspace(tmp_path, registry=registry, policy__lora={**LORA, "base_model_path": "registry://walk/base"})
        run.run(until_step=3)
        run.save_adapter("registry://walk/perturb")
        run.save_adapter(tmp_path / "a.pth")
        with pytest.warns(CheckpointWarning):
            made = DiffusionPolicyWorkspace.create_from_checkpoint(
                "registry://walk/perturb", registry=registry, output_dir=tmp_path / "made"
            )
        assert made.base_reference == "walk/base@1"
        assert same_tensors(made.model, run.ema_model)
        with pytest.warns(CheckpointWarning), pytest.raises(CheckpointError, match="holds an adapter alone"):
            DiffusionPolicyWorkspace.create_from_checkpoint(tmp_path / "a.pth", output_dir=tmp_path / "made")


def test_a_misspelt_override_is_answered_with_the_near_key(tmp_path: Path) -> None:
    path = workspace(tmp_path).save_checkpoint(use_thread=False)
    with pytest.raises(ConfigError, match=r"training\.num_epoch .*did you mean num_epochs"):
        DiffusionPolicyWorkspace.create_from_checkpoint(path, overrides={"training.num_epoch": 5})
    made = DiffusionPolicyWorkspace.create_from_checkpoint(
        path, overrides={"training.num_epochs": 5}, load_optimizer=False, output_dir=tmp_path / "made"
    )
    assert made.cfg.training.num_epochs == 5


def test_a_lenient_load_is_lenient_with_the_average_too(tmp_path: Path) -> None:
    path = workspace(tmp_path, "other", policy__lora={**LORA, "lora_r": 2, "target_modules": ["mlp"]}).save_checkpoint(
        use_thread=False
    )
    run = workspace(tmp_path, policy__lora={**LORA, "lora_r": 2})
    with pytest.warns(CheckpointWarning) as caught:
        run.load_lora_checkpoint(path)
    said = [str(one.message) for one in caught]
    assert sum("LoRA configuration mismatch!" in one for one in said) == 1
    assert sum(one.startswith("Missing keys:") for one in said) == 1


def test_an_adapter_that_is_pushed_waits_for_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Registry.init(tmp_path / "registry") as registry:
        run = workspace(tmp_path, registry=registry, policy__lora=LORA)
        run.save_checkpoint("registry://walk/run")
        run.save_adapter("registry://walk/perturb")
        log = registry.log("walk/perturb")
        assert {(edge.relation, log.names[edge.parent_id]) for edge in log.ancestors} == {
            ("extracted_from", "walk/run@1")
        }


def test_a_base_of_another_network_is_refused(tmp_path: Path) -> None:
    base = workspace(tmp_path, "base")
    path = base.save_policy(tmp_path / "base.ckpt")
    with pytest.raises(Incompatible, match="n_head"):
        workspace(tmp_path, policy__lora={**LORA, "base_model_path": path}, policy__model__n_head=2)


# ---------------------------------------------------------------- keys, tags and forms


def test_state_dicts_are_left_out_and_attributes_taken_along_by_name(tmp_path: Path) -> None:
    run = workspace(tmp_path)
    run.run(until_step=3)
    run.note = "kept"  # type: ignore[attr-defined]
    path = run.save_checkpoint(tmp_path / "a.ckpt", use_thread=False, exclude_keys=["optimizer"], include_keys=["note"])
    saved = torch.load(path, weights_only=True)
    assert "optimizer" not in saved["state_dicts"]
    assert saved["pickles"]["note"] == "kept"
    other = workspace(tmp_path, "other")
    payload = other.load_checkpoint(path, include_keys=["note"], exclude_keys=["model"])
    assert payload["pickles"]["global_step"] == 3
    assert (other.note, other.global_step) == ("kept", 3)  # type: ignore[attr-defined]
    assert not same_tensors(other.model, run.model)
    with pytest.raises(InvalidInput, match="exclude_keys names 'optimiser'; did you mean optimizer"):
        run.save_checkpoint(exclude_keys=["optimiser"])
    with pytest.raises(InvalidInput, match="no such attribute"):
        run.save_checkpoint(include_keys=["nothing"])


def test_what_a_workspace_writes_opens_with_torchs_safe_loader_and_as_safetensors(tmp_path: Path) -> None:
    run = workspace(tmp_path, policy__lora=LORA)
    run.run(until_step=3)
    run.save_checkpoint(tmp_path / "a.ckpt", use_thread=False)
    run.save_lora_checkpoint(tmp_path / "b.safetensors")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert {"cfg", "state_dicts", "pickles"} == set(saved)
    assert OmegaConf.create(saved["cfg"]).policy.model.obs_dim == 11
    other = workspace(tmp_path, "other", policy__lora=LORA)
    run.saver.join()
    payload = other.load_lora_checkpoint(tmp_path / "b.safetensors")
    assert payload["global_step"] == 3
    assert not differing(everything(run), everything(other))


def test_a_payload_in_memory_is_loaded_like_its_file(tmp_path: Path) -> None:
    run = workspace(tmp_path)
    run.run(until_step=3)
    payload = torch.load(run.get_checkpoint_path(), weights_only=True)
    other = workspace(tmp_path, "other")
    other.load_payload(payload)
    assert not differing(everything(run), everything(other))


def test_lora_methods_need_a_lora(tmp_path: Path) -> None:
    run = workspace(tmp_path)
    assert not run.is_lora_model()
    for call in (run.save_lora_checkpoint, run.load_lora_checkpoint, lambda: run.save_adapter("a.pth")):
        with pytest.raises(InvalidInput, match="the model has no LoRA"):
            call()


def test_a_lora_run_saves_and_loads_by_tag(tmp_path: Path) -> None:
    run = workspace(tmp_path, policy__lora=LORA)
    run.save_lora_checkpoint(tag="best")
    run.saver.join()
    names = sorted(path.name for path in (run.output_dir / "checkpoints").iterdir())
    assert names == ["lora_best.ckpt", "lora_latest.ckpt"]
    run.load_lora_checkpoint()
    with pytest.raises(SourceNotFound, match=r"lora_worst\.ckpt.*there are lora_best\.ckpt, lora_latest\.ckpt"):
        run.load_lora_checkpoint(tag="worst")
    with pytest.raises(SourceNotFound, match="nothing was saved there"):
        workspace(tmp_path, "empty").load_checkpoint()


@pytest.mark.parametrize("tag", ["", "../up", "a/b", ".hidden", None])
def test_a_tag_is_a_name_and_no_path(tag: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="expected a name for a file"):
        workspace(tmp_path).get_checkpoint_path(tag)


# ---------------------------------------------------------------- saving in a thread


class Gate:
    """Holds the writing thread until the test lets it go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failure: BaseException | None = None) -> None:
        import pdp.workspace

        self.opened, self.entered = threading.Event(), threading.Event()
        real = pdp.workspace.write_tree

        def write(path: Path, tree: Any) -> None:
            self.entered.set()
            assert self.opened.wait(60)
            if failure is not None:
                raise failure
            real(path, tree)

        monkeypatch.setattr(pdp.workspace, "write_tree", write)


def test_what_a_thread_writes_is_the_state_of_when_it_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = workspace(tmp_path)
    before = {name: one.clone() for name, one in run.model.state_dict().items()}
    gate = Gate(monkeypatch)
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert gate.entered.wait(60)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.add_(1)
    gate.opened.set()
    run.saver.join()
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dicts"]["model"]
    assert not differing(dict(saved), before)


def test_who_reads_a_file_that_is_being_written_gets_what_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = workspace(tmp_path)
    gate = Gate(monkeypatch)
    path = run.save_checkpoint()
    threading.Timer(0.2, gate.opened.set).start()
    made = DiffusionPolicyWorkspace.create_from_checkpoint(path, output_dir=tmp_path / "made")
    assert same_tensors(made.model, run.model)


def test_an_interrupt_while_waiting_forgets_no_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = workspace(tmp_path)
    gate = Gate(monkeypatch, NoSpace("the disk is full"))
    run.save_checkpoint()
    thread: Any = run.saver._thread
    with monkeypatch.context() as patch:
        patch.setattr(thread, "join", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run.saver.join()
    gate.opened.set()
    with pytest.raises(NoSpace):
        run.saver.join()


def test_a_state_in_the_middle_of_a_step_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = workspace(tmp_path)
    run.run(until_step=4)
    with monkeypatch.context() as patch:
        patch.setattr(run.ema, "step", lambda model: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run.run(until_step=6)
    for call in (run.save_checkpoint, run.run):
        with pytest.raises(InvalidInput, match="interrupted within step 4"):
            call()
    run.load_checkpoint()
    run.run(until_step=6)
    whole = workspace(tmp_path, "whole")
    whole.run(until_step=6)
    assert same_tensors(whole.model, run.model)


@pytest.mark.parametrize("next_call", ["save", "load", "run"])
def test_a_failure_of_the_thread_is_raised_by_whatever_comes_next(
    next_call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = workspace(tmp_path)
    run.save_checkpoint(use_thread=False)
    with monkeypatch.context() as patch:
        Gate(patch, NoSpace("the disk is full")).opened.set()
        run.save_checkpoint(tmp_path / "lost.ckpt")
        calls = {"save": run.save_checkpoint, "load": run.load_checkpoint, "run": run.run}
        with pytest.raises(NoSpace, match="the disk is full"):
            calls[next_call]()
    assert not (tmp_path / "lost.ckpt").exists()
    run.load_checkpoint()


def test_a_disk_that_is_full_is_told_by_what_comes_next_and_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    """In a process of its own, which may write no file larger than half a checkpoint."""
    script = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from registry.core.errors import NoSpace\n"
        "from tests.pdp.runs import workspace\n"
        "run = workspace(Path(sys.argv[1]))\n"
        "good = Path(run.save_checkpoint(use_thread=False))\n"
        "before = good.read_bytes()\n"
        "half = len(before) // 2\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (half, half))\n"
        "run.save_checkpoint()\n"
        "try:\n"
        "    run.save_checkpoint()\n"
        "except NoSpace as error:\n"
        "    print(error)\n"
        "print(good.read_bytes() == before, [path.name for path in good.parent.iterdir()])\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    said, after = done.stdout.splitlines()
    assert "latest.ckpt" in said
    assert "nothing was left behind" in said
    assert after == "True ['latest.ckpt']"


def test_a_failure_at_the_end_of_the_process_is_shown_and_sets_its_status(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tests.pdp.runs import workspace\n"
        "folder = Path(sys.argv[1])\n"
        "run = workspace(folder)\n"
        "(folder / 'file').write_text('no folder')\n"
        "run.save_checkpoint(folder / sys.argv[2] / 'a.ckpt')\n"
        "print('done')\n"
    )

    command = [sys.executable, "-c", script, str(tmp_path), "file"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout) == (1, "done\n")
    assert "the last checkpoint could not be saved" in done.stderr
    assert "StorageError" in done.stderr


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"trainig": {"seed": 1}}, "unknown key trainig in the configuration; did you mean training"),
        ({"training__sed": 1}, r"unknown key training\.sed in the configuration; did you mean seed"),
        ({"policy__lora__lora_rank": 8}, r"policy\.lora\.lora_rank.*did you mean"),
        ({"policy__model__emb_dm": 8}, r"no argument emb_dm; did you mean emb_dim"),
        (
            {"policy__noise_scheduler__prediction_typ": "sample"},
            "no argument prediction_typ; did you mean prediction_type",
        ),
        ({"policy__model___target_": "os.system"}, "os.system, and classes are looked up, never imported"),
        ({"policy__noise_scheduler___target_": "subprocess.Popen"}, "looked up, never imported"),
        ({"training__device": "cuda:0"}, "no CUDA device"),
        ({"training__device": "gpu"}, "expected cpu, cuda"),
        ({"training__num_epochs": "many"}, "training.num_epochs"),
        ({"training__lr_scheduler": "cosin"}, "expected one of linear, cosine"),
        ({"optimizer__lr": -1.0}, "expected a positive number"),
        ({"dataloader__batch_size": 0}, "expected 1 or more"),
        ({"dataset__path": "nowhere.zarr"}, "no such data set"),
        ({"dataloader": {"batch_size": 1000, "drop_last": True}}, "there is no batch"),
    ],
)
def test_a_configuration_that_is_wrong_is_answered_by_its_key(
    changed: dict[str, Any], named: str, tmp_path: Path
) -> None:
    if "cuda" in str(changed) and torch.cuda.is_available():
        changed = {"training__device": "mps"}
        named = "expected cpu or cuda"
    with pytest.raises((ConfigError, SourceNotFound), match=named):
        workspace(tmp_path, **changed).run()
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_data_of_other_sizes_are_refused_with_both(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"obs_dim: the data set .* has 11, policy.model 12"):
        workspace(tmp_path, policy__model__obs_dim=12).run()
    with pytest.raises(ConfigError, match=r"action_dim \(output_dim\): the data set .* has 3, policy.model 5"):
        workspace(tmp_path, policy__model__output_dim=5, policy__model__input_dim=5).run()


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = workspace(tmp_path)
    run.run(until_step=8)
    good = Path(run.get_checkpoint_path()).read_bytes()
    real = DiffusionPolicy.compute_loss

    def spoiled(self: DiffusionPolicy, batch: Any) -> torch.Tensor:
        return real(self, batch) * (float("nan") if run.global_step == 11 else 1.0)

    monkeypatch.setattr(DiffusionPolicy, "compute_loss", spoiled)
    with pytest.raises(
        TrainingDiverged, match=r"the loss is nan at step 11 \(epoch 1\).*last good checkpoint is .*latest.ckpt"
    ):
        run.run()
    assert Path(run.get_checkpoint_path()).read_bytes() == good
    assert all(bool(one.isfinite().all()) for one in run.model.parameters())
    assert lines(run)[-1]["global_step"] == 11
    other = workspace(tmp_path, "other", optimizer__lr=1e30, training__max_grad_norm=None, training__lr_warmup_steps=0)
    with pytest.raises(TrainingDiverged, match="no checkpoint was saved before") as error:
        other.run()
    assert error.value.step < 8
    assert not (tmp_path / "other" / "checkpoints").exists()


def test_weights_that_are_not_finite_replace_no_good_checkpoint(tmp_path: Path) -> None:
    run = workspace(tmp_path)
    path = Path(run.save_checkpoint(use_thread=False))
    good = path.read_bytes()
    with torch.no_grad():
        next(run.model.parameters()).fill_(float("inf"))
    with pytest.raises(TrainingDiverged, match="has values that are not finite"):
        run.save_checkpoint()
    run.saver.join()
    assert path.read_bytes() == good


def test_a_torn_checkpoint_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    run = workspace(tmp_path)
    path = Path(run.save_checkpoint(use_thread=False))
    whole = path.read_bytes()
    other = workspace(tmp_path, training__seed=7)
    before = {name: one.clone() for name, one in other.model.state_dict().items()}
    for size in (0, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(InvalidInput, match=r"latest\.ckpt"):
            other.load_checkpoint()
    assert not differing(dict(other.model.state_dict()), before)


@pytest.mark.parametrize("strict", [True, False])
def test_a_checkpoint_of_another_network_is_refused_by_the_argument(strict: bool, tmp_path: Path) -> None:
    path = workspace(tmp_path, "other", policy__model__n_head=2).save_checkpoint(use_thread=False)
    with pytest.raises(Incompatible, match="n_head"):
        workspace(tmp_path).load_checkpoint(path, strict=strict)


def test_a_normaliser_is_fitted_on_the_training_episodes_alone(tmp_path: Path) -> None:
    run = workspace(tmp_path)
    run.run(until_step=1)
    data = SequenceDataset(tmp_path / "data.zarr", 2, 4, val_ratio=0.2)
    stats: Any = run.policy.normalizer.params_dict["obs"]
    assert torch.equal(stats["input_stats"]["max"], data.tensors()["obs"].amax(dim=0))
