"""`policy.init_from`: training that begins with a policy's weights and normaliser, which is called full fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pdp.errors import ConfigError
from pdp.workspace import DiffusionPolicyWorkspace
from registry import Registry
from registry.core.errors import Incompatible
from tests.pdp.runs import LORA, MODEL, workspace

FROM_BASE = {"policy__model": None, "policy__noise_scheduler": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a registry, a trained base `walk/base:v1`, and the checkpoint of its run, `base/checkpoints/latest.ckpt`."""
    folder = tmp_path_factory.mktemp("init-from")
    Registry.init(folder / "registry").close()
    run = workspace(folder, "base", registry=folder / "registry", registry__push_policy="registry://walk/base:v1")
    run.run()
    return folder


def begun(folder: Path, path: str, name: str = "full", **changed: Any) -> DiffusionPolicyWorkspace:
    given = {"policy__init_from": path, **FROM_BASE, **changed}
    return workspace(folder, name, registry=folder / "registry", **given)


def test_it_begins_with_the_weights_and_the_normaliser_of_a_version(folder: Path) -> None:
    run = begun(folder, "registry://walk/base:v1")
    with Registry.open(folder / "registry") as registry:
        weights = registry.load("walk/base:v1")
        normalizer = registry.load("walk/base:v1", component="normalizer")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in run.model.state_dict().items())
    live = run.policy.normalizer.state_dict()
    assert all(torch.equal(live[name], tensor) for name, tensor in normalizer.items())
    assert all(parameter.requires_grad for parameter in run.model.parameters())
    assert run.base_reference == "walk/base@1"


def test_of_a_run_it_takes_the_moving_average(folder: Path) -> None:
    run = begun(folder, str(folder / "base" / "checkpoints" / "latest.ckpt"))
    with Registry.open(folder / "registry") as registry:
        averaged = registry.load("walk/base:v1")
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in run.model.state_dict().items())


def test_what_comes_of_it_has_the_base_as_its_origin_and_stands_for_itself(folder: Path) -> None:
    run = begun(folder, "registry://walk/base:v1", registry__push="registry://walk/run")
    run.run()
    with Registry.open(folder / "registry") as registry:
        assert registry.get("walk/run").base == "walk/base@1"
    again = DiffusionPolicyWorkspace.create_from_checkpoint("registry://walk/run", registry=folder / "registry")
    assert again.cfg.policy.init_from is None
    mine, theirs = run.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"policy__model": {**MODEL, "T_action": 8}}, Incompatible, "T_action"),
        ({"policy__lora": {**LORA, "base_model_path": "registry://walk/base:v1"}}, ConfigError, "are both set"),
        (
            {"policy__noise_scheduler": {"num_train_timesteps": 10, "prediction_type": "epsilon"}},
            ConfigError,
            "prediction_type is 'epsilon', and .* was trained to predict 'sample'",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    folder: Path, changed: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        begun(folder, "registry://walk/base:v1", **changed)


def test_an_adapter_is_no_beginning(folder: Path) -> None:
    adapter = {**LORA, "base_model_path": "registry://walk/base:v1"}
    run = workspace(folder, "lora", registry=folder / "registry", policy__lora=adapter, **FROM_BASE)
    run.save_adapter("registry://walk/lora:v1")
    with pytest.raises(ConfigError, match=r"policy\.init_from: .* holds a LoRA; merge it first"):
        begun(folder, "registry://walk/lora:v1")


def test_threads_are_set_while_it_trains_and_given_back(folder: Path) -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    run = begun(folder, "registry://walk/base:v1", "threads", training__threads=before + 1, training__rollout_every=1)
    run.rollout = lambda policy: seen.append(torch.get_num_threads()) or {}  # type: ignore[func-returns-value]
    run.run()
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before
    with pytest.raises(ConfigError, match=r"training\.threads is 0"):
        begun(folder, "registry://walk/base:v1", training__threads=0)
