"""The cheetah is really drawn: in the colour of its policy, on ground that rises where the world has a slope. A strip
and a GIF show all runs, and the GIF stays small."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from PIL import Image

from examples.cheetah import film
from examples.cheetah.charts import LIMIT
from examples.cheetah.film import PicturesUnavailable, Run, Stage
from pdp.modules_v2 import QKVTransformerForDiffusion
from pdp.normalizer import LinearNormalizer
from pdp.policy import DiffusionPolicy


def stage_of(world: str, width: int, height: int) -> Stage:
    try:
        return Stage(world, width, height)
    except PicturesUnavailable as error:
        pytest.skip(f"THE CHEETAH IS NOT DRAWN IN THIS RUN: {error}")


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with stage_of("gear", 160, 100) as made:
        yield made


@pytest.fixture(scope="module")
def runs() -> list[Run]:
    """Of two policies that have learned nothing."""
    return [
        film.record(policy(seed), what, what, "gear", steps=12, seed=5) for seed, what in enumerate(("base", "lora"))
    ]


def policy(seed: int) -> DiffusionPolicy:
    torch.manual_seed(seed)
    sizes = {"obs_dim": 17, "input_dim": 6, "output_dim": 6, "emb_dim": 16, "T_obs": 2, "T_action": 2, "n_head": 2}
    network = QKVTransformerForDiffusion(**sizes, n_encoder_layers=1, n_decoder_layers=1)
    noise = DDIMScheduler(num_train_timesteps=4, beta_schedule="squaredcos_cap_v2", prediction_type="sample")
    made = DiffusionPolicy(network, noise, num_inference_steps=2)
    normalizer = LinearNormalizer()
    normalizer.fit({"obs": torch.randn(64, 17), "action": torch.rand(64, 6) * 2 - 1})
    made.set_normalizer(normalizer)
    return made.eval()


def test_runs_have_one_start_and_go_their_own_ways(runs: list[Run]) -> None:
    base, lora = runs
    assert base.qpos.shape == lora.qpos.shape == (13, 9)
    assert (base.qpos[0] == lora.qpos[0]).all()
    assert (base.qpos[12] != lora.qpos[12]).all()
    assert base.way(0) == 0
    assert base.way(12) == pytest.approx(base.qpos[12, 0] - base.qpos[0, 0])


def test_a_cheetah_is_drawn_in_its_colour_and_moves(stage: Stage, runs: list[Run]) -> None:
    base, lora = runs
    first, last = (numpy.asarray(stage.frame(base, step), dtype=int) for step in (0, 12))
    assert first.shape == (100, 160, 3)
    assert first.mean() > 150  # a light floor below a white sky
    assert (first != last).any(axis=2).mean() > 0.01
    orange = (first[:, :, 0] - first[:, :, 2] > 60).mean()
    blue = (lambda one: (one[:, :, 2] - one[:, :, 0] > 60).mean())(numpy.asarray(stage.frame(lora, 0), dtype=int))
    assert 0.005 < orange < 0.3
    assert blue == pytest.approx(orange, rel=0.2)  # the same posture


@pytest.mark.parametrize(("world", "rise"), [("gear", 0.0), ("slope", 0.2), ("mass-slope", 0.2)])
def test_the_ground_rises_in_the_direction_of_running_by_the_slope_of_the_world(world: str, rise: float) -> None:
    standing = Run("lora", "lora", numpy.zeros((2, 9)))
    standing.qpos[1, 0] = 3.0
    with stage_of(world, 240, 200) as drawn:
        frames = [numpy.asarray(drawn.frame(standing, step), dtype=int) for step in (0, 1)]
    sides = numpy.r_[:40, 200:240]  # the cheetah is between them, and runs to the right
    for frame in frames:
        sky = (frame.min(axis=2) < 250).argmax(axis=0)  # rows of it, from above
        assert math.atan(numpy.polyfit(sides, -sky[sides], 1)[0]) == pytest.approx(rise, abs=0.02)


def test_the_film_has_a_row_for_each_and_the_gif_a_frame_for_each_moment(
    stage: Stage, runs: list[Run], tmp_path: Path
) -> None:
    strip = film.film_strip(stage, runs, steps=12, frames=3)
    assert strip.width == 3 * 166 - 6
    assert strip.height > 2 * 100
    frames = film.gait_frames(stage, runs, steps=12, every=3)
    path = film.write_gif(frames, tmp_path / "gait.gif", 0.05)
    with Image.open(path) as gif:
        assert (gif.format, gif.n_frames, gif.info["duration"], gif.info["loop"]) == ("GIF", 5, 50, 0)
        assert gif.size == frames[0].size == (324, 126)
        shown = []
        for number in range(gif.n_frames):
            gif.seek(number)
            shown.append(numpy.asarray(gif.convert("RGB"), dtype=int))
    assert all((now != later).any() for now, later in itertools.pairwise(shown))
    assert abs(shown[2] - numpy.asarray(frames[2], dtype=int)).mean() < 8
    assert path.stat().st_size < LIMIT


def test_a_gif_that_is_too_large_gets_smaller_or_is_refused(tmp_path: Path) -> None:
    draw = numpy.random.default_rng(0)
    frames = [Image.fromarray(draw.integers(0, 255, (40, 60, 3), dtype=numpy.uint8)) for _ in range(8)]
    large = film.write_gif(frames, tmp_path / "large.gif", 0.05).stat().st_size
    small = film.write_gif(frames, tmp_path / "small.gif", 0.05, limit=large // 3)
    assert small.stat().st_size < large // 3
    with Image.open(small) as gif:
        assert gif.n_frames * gif.info["duration"] == 400  # as long as before
    with pytest.raises(ValueError, match="does not get below 100 bytes"):
        film.write_gif(frames, tmp_path / "none.gif", 0.05, limit=100)
    assert not (tmp_path / "none.gif").exists()
