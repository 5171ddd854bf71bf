"""How an update lies in the weight of its module: PEFT's factors make (out, in), and transformers' Conv1D, embeddings
and some experts store the transpose. Shapes and configuration decide; where they cannot, the caller has to say."""

from __future__ import annotations

import re

from registry.core.adapter_config import AdapterConfig
from registry.core.adapter_names import Target
from registry.core.errors import InvalidInput, ShapeMismatch
from registry.core.reference import shown
from registry.merge.low_rank import LowRank


def is_turned(
    weight: tuple[int, ...],
    shape: tuple[int, int, int],
    columns: tuple[int, ...],
    target: Target,
    config: AdapterConfig,
    turned: bool | None,
) -> bool:
    """Whether a weight is stored as the transpose of its update.

    Args:
        weight: shape of the base's.
        shape: (blocks, out, in * kernel) of the update.
        columns: (in, kernel...).
        config: of the adapter.
        turned: whether the module is transformers' Conv1D, or one of experts that says `is_transposed`; only looked at
            where the shape leaves it open. None: not known.

    Raises:
        ShapeMismatch: the update is of another weight.
        InvalidInput: square experts, of which nothing tells how they lie.
    """
    kind = target.kind.partition("+")[0]
    blocks, out, inputs = shape
    upright: tuple[int, ...] = (out, *columns)
    across: tuple[int, ...] | None = (inputs, out) if kind in ("linear", "embedding") else None
    if kind == "parameter" and (blocks > 1 or len(weight) == 3):
        upright, across = (blocks, out, inputs), (blocks, inputs, out)
    ways = [way for way, like in ((False, upright), (True, across)) if like == weight]
    if kind == "embedding":
        ways = [True] if across == weight else []
    if not ways:
        expected = " or ".join(str(list(one)) for one in dict.fromkeys((upright, across)) if one is not None)
        raise ShapeMismatch(
            f"{shown(target.module, 200)}: the adapter changes a weight of {expected}, and the base's is "
            f"{list(weight)}; it was trained on another base"
        )
    if len(ways) == 1:
        return ways[0]
    if kind == "linear":
        return config.fan_in_fan_out if turned is None else turned
    return _experts_turned(target, config, turned)


def _experts_turned(target: Target, config: AdapterConfig, is_transposed: bool | None) -> bool:
    """Of square experts, by the PEFT that wrote them: 0.17 and 0.18 have A take the first of the two dimensions, 0.19.0
    so where the module does not say `is_transposed`, and since 0.19.1 where it does."""
    version = re.match(r"(\d+)\.(\d+)\.(\d+)", config.peft_version or "")
    numbers = tuple(map(int, version.groups())) if version else None
    if numbers is not None and numbers < (0, 19, 0):
        return True
    if numbers is None or is_transposed is None:
        unknown = "which PEFT wrote it" if numbers is None else "whether the module says is_transposed"
        raise InvalidInput(
            f"{shown(target.module, 200)}: the experts are square, so no shape shows how their factors lie, and "
            f"{unknown} is not known"
        )
    return is_transposed != (numbers == (0, 19, 0))


def oriented(update: LowRank, turn: bool) -> LowRank:
    """The factors of the update as the weight is stored: b (blocks, rows, r), a (blocks, r, columns)."""
    return LowRank(update.b.mT, update.a.mT) if turn else update
