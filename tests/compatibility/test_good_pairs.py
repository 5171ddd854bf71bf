"""No false alarm: some two hundred real adapters are pushed with their base, and a check says that they fit. Each of
them then loads with PEFT and changes what the model computes, so that the answer was right."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import pytest
import torch

from registry.core.errors import Incompatible
from tests.compatibility import models
from tests.compatibility.adapters import load, quietly, save
from tests.compatibility.conftest import Shelf
from tests.compatibility.good_pairs import DTYPES, Pair, good_pairs

PAIRS = list(good_pairs())
GROUP = 16
PEFT_WARNS = {
    "mixtral-all-linear-fp32": "pattern keys did not match",  # PEFT writes the keys itself, for experts it cannot wrap
    "bench-grouped-fp32": "Merging is not supported",
    "bench-convolutions-fp32": "Merging is not supported",
}
"""Pairs that PEFT warns of, though they do what they were trained to."""
WARNED_OF = {"mixtral-all-linear-fp32": {"C11"}, "bench-all-linear-fp32": {"C16", "C18"}}
"""Pairs that the registry rightly warns of: keys that do nothing, a tied head, a LoRA that torch's attention never
calls."""
FOLDERS = ("bert", "mixtral", "gpt2")
"""Models that are pushed as folders as well: names of saved tensors differ from those of the live model."""


def groups() -> Iterator[list[Pair]]:
    """Pairs of one model, for one test each."""
    for _, pairs in groupby(PAIRS, key=lambda pair: pair.model):
        found = list(pairs)
        yield from (found[start : start + GROUP] for start in range(0, len(found), GROUP))


def test_there_are_at_least_two_hundred_pairs_of_all_models() -> None:
    assert len(PAIRS) >= 200
    assert {pair.model for pair in PAIRS} == models.EXAMPLES.keys()
    assert {pair.dtype for pair in PAIRS} == DTYPES.keys()


@pytest.mark.parametrize("pairs", list(groups()), ids=lambda pairs: f"{pairs[0].slug} and {len(pairs) - 1} more")
def test_a_good_pair_fits_and_loads_and_does_something(pairs: list[Pair], shelf: Shelf) -> None:
    wrong = [f"{pair.slug}: {said}" for number, pair in enumerate(pairs) for said in _alarms(pair, number, shelf)]
    assert not wrong, "\n".join(wrong)


def _alarms(pair: Pair, number: int, shelf: Shelf) -> Iterator[str]:
    dtype = DTYPES[pair.dtype]
    adapted = pair.make()
    trained = models.output(pair.model, adapted, dtype)
    folder = save(adapted, shelf.folder())
    has_folder = pair.model in FOLDERS and pair.dtype == "fp32"
    on_folder = has_folder and number % 4 == 1
    base = shelf.base(pair.model, dtype, folder=on_folder)
    registry = shelf.registry

    # Every fourth is pushed from the running model.
    source = adapted if number % 4 == 3 else folder
    try:
        pushed = quietly(lambda: registry.push(source, f"good/{pair.slug}", base=base, probe=False))
    except Incompatible as error:
        yield f"push refuses it: {error}"
        return
    asked = {"recorded": None, "version": base, "live": models.fresh(pair.model, dtype)}
    if has_folder:
        asked["other form"] = shelf.base(pair.model, dtype, folder=not on_folder)
    for how, model in asked.items():
        found = registry.check(pushed.reference, model)
        said = [one for one in found.findings if one.severity != "info"]
        if how == "other form" or (how == "live" and on_folder and pair.model == "mixtral"):
            # Of the experts' tensors, which are saved one by one and live as one, there are no digests to compare.
            said = [one for one in said if one.code != "C04" or one.severity == "error"]
        wrong = [str(one) for one in said if one.code not in WARNED_OF.get(pair.slug, ()) or one.severity != "warning"]
        if wrong or not found:
            yield f"{how}: {found.verdict}: {wrong}"
        if found.matched != found.total or not found.total:
            yield f"{how}: {found.matched} of {found.total} targets"

    plain = models.output(pair.model, models.fresh(pair.model, dtype), dtype)
    loaded = load(models.fresh(pair.model, dtype), folder)
    if loaded.model is None or not all(PEFT_WARNS.get(pair.slug, "nothing") in said for said in loaded.warnings):
        yield f"PEFT: {loaded.error or loaded.warnings}"
        return
    output = models.output(pair.model, loaded.model, dtype)
    if not torch.equal(output, trained):
        yield "PEFT gives another output than in training"
    if not (output - plain).abs().max() > 1e-3:
        yield "PEFT gives the output of the base"
