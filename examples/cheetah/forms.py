"""How much of the study is done: all of it, or the reduced form of `make demo`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from examples.cheetah.task import TASK, Cheetah
from examples.cheetah.worlds import CHANGES, PAIRS

METHODS: Mapping[str, Mapping[str, Any]] = {
    "cat": {},
    "cat-half": {"weights": (0.5, 0.5)},
    "svd": {"rank": 8},
    "ties": {"rank": 8, "density": 0.5},
    "knots": {"rank": 8, "density": 0.5},
    "tsv": {"rank": 8},
}
"""What is asked of `Registry.merge`. The plain sum has rank 16; from `svd` on the result is cut to the rank that one
parent has, so that it costs what one adapter costs. `cat`, `svd` and `tsv` add the updates up; `cat-half`, `ties` and
`knots` take a mean (the latter two of what agrees in sign), so they differ in size too."""


@dataclass(frozen=True)
class Form:
    """How much of it.

    Attributes:
        worlds: changed ones, each with an adapter of its own.
        pairs: of worlds whose adapters are merged.
        base, adapter: overrides of the configurations in `config/`.
        base_data, adapter_data: episodes, and steps of each.
        task: with episodes as long as they are here.
        curves: the world in which the way through training is measured, every so many steps.
    """

    seeds: tuple[int, ...]
    worlds: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    full: bool
    base: Sequence[str]
    adapter: Sequence[str]
    base_data: tuple[int, int]
    adapter_data: tuple[int, int]
    rollouts: int
    task: Cheetah = TASK
    methods: tuple[str, ...] = tuple(METHODS)
    curves: str | None = None
    curve_every: int = 100


FULL = Form(
    seeds=(0, 1, 2),
    worlds=tuple(CHANGES),
    pairs=PAIRS,
    full=True,
    base=(),
    adapter=(),
    base_data=(160, 300),
    adapter_data=(80, 300),
    rollouts=50,
    curves="gear",
)
REDUCED = Form(
    seeds=(0,),
    worlds=("gear", "mass"),
    pairs=(("gear", "mass"),),
    full=False,
    base=("training.max_steps=800", "optimizer.lr=2.0e-3", "dataloader.batch_size=128"),
    adapter=("training.max_steps=250", "optimizer.lr=4.0e-3", "dataloader.batch_size=128"),
    base_data=(80, 250),
    adapter_data=(40, 200),
    rollouts=50,
    task=Cheetah(steps=200),
    methods=("svd",),
)
FORMS = {"full": FULL, "reduced": REDUCED}
