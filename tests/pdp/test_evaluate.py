"""`pdp.evaluate`: a version is rolled out in worlds of a task, and what came of it is noted with the version."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from pdp.errors import ActionNotFinite, ConfigError, TaskNotFound, WorldNotFound
from pdp.evaluate import command, evaluate
from pdp.simulation import find_task, known_tasks, load_task
from registry import Registry
from registry.core.errors import Incompatible, InvalidInput, NotFound
from tests.pdp.datasets import write_synthetic
from tests.pdp.fake_task import SCALES, TASK
from tests.pdp.models import SIZES
from tests.pdp.runs import workspace

MODULE = "tests.pdp.fake_task"


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a registry with a policy and an adapter on it, trained on data of the world `weak`."""
    folder = tmp_path_factory.mktemp("evaluated")
    Registry.init(folder / "registry").close()
    sizes = {"obs_dim": SIZES["obs_dim"], "action_dim": SIZES["input_dim"]}
    write_synthetic(folder / "plain.zarr", episodes=4, steps=20, recipe={"task": "points", "world": "plain"}, **sizes)
    write_synthetic(folder / "weak.zarr", episodes=4, steps=20, recipe={"task": "points", "world": "weak"}, **sizes)
    common = {"policy__model": SIZES, "registry": folder / "registry", "training__max_steps": 3}
    base = workspace(
        folder,
        "base",
        dataset__path=str(folder / "plain.zarr"),
        registry__push_policy="registry://points/base:v1",
        **common,
    )
    base.run()
    adapter = {"lora_r": 4, "lora_alpha": 8, "target_modules": ["mlp"], "base_model_path": "registry://points/base:v1"}
    lora = workspace(
        folder,
        "lora",
        dataset__path=str(folder / "weak.zarr"),
        registry__push_adapter="registry://points/weak:prod",
        policy__lora=adapter,
        **{**common, "policy__model": None, "policy__noise_scheduler": None},
    )
    lora.run()
    return folder / "registry"


def test_a_push_says_of_which_task_and_world_the_data_were(pushed: Path) -> None:
    with Registry.open(pushed) as registry:
        found = {name: registry.get(f"points/{name}").metadata for name in ("base", "weak")}
    assert {(one["task"], one["world"]) for one in found.values()} == {("points", "plain"), ("points", "weak")}


def test_what_came_of_it_is_noted_and_found(pushed: Path) -> None:
    found = evaluate("registry://points/weak:prod", ["weak", "strong"], task=TASK, rollouts=7, registry=pushed)
    assert (found.reference, found.task, found.steps, found.execute) == ("points/weak@1", "points", 6, 2)
    with Registry.open(pushed) as registry:
        metrics = registry.get("points/weak:prod").metrics
        assert {key: metrics[key] for key in found.metrics} == found.metrics
        assert metrics["speed"] == metrics["weak/speed"] != metrics["strong/speed"]
        assert metrics["weak/speed_ci95"] > 0
        assert (metrics["weak/rollouts"], metrics["weak/episode_steps"]) == (7, 6)
        speed = metrics["speed"]
        asked = f"metric.weak/speed >= {speed - 1e-6}"
        assert [one.reference for one in registry.find(asked, "name ~ points/*")] == ["points/weak@1"]


def test_a_world_that_the_data_were_not_of_gets_no_plain_metric(pushed: Path) -> None:
    found = evaluate("registry://points/base:v1", ["strong"], task=TASK, rollouts=2, registry=pushed, push=False)
    assert set(found.metrics) == {
        "strong/rollouts",
        "strong/episode_steps",
        *(f"strong/{name}{rest}" for name in ("speed", "success") for rest in ("", "_ci95")),
    }
    with Registry.open(pushed) as registry:
        assert "strong/speed" not in registry.get("points/base:v1").metrics


def test_without_a_world_it_is_the_one_of_the_data(pushed: Path) -> None:
    assert list(evaluate("registry://points/weak", task=TASK, rollouts=2, registry=pushed, push=False).worlds) == [
        "weak"
    ]


def test_one_roll_out_has_no_interval_and_none_is_left_of_an_earlier_time(pushed: Path) -> None:
    evaluate("registry://points/base:v1", ["weak"], task=TASK, rollouts=3, registry=pushed)
    found = evaluate("registry://points/base:v1", ["weak"], task=TASK, rollouts=1, registry=pushed)
    assert math.isnan(found.worlds["weak"]["speed"][1])
    with Registry.open(pushed) as registry:
        metrics = registry.get("points/base:v1").metrics
    assert math.isnan(metrics["weak/speed_ci95"])
    assert metrics["weak/rollouts"] == 1


@pytest.mark.parametrize("changed", [{"steps": 4}, {"execute": 1}])
def test_what_is_not_done_as_the_task_has_it_gets_no_plain_metric(pushed: Path, changed: dict[str, int]) -> None:
    found = evaluate("registry://points/weak", task=TASK, rollouts=2, registry=pushed, push=False, **changed)
    assert "weak/speed" in found.metrics
    assert "speed" not in found.metrics


def test_another_task_with_a_world_of_that_name_gets_no_plain_metric(pushed: Path) -> None:
    class Other(type(TASK)):  # type: ignore[misc]  # the class of a value
        name = "other"

    found = evaluate("registry://points/weak", ["weak"], task=Other(), rollouts=2, registry=pushed, push=False)
    assert "speed" not in found.metrics


def test_a_base_is_for_what_does_not_know_its_own(pushed: Path) -> None:
    options: dict[str, Any] = {"task": TASK, "rollouts": 2, "registry": pushed, "base": "registry://points/base:v1"}
    with pytest.raises(ConfigError, match=r"points/weak@1 has its base, points/base@1; leave the base out"):
        evaluate("registry://points/weak", **options)
    with pytest.raises(ConfigError, match="points/base@1 holds a whole network"):
        evaluate("registry://points/base", **options)


def test_an_adapter_in_a_file_acts_on_the_base_that_is_given(pushed: Path, tmp_path: Path) -> None:
    with Registry.open(pushed) as registry:
        registry.pull("points/weak:prod", tmp_path / "weak.pth", format="pth")
        options: dict[str, Any] = {"task": TASK, "rollouts": 4, "registry": registry}
        there = evaluate("registry://points/weak:prod", **options, push=False)
        here = evaluate(tmp_path / "weak.pth", ["weak"], **options, base="registry://points/base:v1")
    assert here.reference is None
    assert here.worlds["weak"]["speed"] == there.worlds["weak"]["speed"]


def test_fused_it_does_the_same_but_for_rounding(pushed: Path) -> None:
    options: dict[str, Any] = {"task": TASK, "rollouts": 4, "registry": pushed, "push": False}
    plain, fused = (evaluate("registry://points/weak", **options, fused=fused) for fused in (False, True))
    assert fused.worlds["weak"]["speed"][0] == pytest.approx(plain.worlds["weak"]["speed"][0], abs=1e-4)


def test_the_same_seed_gives_the_same_numbers(pushed: Path) -> None:
    options: dict[str, Any] = {"task": TASK, "rollouts": 3, "registry": pushed, "push": False}
    first, again, other = (evaluate("registry://points/weak", **options, seed=seed).metrics for seed in (1, 1, 2))
    assert first == again != other


def test_a_world_that_is_not_there_is_refused_with_the_near_ones(pushed: Path) -> None:
    with pytest.raises(WorldNotFound, match=r"points has no world 'week'; did you mean weak\?"):
        evaluate("registry://points/weak", ["week"], task=TASK, registry=pushed)
    with pytest.raises(WorldNotFound, match=f"there are {', '.join(SCALES)}"):
        evaluate("registry://points/weak", ["x"], task=TASK, registry=pushed)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"rollouts": 0}, ConfigError, "rollouts is 0"),
        ({"execute": 99}, InvalidInput, "T_action"),
        ({"steps": 0}, InvalidInput, "steps is 0"),
    ],
)
def test_numbers_out_of_range_are_refused(
    pushed: Path, options: dict[str, int], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        evaluate("registry://points/weak", ["weak"], task=TASK, registry=pushed, **options)


def test_a_policy_of_another_task_is_refused(pushed: Path) -> None:
    class Wider(type(TASK)):  # type: ignore[misc]  # the class of a value
        def simulation(self, worlds: Any) -> Any:
            found = super().simulation(worlds)
            found.obs_dim = 99
            return found

    with pytest.raises(Incompatible, match="obs_dim: the simulation has 99, the policy"):
        evaluate("registry://points/weak", ["weak"], task=Wider(), registry=pushed)


def test_an_action_that_is_not_finite_stops_it_and_nothing_is_noted(pushed: Path, tmp_path: Path) -> None:
    with Registry.open(pushed) as registry:
        path = registry.pull("points/base:v1", tmp_path / "base.ckpt").path
        tree = torch.load(path, weights_only=True)
        name = next(one for one in tree["state_dicts"]["model"] if one.endswith("weight"))
        tree["state_dicts"]["model"][name].view(-1)[0] = math.nan
        torch.save(tree, tmp_path / "nan.ckpt")
        registry.push(tmp_path / "nan.ckpt", "points/nan", metadata={"task": "points", "world": "weak"})
        before = registry.get("points/nan").metrics
        with pytest.raises(ActionNotFinite, match="not finite at control step 1 of 6, in 3 of 3 environments") as stop:
            evaluate("registry://points/nan", task=TASK, rollouts=3, registry=pushed)
        assert (stop.value.step, stop.value.environment) == (1, 0)
        assert registry.get("points/nan").metrics == before


@pytest.mark.parametrize(
    "text",
    [
        "raise ValueError('boom')",
        "x = ",
        "TASK = 3",
        "class TASK:\n    name = steps = execute = worlds = simulation = 1",
    ],
)
def test_a_module_with_a_mistake_is_one_refusal(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mistaken_task.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mistaken_task", raising=False)
    with pytest.raises(TaskNotFound, match="mistaken_task"):
        load_task("mistaken_task")


class TestTasks:
    def test_are_named_by_the_environment_or_by_the_projects_file(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.delenv("PDP_TASKS", raising=False)
        assert known_tasks(tmp_path) == []
        (tmp_path / "pyproject.toml").write_text(f'[tool.pdp]\ntasks = ["{MODULE}"]\n')
        assert known_tasks(tmp_path) == [MODULE]
        monkeypatch.setenv("PDP_TASKS", "a.b, c")
        assert known_tasks(tmp_path) == ["a.b", "c"]

    def test_one_that_cannot_be_imported_is_in_nobodys_way_and_named(self) -> None:
        assert find_task("points", ["no.such.module", MODULE]) is TASK
        with pytest.raises(TaskNotFound, match=r"no\.such\.module.* cannot be imported"):
            find_task("other", ["no.such.module", MODULE])

    @pytest.mark.parametrize(
        "text", ["[tool]\npdp = 3\n", "tool = 3\n", "[tool.pdp]\ntasks = 3\n", "[tool.pdp]\ntasks = [3]\n", "[tool"]
    )
    def test_of_a_broken_file_are_refused(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str) -> None:
        monkeypatch.delenv("PDP_TASKS", raising=False)
        (tmp_path / "pyproject.toml").write_text(text)
        with pytest.raises(ConfigError, match=r"pyproject\.toml"):
            known_tasks(tmp_path)

    def test_that_a_version_names_are_looked_up_and_never_imported(self) -> None:
        assert find_task("points", [MODULE]) is TASK
        with pytest.raises(TaskNotFound, match=r"of the task 'os'.*There are points \(tests.pdp.fake_task\)"):
            find_task("os", [MODULE])

    def test_are_chosen_by_the_user_where_nothing_says_which(self) -> None:
        assert find_task(None, [MODULE]) is TASK
        with pytest.raises(TaskNotFound, match="records no task"):
            find_task(None, [MODULE, "examples.arm.task"])
        with pytest.raises(TaskNotFound, match="give --task MODULE"):
            find_task("points", [])

    @pytest.mark.parametrize("name", ["no.such.module", "", ".", "json", "tests.pdp.models"])
    def test_that_are_none_are_refused(self, name: str) -> None:
        with pytest.raises(TaskNotFound):
            load_task(name)


class TestCommand:
    def run(self, pushed: Path, *words: str) -> Any:
        return CliRunner().invoke(command, ["--registry", str(pushed), *words])

    def test_prints_what_came_of_it_and_notes_it(self, pushed: Path) -> None:
        done = self.run(pushed, "registry://points/weak:prod", "--task", MODULE, "--rollouts", "3")
        assert done.exit_code == 0, done.output
        assert "points/weak@1: 3 roll-outs of 6 steps" in done.output
        assert "weak " in done.output
        assert "noted 10 metrics with points/weak@1" in done.output

    def test_gives_one_document_with_json(self, pushed: Path) -> None:
        words = ("registry://points/weak:prod", "--task", MODULE, "--rollouts", "2", "--json", "--no-push")
        found = json.loads(self.run(pushed, *words).stdout)
        assert found["worlds"]["weak"]["speed"][0] == found["metrics"]["speed"]

    @pytest.mark.parametrize(
        ("words", "error"),
        [
            (("registry://points/none", "--task", MODULE), NotFound),
            (("registry://points/weak", "--world", "wea", "--task", MODULE), WorldNotFound),
            (("registry://points/weak", "--task", "no.module"), TaskNotFound),
            (("nowhere.ckpt", "--task", MODULE, "--world", "weak"), NotFound),
        ],
    )
    def test_ends_with_the_code_of_the_error(self, pushed: Path, words: tuple[str, ...], error: Any) -> None:
        done = self.run(pushed, *words)
        assert done.exit_code == error.exit_code
        assert done.stderr.startswith("pdp.evaluate: ")
