"""Intervals of means over training seeds, for the tables and the pictures. With three seeds the normal quantile would
claim half of the width that Student's t has, so these are t intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

# t_{0.975} by degrees of freedom, from 1 to 30.
QUANTILES = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip
NORMAL = 1.96


def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t; beyond 30 degrees of freedom the normal's, which is at most 4 % less."""
    if freedom < 1:
        raise ValueError(f"{freedom} degrees of freedom; expected 1 or more")
    return QUANTILES[freedom - 1] if freedom <= len(QUANTILES) else NORMAL


def seed_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval over training seeds: t_{0.975, n-1} s / sqrt(n).

    Args:
        values: one for each seed.

    Returns:
        The half is nan for one seed, which says nothing of the others, and both are nan for none.
    """
    count = len(values)
    if count == 0:
        return math.nan, math.nan
    mean = math.fsum(values) / count
    if count == 1:
        return mean, math.nan
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    return mean, t_quantile(count - 1) * deviation / math.sqrt(count)
