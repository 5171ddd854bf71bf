"""None of some three hundred broken pairs passes: every way to break an adapter, on every family of models, and
adapters of one family in models of another. An error must be one, and a push refuses it; where a warning is right, it
is there."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import pytest

from registry.core.errors import Incompatible
from tests.compatibility import models
from tests.compatibility.adapters import adapt, quietly, save, seed_of
from tests.compatibility.broken import Broken, broken_pairs
from tests.compatibility.conftest import Shelf
from tests.compatibility.good_pairs import MAIN

PAIRS = list(broken_pairs())
GROUP = 24
AT_LEAST = {"error": ("does not fit",), "undecided": ("does not fit", "undecided"), "warning": ("fits",)}


def groups() -> Iterator[list[Broken]]:
    """Pairs of one model, for one test each."""
    for _, pairs in groupby(PAIRS, key=lambda pair: pair.model):
        found = list(pairs)
        yield from (found[start : start + GROUP] for start in range(0, len(found), GROUP))


def test_there_are_at_least_two_hundred() -> None:
    assert len(PAIRS) >= 200
    assert len({pair.slug for pair in PAIRS}) == len(PAIRS)


@pytest.mark.parametrize("pairs", list(groups()), ids=lambda pairs: f"{pairs[0].slug} and {len(pairs) - 1} more")
def test_no_broken_pair_passes(pairs: list[Broken], shelf: Shelf) -> None:
    wrong = [f"{pair.slug}: {said}" for pair in pairs for said in _passes(pair, shelf)]
    assert not wrong, "\n".join(wrong)


def _passes(pair: Broken, shelf: Shelf) -> Iterator[str]:
    registry = shelf.registry
    base = shelf.base(pair.model)
    folder = save(
        adapt(models.fresh(pair.model), seed=seed_of(pair.slug), **(MAIN[pair.model] | dict(pair.options))),
        shelf.folder(),
    )
    name = f"broken/{pair.slug}"
    if pair.before:
        registry.push(folder, name, base=base, probe=False)
    if pair.breaks is not None:
        pair.breaks(folder)
    same_base = pair.seed is None and pair.asked is None
    if same_base and pair.says == "error":
        try:
            registry.push(folder, name, base=base, probe=False)
        except Incompatible as error:
            if not any(code in str(error) for code in pair.codes):
                yield f"push refuses it for another reason: {error}"
        else:
            yield "push takes it"
    pushed = quietly(lambda: registry.push(folder, name, base=base, probe=False, force=True))
    for how, model in _asked(pair, base, shelf).items():
        found = registry.check(pushed.reference, model)
        named = [one for one in found.findings if one.code in pair.codes and one.severity == pair.says]
        if not named or found.verdict not in AT_LEAST[pair.says]:
            yield f"{how}: {found.verdict}: {[str(one) for one in found.findings]}"


def _asked(pair: Broken, base: str, shelf: Shelf) -> dict[str, object]:
    if pair.seed is not None:

        def other() -> object:
            return models.build(models.EXAMPLES[pair.model].build, pair.seed or 0)

        return {"version": shelf.put(f"{pair.slug}-other", other), "live": other()}
    if pair.asked is not None:
        return {"version": shelf.base(pair.asked), "live": models.fresh(pair.asked)}
    return {"version": base, "live": models.fresh(pair.model)}
