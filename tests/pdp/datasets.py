"""Small data sets that something can be learned from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy

from pdp.data import write_dataset


def synthetic(
    episodes: int = 4, steps: int = 30, obs_dim: int = 11, action_dim: int = 3, seed: int = 0
) -> dict[str, Any]:
    """Smooth observations, and actions that are a fixed linear function of the last two of them, with a little
    noise."""
    draw = numpy.random.default_rng(seed)
    now, before = draw.normal(size=(2, obs_dim, action_dim)) / obs_dim**0.5
    obs, action = [], []
    for _ in range(episodes):
        waves = draw.uniform(0.05, 0.5, size=obs_dim) * numpy.arange(steps)[:, None] + draw.uniform(0, 6, size=obs_dim)
        seen = numpy.sin(waves)
        last = numpy.concatenate((seen[:1], seen[:-1]))
        obs.append(seen)
        action.append(seen @ now + last @ before + 0.01 * draw.normal(size=(steps, action_dim)))
    ends = numpy.arange(1, episodes + 1) * steps
    return {"obs": numpy.concatenate(obs), "action": numpy.concatenate(action), "episode_ends": ends}


def write_synthetic(path: Path, recipe: dict[str, Any] | None = None, **sizes: Any) -> Path:
    return write_dataset(path, **synthetic(**sizes), recipe={"made_by": "tests", **sizes, **(recipe or {})})
