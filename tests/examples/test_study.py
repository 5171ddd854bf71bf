"""The study of docs/cheetah.md, its pieces run with next to nothing to train on: everything is pushed, rolled out and
counted as in full, and the page's tables and pictures are made of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from examples.cheetah import charts, report, study
from examples.cheetah.forms import FULL, METHODS, REDUCED
from examples.cheetah.report import Results, gain_kept, rank_correlation
from examples.cheetah.task import Cheetah
from examples.cheetah.worlds import ORIGINAL
from pdp.data import SequenceDataset
from registry import Registry
from tests.examples.test_charts import made_up

ROOT = Path(__file__).parents[2]
FEW = ("training.max_steps=4", "training.lr_warmup_steps=2", "dataloader.batch_size=16")
TINY = replace(
    FULL,
    seeds=(0,),
    worlds=("gear", "mass"),
    pairs=(("gear", "mass"),),
    base=FEW,
    adapter=FEW,
    base_data=(6, 30),
    adapter_data=(6, 30),
    rollouts=2,
    task=Cheetah(steps=6),
    curve_every=2,
)


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> tuple[study.Place, dict[str, Any]]:
    """In this process: that the pieces run in processes of their own is the demo's part."""
    folder = tmp_path_factory.mktemp("study")
    place = study.Place(TINY, str(folder / "registry"), folder / "work")
    Registry.init(place.registry).close()
    whole = study.experts(TINY, [ORIGINAL, "gear", "mass", "gear-mass"])
    whole.add(study.base_piece(place, 0))
    for world in TINY.worlds:
        for what in ("lora", "full"):
            whole.add(study.world_piece(place, 0, world, what))
    whole.add(study.pair_piece(place, 0, ("gear", "mass")))
    found = {**vars(whole), "switching": study.switching_piece(place, "gear")}
    found["form"] = {"seeds": [0], "rollouts": 2, "steps": 6, "execute": 2}
    return place, json.loads(json.dumps(found))


def test_everything_is_rolled_out_where_the_tables_need_it(studied: tuple[study.Place, dict[str, Any]]) -> None:
    _, found = studied
    seen = {(one["what"], one["trained_on"], one["world"]) for one in found["records"]}
    three = ("gear", "mass", "gear-mass")
    assert seen == {
        *(("expert", world, world) for world in (ORIGINAL, *three)),
        *(("base", ORIGINAL, world) for world in (ORIGINAL, *three)),
        *(("lora", own, world) for own in ("gear", "mass") for world in (ORIGINAL, *three)),
        *(("full", own, world) for own in ("gear", "mass") for world in (ORIGINAL, own)),
        *((what, "gear-mass", world) for what in ("merged", "both") for world in three),
    }
    assert {one["method"] for one in found["records"] if one["what"] == "merged"} == set(METHODS)
    assert [point["step"] for point in found["curves"] if point["what"] == "lora"] == [0, 2, 4]


def test_everything_is_in_the_registry_with_its_metrics_and_parents(
    studied: tuple[study.Place, dict[str, Any]],
) -> None:
    place, _ = studied
    with Registry.open(place.registry) as registry:
        assert registry.get("cheetah/gear:prod").metrics["speed"] == registry.get("cheetah/gear").metrics["gear/speed"]
        assert "speed" not in registry.get("cheetah/gear-mass-svd:prod").metrics  # of two worlds
        assert registry.get("cheetah/gear-mass-both:prod").metadata["task"] == "cheetah"
        assert len(registry.fits("cheetah/base:v1", "kind = adapter")) == 3 + len(METHODS)
        log = registry.log("cheetah/gear-mass-ties")
        parents = {log.names[edge.parent_id] for edge in log.ancestors if edge.relation == "merged_from"}
        assert parents == {"cheetah/gear@1", "cheetah/mass@1"}


def test_a_data_set_of_another_size_is_another_file(tmp_path: Path) -> None:
    small, large = (study.Place(form, "", tmp_path) for form in (TINY, replace(TINY, adapter_data=(7, 30))))
    paths = {small.data(0, "gear"), large.data(0, "gear"), small.data(1, "gear"), small.data(0, "gear", "mass")}
    assert len(paths) == 4
    assert "world" not in SequenceDataset(small.data(0, "gear", "mass"), 2, 4).recipe


def test_the_page_gets_its_tables_and_keeps_its_words(studied: tuple[study.Place, dict[str, Any]]) -> None:
    _, found = studied
    page = (ROOT / "docs" / "cheetah.md").read_text(encoding="utf-8")
    filled = report.fill(page, Results(found))
    assert report.fill(filled, Results(found)) == filled
    assert filled.splitlines()[0] == page.splitlines()[0]
    base = next(one for one in found["records"] if one["what"] == "base" and one["world"] == "gear")
    assert f"| base | {base['speed']:.2f} |" in filled
    with pytest.raises(SystemExit, match="0 places for the table speeds"):
        report.fill("", Results(found))


def test_the_page_has_the_numbers_of_its_results() -> None:
    results = Results(json.loads((ROOT / "docs" / "cheetah" / "results.json").read_text(encoding="utf-8")))
    page = (ROOT / "docs" / "cheetah.md").read_text(encoding="utf-8")
    assert report.fill(page, results) == page


def test_the_pages_pictures_are_small() -> None:
    folder = ROOT / "docs" / "cheetah"
    names = {*(f"{name}.png" for name in charts.CHARTS), "film.png", "gait.gif"}
    assert {path.name for path in folder.iterdir()} == {*names, "results.json"}
    assert all((folder / name).stat().st_size < 1_000_000 for name in names)


def test_what_a_merge_keeps_is_told_of_the_gain() -> None:
    results = made_up()  # base 2, parents 4, svd 3, ties 2; each seed 0.1 faster
    for seed in range(3):
        assert gain_kept(Results(results), ("gear", "mass"), seed, "svd") == pytest.approx(0.5)
        assert gain_kept(Results(results), ("gear", "mass"), seed, "ties") == pytest.approx(0.0)


def test_rank_correlation_is_spearmans() -> None:
    assert rank_correlation([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9486833)  # ties share a rank


def test_the_reduced_form_has_worlds_of_the_full_one() -> None:
    assert set(REDUCED.worlds) <= set(FULL.worlds)
    assert set(REDUCED.pairs) <= set(FULL.pairs)
