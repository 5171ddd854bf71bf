"""The second task family: an arm whose payload, motors, damping or gravity change. It is small enough that a policy and
a LoRA are trained here, pushed and loaded back; all else is about the worlds and their demonstrations."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mujoco
import numpy
import pytest

from examples.arm.demonstrations import Expert, Recipe, demonstrate, write
from examples.arm.model import JOINTS, ORIGINAL, PAYLOAD, WORLDS, World, world_model
from examples.arm.simulation import MIDDLE, ArmSimulation, Tips
from examples.arm.task import TASK
from pdp.data import SequenceDataset
from pdp.errors import WorldNotFound
from pdp.policy import DiffusionPolicy
from pdp.rollout import mean_and_interval, roll_out
from pdp.simulation import load_task
from pdp.workspace import DiffusionPolicyWorkspace
from registry import Registry

ROOT = Path(__file__).parents[2]
SEED = 0
"""Of data and training. For 0 to 4 the tip errors are 0.7 to 0.8 cm of the base at home, 4.5 to 5.3 of the base with
the payload, and 0.8 to 1.1 of the LoRA with it."""
NETWORK = {
    **{"obs_dim": ArmSimulation.obs_dim, "input_dim": JOINTS, "output_dim": JOINTS, "emb_dim": 32, "T_obs": 2},
    **{"T_action": 4, "n_encoder_layers": 1, "n_decoder_layers": 1, "n_head": 4, "obs_type": "ref"},
    **{"p_drop_emb": 0.0, "p_drop_attn": 0.0},
}
NOISE = {"num_train_timesteps": 10, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"}
LORA = {
    **{"lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.0},
    "target_modules": ["mlp", "q_proj", "k_proj", "v_proj", "out_proj"],
}


def train(folder: Path, registry: Registry, recipe: Recipe, policy: Any, steps: int, lr: float, push: Any) -> list[str]:
    """Trains on the data of a recipe. Returns what was pushed."""
    cfg = {
        "policy": policy,
        "dataset": {"path": str(write(folder / f"{recipe.world}.h5", recipe))},
        "dataloader": {"batch_size": 128},
        "optimizer": {"lr": lr},
        "training": {"seed": SEED, "max_steps": steps, "lr_warmup_steps": 20, "save_checkpoint_every": 0},
        "registry": push,
        "logging": {"progress": False},
    }
    workspace = DiffusionPolicyWorkspace(cfg, folder / f"run-{recipe.world}", registry=registry)
    workspace.run()
    return workspace.pushed


@dataclass
class Trained:
    """Policies as they came back out of the registry: of the original world, and with a LoRA for the payload."""

    registry: Registry
    pushed: list[str]
    base: DiffusionPolicy
    payload: DiffusionPolicy

    def tip_errors(self, policy: DiffusionPolicy, world: str, steps: int = 100) -> Any:
        """(20,), in cm, of roll-outs of so many control steps."""
        found = roll_out(policy, ArmSimulation([world] * 20), steps=steps, execute=TASK.execute, seed=7)
        return found.measures["tip_error_cm"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    folder = tmp_path_factory.mktemp("arm")
    with Registry.init(folder / "registry") as registry:
        data = {"steps": 60, "noise": 0.2, "push": 0.2, "seed": SEED}
        pushed = train(
            *(folder, registry, Recipe(ORIGINAL, 150, **data), {"model": NETWORK, "noise_scheduler": NOISE}, 700, 5e-3),
            {"push_policy": "registry://arm/base:v1"},
        )
        pushed += train(
            *(
                folder,
                registry,
                Recipe("payload", 60, **data),
                {"lora": {**LORA, "base_model_path": "registry://arm/base"}},
            ),
            *(250, 1e-2, {"push_adapter": "registry://arm/payload:prod"}),
        )
        base = DiffusionPolicy.from_checkpoint("registry://arm/base:v1", registry=registry)
        payload = DiffusionPolicy.from_checkpoint("registry://arm/payload:prod", registry=registry)
        yield Trained(registry, pushed, base, payload)


# ---------------------------------------------------------------- a base, and a LoRA for another world


def test_the_base_follows_its_reference_in_its_own_world(trained: Trained) -> None:
    assert trained.tip_errors(trained.base, ORIGINAL).mean() < 2.0


def test_with_a_payload_the_lora_follows_it_and_the_base_does_not(trained: Trained) -> None:
    base, with_lora = (trained.tip_errors(one, "payload") for one in (trained.base, trained.payload))
    assert base.mean() > 3.0
    assert with_lora.mean() < 2.0
    (mean, interval) = mean_and_interval(base - with_lora)
    assert mean - interval > 1.5, "over starts and sampling noise"


def test_what_was_pushed_is_the_adapter_alone_on_the_base(trained: Trained) -> None:
    assert trained.pushed == ["registry://arm/base@1", "registry://arm/payload@1"]
    version = trained.registry.get("arm/payload:prod")
    assert (version.kind, version.base, version.r) == ("adapter", "arm/base@1", 8)


def test_a_rollout_of_what_was_loaded_has_the_same_bits_each_time(trained: Trained) -> None:
    again = DiffusionPolicy.from_checkpoint("registry://arm/payload:prod", registry=trained.registry)
    errors = [trained.tip_errors(one, "payload", steps=20) for one in (trained.payload, again)]
    assert numpy.array_equal(*errors)


# ---------------------------------------------------------------- worlds


def test_the_worlds_differ_in_what_they_say_and_in_nothing_else() -> None:
    models = {name: world_model(world) for name, world in WORLDS.items()}
    first = models[ORIGINAL]
    tip = first.body(PAYLOAD).id
    others = numpy.arange(first.nbody) != tip
    found = {
        name: {
            "payload": model.body_mass[tip],
            "gear": numpy.unique((model.actuator_gear[:, 0] / first.actuator_gear[:, 0]).round(9)),
            "damping": numpy.unique((model.dof_damping / first.dof_damping).round(9)),
            "gravity": model.opt.gravity[2] / first.opt.gravity[2],
        }
        for name, model in models.items()
    }
    same = {"payload": 0.3, "gear": 1.0, "damping": 1.0, "gravity": 1.0}
    changes = {"payload": 2.5, "gear": 0.7, "damping": 6.0, "gravity": 0.3}
    assert set(WORLDS) == {ORIGINAL, *changes}
    assert found[ORIGINAL] == pytest.approx(same)
    for name, change in changes.items():
        assert found[name] == pytest.approx({**same, name: change}), name
        assert numpy.array_equal(models[name].body_mass[others], first.body_mass[others])
    assert models["payload"].body_inertia[tip] == pytest.approx(first.body_inertia[tip] * 2.5 / 0.3)


def test_what_mujoco_derives_from_the_masses_is_that_of_the_world() -> None:
    light, heavy = world_model(World()), world_model(WORLDS["payload"])
    assert heavy.body_subtreemass[0] == pytest.approx(light.body_subtreemass[0] + 2.2)
    assert not numpy.allclose(heavy.dof_M0, light.dof_M0)


def test_environments_of_several_worlds_do_as_each_world_alone() -> None:
    worlds = [*WORLDS]
    given = numpy.random.default_rng(0).uniform(-0.3, 0.3, (20, len(worlds), JOINTS))

    def episode(names: list[str], actions: Any) -> tuple[Any, Any]:
        simulation = ArmSimulation(names)
        seen = [simulation.reset(3), *(simulation.step(action) for action in actions)]
        return numpy.stack(seen), simulation.measures()["tip_error_cm"]

    together, errors = episode(worlds, given)
    for row, world in enumerate(worlds):
        alone, its_errors = episode([world], given[:, row : row + 1])
        assert numpy.array_equal(alone[:, 0], together[:, row]), world
        assert its_errors[0] == errors[row]
    assert len(set(errors.tolist())) == len(worlds)


def test_start_and_reference_depend_on_the_seed_and_the_place_in_the_world_alone() -> None:
    few, many = ArmSimulation([ORIGINAL] * 2), ArmSimulation(["payload", "gear", "payload", "gear"])
    first = few.reset(5)
    same = [0, 0, 1, 1]
    assert numpy.array_equal(first[same], many.reset(5))
    for _ in range(3):
        few.step(numpy.zeros((2, JOINTS)))
        many.step(numpy.ones((4, JOINTS)))
    for mine, others in zip(few.wanted(), many.wanted(), strict=True):
        assert numpy.array_equal(mine[same], others)
    assert numpy.array_equal(few.reset(5), first)
    assert few.measures()["tip_error_cm"].tolist() == [0.0, 0.0]
    assert not numpy.isclose(first[0, :JOINTS], first[1, :JOINTS]).any()
    assert not numpy.isclose(few.reset(6)[:, :JOINTS], first[:, :JOINTS]).any()


def test_an_observation_is_where_the_arm_is_and_what_it_lacks_of_the_reference() -> None:
    simulation = ArmSimulation([ORIGINAL] * 3)
    simulation.reset(1)
    obs = simulation.step(numpy.zeros((3, JOINTS)))
    assert obs.shape == (3, simulation.obs_dim)
    here, speed, behind, slower, acceleration = numpy.split(obs, 5, axis=1)
    position, velocity, wanted = simulation.reference.at(0.02)
    assert numpy.allclose(here + behind, position)
    assert numpy.allclose(speed + slower, velocity)
    assert numpy.array_equal(acceleration, wanted)


def test_velocity_and_acceleration_are_the_derivatives_of_the_reference() -> None:
    simulation = ArmSimulation([ORIGINAL] * 3)
    simulation.reset(1)
    at, small = simulation.reference.at, 1e-5
    _, velocity, acceleration = at(1.3)
    assert numpy.allclose((at(1.3 + small)[0] - at(1.3 - small)[0]) / (2 * small), velocity, atol=1e-8)
    assert numpy.allclose((at(1.3 + small)[1] - at(1.3 - small)[1]) / (2 * small), acceleration, atol=1e-8)


def test_the_tip_error_is_the_mean_distance_in_centimetres_and_three_of_them_are_no_success() -> None:
    simulation = ArmSimulation([ORIGINAL] * 2)
    simulation.reset(0)
    tips, apart = Tips(), []
    for _ in range(30):
        simulation.step(numpy.zeros((2, JOINTS)))
        apart.append(tips.of(simulation.batch.qpos) - tips.of(simulation.wanted()[0]))
    measures = simulation.measures()
    assert measures["tip_error_cm"] == pytest.approx(100 * numpy.linalg.norm(apart, axis=2).mean(axis=0))
    assert (measures["tip_error_cm"] > 3).all(), "without torque it falls"
    assert measures["success"].tolist() == [0.0, 0.0]


def test_the_tip_is_where_plain_mujoco_has_the_payload() -> None:
    model = world_model(WORLDS["payload"])
    data = mujoco.MjData(model)
    data.qpos[:] = MIDDLE
    mujoco.mj_forward(model, data)
    assert numpy.array_equal(Tips().of(numpy.array([MIDDLE]))[0], data.body(PAYLOAD).xpos)


def test_the_task_is_found_by_its_module_and_refuses_a_world_that_is_not_there() -> None:
    task = load_task("examples.arm.task")
    assert (task.name, set(task.worlds)) == ("arm", set(WORLDS))
    assert task.simulation(["gear", "payload"]).worlds == ("gear", "payload")
    with pytest.raises(WorldNotFound, match="did you mean gravity"):
        task.simulation(["gear", "gravty"])


# ---------------------------------------------------------------- the expert and its demonstrations


@pytest.mark.parametrize("world", WORLDS)
def test_the_expert_follows_the_reference_in_every_world(world: str) -> None:
    simulation, expert = ArmSimulation([world] * 10), Expert(world)
    simulation.reset(2)
    largest = 0.0
    for _ in range(100):
        action = expert.act(simulation)
        largest = max(largest, float(numpy.abs(action).max()))
        simulation.step(action)
    measures = simulation.measures()
    assert (measures["tip_error_cm"] < 1.0).all()
    assert measures["success"].all()
    assert 0.1 < largest < 1.0, "its motors are neither idle nor at their end"


def test_an_expert_of_another_world_does_worse() -> None:
    def error(world: str) -> float:
        simulation, expert = ArmSimulation(["payload"] * 10), Expert(world)
        simulation.reset(2)
        for _ in range(100):
            simulation.step(expert.act(simulation))
        return float(simulation.measures()["tip_error_cm"].mean())

    assert error(ORIGINAL) > 5 * error("payload")


def test_data_have_the_same_bits_for_the_same_seed_and_others_for_another(tmp_path: Path) -> None:
    recipe = Recipe("gear", episodes=3, steps=20, noise=0.2, push=0.2, seed=1)
    first, again = demonstrate(recipe), demonstrate(recipe)
    assert all(numpy.array_equal(first[name], again[name]) for name in first)
    paths = [write(tmp_path / name, recipe) for name in ("a.h5", "b.h5")]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    others = [Recipe("gear", 3, 20, 0.2, 0.2, seed=2), Recipe("damping", 3, 20, 0.2, 0.2, seed=1)]
    for other in map(demonstrate, others):
        assert not numpy.isclose(first["obs"], other["obs"]).all(axis=1).any()


def test_what_is_learned_is_the_action_without_noise() -> None:
    found = demonstrate(Recipe(ORIGINAL, episodes=2, steps=15, noise=0.2, push=0.2))
    simulation = ArmSimulation([ORIGINAL])
    simulation.reset(0)
    expert = Expert(ORIGINAL)
    here, speed, behind, slower, acceleration = numpy.split(found["obs"], 5, axis=1)

    def expected(row: int) -> Any:
        simulation.batch.qpos[0], simulation.batch.qvel[0] = here[row], speed[row]
        simulation.wanted = lambda: (here[row] + behind[row], speed[row] + slower[row], acceleration[row])
        return expert.act(simulation)[0]

    assert all(found["action"][row] == pytest.approx(expected(row)) for row in range(30))


# ---------------------------------------------------------------- the command line


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "examples.arm.demonstrations", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)


def test_the_command_line_writes_a_data_set_that_says_how_it_was_made(tmp_path: Path) -> None:
    path = tmp_path / "payload.zarr"
    done = run("payload", str(path), "--episodes", "4", "--steps", "30", "--seed", "3")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"wrote {path}\n"
    data = SequenceDataset(path, 2, 4)
    assert (data.obs_dim, data.action_dim, data.episode_count, data.window_count) == (35, 7, 4, 120)
    assert data.recipe == {
        **{"task": "arm", "world": "payload", "episodes": 4, "steps": 30, "noise": 0.2, "push": 0.2, "seed": 3},
        "recorded": {"payload": 2.5, "gear": 1.0, "damping": 1.0, "gravity": 1.0},
    }


def test_the_command_line_refuses_a_world_that_is_not_there(tmp_path: Path) -> None:
    done = run("moon", str(tmp_path / "moon.zarr"))
    assert done.returncode == 2
    assert "invalid choice: 'moon'" in done.stderr
    assert all(world in done.stderr for world in WORLDS)
    assert list(tmp_path.iterdir()) == []
