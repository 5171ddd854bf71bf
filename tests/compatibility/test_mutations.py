"""Good pairs are changed at random, and the verdict is held against what happens: the installed PEFT loads the result,
and the model runs. A wrong "fits" and a wrong "does not fit" both end the test, with the changes that led there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from registry import Registry
from registry.compat.compatibility import Compatibility
from registry.core.errors import InvalidInput
from tests.compatibility import models
from tests.compatibility.adapters import CONFIG, load, quietly, read_config, save, tensors_of, told, write_tensors
from tests.compatibility.conftest import Shelf
from tests.compatibility.good_pairs import Pair, good_pairs
from tests.compatibility.mutations import MUTATIONS, SCALING_KEYS, Config, Tensors

STARTS = (
    *("towers-plain-fp32", "towers-both-patterns-dora-fp32", "bert-four-lists-fp32", "bert-embedding-and-linear-fp32"),
    *(
        "classifier-plain-fp32",
        "gpt2-plain-fp32",
        "llama-seven-fp32",
        "llama-saved-embedding-fp32",
        "llama-tokens-fp32",
    ),
    *("mixtral-experts-and-attention-fp32", "unet-convolutions-and-attention-fp32", "noise-net-bias-all-fp32"),
    *("untied-bench-everything-fp32", "towers-lora-bias-fp32", "bert-second-layer-fp32", "towers-excluded-fp32"),
)
PAIRS = {pair.slug: pair for pair in good_pairs() if pair.slug in STARTS}
BY_DECREE = {"C02", "C03", "C13", "C26"}
"""Errors of which PEFT says nothing; see the docstring of the last test."""
_numbers = count()


@dataclass(frozen=True)
class Start:
    """A good pair in memory."""

    pair: Pair
    config: Config
    tensors: Tensors
    trained: Tensor
    plain: Tensor


@dataclass(frozen=True)
class Truth:
    """What PEFT and a forward pass make of it.

    Attributes:
        fails: what was raised, or which keys were missing or of no use; empty: it loads as it is.
        gives: `trained`, `base` or `other`: the output.
    """

    fails: str
    gives: str


def test_all_starts_are_good_pairs() -> None:
    assert PAIRS.keys() == set(STARTS)


@pytest.mark.parametrize("name", MUTATIONS)
def test_one_change_is_seen_or_does_no_harm(name: str, shelf: Shelf) -> None:
    """Each change alone, on every start; what it does to a start follows from the start's place."""
    wrong = [said for pick, slug in enumerate(STARTS) for said in _judge(slug, [(name, pick)], shelf)]
    assert not wrong, "\n".join(wrong)


@given(
    slug=st.sampled_from(STARTS),
    changes=st.lists(st.tuples(st.sampled_from(sorted(MUTATIONS)), st.integers(0, 30)), min_size=1, max_size=3),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_the_verdict_is_what_peft_and_a_forward_pass_say(
    slug: str, changes: list[tuple[str, int]], shelf: Shelf
) -> None:
    """Where PEFT raises, or leaves keys missing or unused, the verdict is not "fits". Where it loads and the
    model gives the base's output, or another than the trained one, it is not "fits" without a warning. Where PEFT loads
    all of it and the model gives the trained output to the bit, it is not "does not fit".

    What form cannot see, and is left out of the second claim: `lora_alpha`, `use_rslora` and `alpha_pattern` edited,
    with nothing else changed and no earlier version of the same tensors. What no mutation here does, because nobody
    could tell it from training: a target that is a module without parameters (it has no row); other values in a
    tensor (but NaN, Inf and zeros everywhere), two modules of one shape whose tensors change places, and A and B of a
    square module that are transposed and change places. Left out of the third are errors that PEFT does not mind: a
    name in `modules_to_save` that the model lacks (C13), a key that no PEFT has (C02), a `peft_version` that was
    edited (C03), and names without `base_model.model.`, which PEFT mends for models whose saved names transformers 5
    converts, and for no others (C26)."""
    wrong = _judge(slug, changes, shelf)
    assert not wrong, "\n".join(wrong)


def _judge(slug: str, changes: Sequence[tuple[str, int]], shelf: Shelf) -> list[str]:
    start = _start(slug)
    config, tensors = json.loads(json.dumps(start.config)), dict(start.tensors)
    for name, pick in changes:
        MUTATIONS[name](config, tensors, pick)
    untouched = config == start.config and tensors.keys() == start.tensors.keys()
    if not tensors or (untouched and all(tensors[name] is start.tensors[name] for name in tensors)):
        return []
    folder = shelf.folder()
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    write_tensors(folder, tensors)
    truth = _truth(start, folder)
    found = _verdict(start, folder, shelf)
    rescaled = _only_rescaled(start, config, tensors)
    wrong = _compare(truth, found, rescaled)
    return [f"{slug} {list(changes)}: PEFT: {truth.fails or truth.gives}; {wrong}: {_said(found)}"] if wrong else []


def _compare(truth: Truth, found: Compatibility | str, rescaled: bool) -> str:
    """What is wrong with the verdict; empty: nothing."""
    if isinstance(found, str):
        return "" if truth.fails else f"refused ({found})"
    warned = any(one.severity == "warning" for one in found.findings)
    if truth.fails:
        unseen = "elementwise_affine=False" in truth.fails
        return "fits" if found.verdict == "fits" and not unseen else ""
    if truth.gives == "trained":
        by_decree = any(one.code in BY_DECREE for one in found.errors)
        return "does not fit" if found.verdict == "does not fit" and not by_decree else ""
    if truth.gives == "base" or not rescaled:
        return "fits, and no warning" if found.verdict == "fits" and not warned else ""
    return "does not fit" if found.verdict == "does not fit" else ""


@cache
def _made(slug: str, room: Path) -> Start:
    pair = PAIRS[slug]
    folder = room / f"start-{slug}"
    adapted = pair.make()
    trained = models.output(pair.model, adapted)
    save(adapted, folder)
    plain = models.output(pair.model, models.fresh(pair.model))
    return Start(pair, read_config(folder), tensors_of(folder), trained, plain)


_room: dict[str, Path] = {}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shelf]:
    """One of its own: copies with another alpha would make the good pairs of the others undecided."""
    home = tmp_path_factory.mktemp("mutated")
    (home / "room").mkdir()
    with Registry.init(home / "registry") as registry:
        yield Shelf(registry, home / "room")


@pytest.fixture(autouse=True, scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> None:
    _room["at"] = tmp_path_factory.mktemp("starts")


def _start(slug: str) -> Start:
    return _made(slug, _room["at"])


def _truth(start: Start, folder: Path) -> Truth:
    base = models.fresh(start.pair.model)
    loaded = load(base, folder)
    if loaded.model is None:
        return Truth(f"raises {loaded.error}", "")
    lost = next((one for one in loaded.warnings if "missing adapter keys" in one), "")
    if lost:
        return Truth(f"warns {lost}", "")
    model = loaded.model
    again = told(lambda: model.load_adapter(str(folder), adapter_name="default"))
    unused = list(getattr(again.model, "unexpected_keys", ()))
    if unused:
        return Truth(f"does not use {unused[0]}", "")
    try:
        output = quietly(lambda: models.output(start.pair.model, model.eval()))
    except Exception as error:  # noqa: BLE001, whatever the forward pass raises is a failure
        return Truth(f"the forward pass raises {type(error).__name__}: {error}"[:200], "")
    if output.shape == start.trained.shape and torch.equal(output, start.trained):
        return Truth("", "trained")
    return Truth("", "base" if torch.equal(output, start.plain) else "other")


def _verdict(start: Start, folder: Path, shelf: Shelf) -> Compatibility | str:
    registry, base = shelf.registry, shelf.base(start.pair.model)
    try:
        pushed = quietly(
            lambda: registry.push(folder, f"mutated/m{next(_numbers)}", base=base, probe=False, force=True)
        )
        by_version = registry.check(pushed.reference, base)
        live = registry.check(pushed.reference, models.fresh(start.pair.model))
    except InvalidInput as error:
        return str(error)
    # A version may be loaded with another head than it was saved with, and then names fit that do not now.
    of_another_head = any(one.code == "C26" and one.severity == "info" for one in by_version.findings)
    return live if by_version.verdict == live.verdict or of_another_head else by_version


def _only_rescaled(start: Start, config: Config, tensors: Tensors) -> bool:
    same = all(config.get(key) == start.config.get(key) for key in {*config, *start.config} - SCALING_KEYS)
    return (
        same
        and tensors.keys() == start.tensors.keys()
        and all(tensors[name] is start.tensors[name] for name in tensors)
    )


def _said(found: Compatibility | str) -> list[str]:
    return [] if isinstance(found, str) else [str(one) for one in found.findings if one.severity != "info"]
