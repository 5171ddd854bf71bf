"""The language of `--where`, end to end: real pushes, `Registry.find`, both databases. `tests/properties` holds every
field and operator against a model; here stand the promises that a user reads, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from registry import Registry
from registry.catalog.tables import event
from registry.core.annotations import parse_metadata_text
from registry.core.errors import ArtifactNotFound, InvalidInput, InvalidQuery, InvalidReference, VersionNotFound
from tests.catalog.artifacts import adapter_tensors, peft_folder, tensor_file
from tests.catalog.fixtures import KINDS, Catalogs

NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)


@pytest.fixture(scope="module", params=KINDS)
def team(
    request: pytest.FixtureRequest, catalogs: Catalogs, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Registry]:
    """Eight versions of five names, an hour apart."""
    folder = tmp_path_factory.mktemp("team")
    bare = folder / "bare.safetensors"
    bare.write_bytes(adapter_tensors(5.0, r=4))

    def adapter(value: float, **config: Any) -> Path:
        return peft_folder(folder / str(value), value, **config)

    pushes: list[tuple[str, Path, dict[str, Any]]] = [
        ("base/model", tensor_file(folder, 1), {}),
        ("base/model", tensor_file(folder, 2), {"tags": ["v1"]}),
        (
            "walk/a",
            adapter(1.0, peft_version="0.9.0", r=2, task_type="CAUSAL_LM"),
            {"base": "base/model@1", "tags": ["prod"], "message": "first try, 100% of it"}
            | {"metadata": {"seed": parse_metadata_text("9"), "label": "10"}, "metrics": {"reward": 900.5}},
        ),
        (
            "walk/a",
            adapter(2.0, peft_version="0.18.1", r=8, use_dora=True, modules=("q_proj", "v_proj")),
            {"base": "base/model@2", "metadata": {"seed": parse_metadata_text("10")}, "metrics": {"reward": math.nan}},
        ),
        (
            "walk/b",
            adapter(3.0, r=16, use_rslora=True, lora_alpha=8.5, modules=("fc1",)),
            {"base": "base/model@2", "metadata": {"seed": "ten"}, "metrics": {"reward": math.inf}, "message": "Größe"},
        ),
        ("run/bare", bare, {"metadata": {"label": "9"}, "metrics": {"reward": -math.inf}}),
        (
            "run/star",
            adapter(4.0, r=64, peft_version="0.18.0", modules=(r".*\.(q|v)_proj",)),
            {"metadata": {"label": "a*b_[c]%\\"}, "metrics": {"reward": -3.0}, "tags": ["Prod"]},
        ),
    ]
    time = NOON
    with pytest.MonkeyPatch.context() as patch, Registry.open(catalogs.registry(request.param, folder / "r")) as made:
        for room in ("context", "push"):
            patch.setattr(f"registry.operations.{room}.now", lambda: time)
        for name, source, options in pushes:
            made.push(source, name, force=True, **options)  # they are for their fields, and fit nothing
            time += timedelta(hours=2)
        yield made


def find(team: Registry, *where: str, **options: Any) -> list[str]:
    return [version.reference for version in team.find(*where, **options)]


FOUND = {
    # Numbers are numbers, also where the column holds whole ones.
    "r >= 8": ["run/star@1", "walk/a@2", "walk/b@1"],
    "r > 8.5": ["run/star@1", "walk/b@1"],
    "r = 8.0": ["walk/a@2"],
    "r != 8": ["run/bare@1", "run/star@1", "walk/a@1", "walk/b@1"],
    "lora_alpha = 8.5": ["walk/b@1"],
    "r < 1e300": ["run/bare@1", "run/star@1", "walk/a@2", "walk/a@1", "walk/b@1"],
    "size > 99999999999999999999": [],
    "version >= 2": ["base/model@2", "walk/a@2"],
    "parameters = 4": ["base/model@2", "base/model@1"],
    # Truth.
    "use_dora = true": ["walk/a@2"],
    "use_rslora != no": ["walk/b@1"],
    "use_dora = FALSE and r >= 16": ["run/star@1", "walk/b@1"],
    # Text: by code point, `*` and `?` match, all else is literal.
    "kind = base": ["base/model@2", "base/model@1"],
    "name = walk/b": ["walk/b@1"],
    "name ~ walk": ["walk/a@2", "walk/a@1", "walk/b@1"],
    "name ~ WALK": [],
    "name ~ ????/?": ["walk/a@2", "walk/a@1", "walk/b@1"],
    "name < run": ["base/model@2", "base/model@1"],
    "task_type = CAUSAL_LM": ["walk/a@1"],
    "message ~ '100%'": ["walk/a@1"],
    "message ~ '1_0'": [],
    'message = "first try, 100% of it"': ["walk/a@1"],
    "message ~ Größ?": ["walk/b@1"],
    "message ~ GRÖSSE": [],
    "meta.label ~ '*b_[c]%'": [],
    "meta.label ~ '*b_[c]%?'": ["run/star@1"],
    "meta.label ~ '_[c]%\\'": ["run/star@1"],
    "meta.label ~ '*b?[d]*'": [],
    "target = q_proj": ["walk/a@2", "walk/a@1"],
    "target != q_proj": ["run/star@1", "walk/b@1"],
    "target ~ '.*'": ["run/star@1"],
    "target ~ _proj": ["run/star@1", "walk/a@2", "walk/a@1"],
    # Metadata: numbers as numbers, text as text.
    "meta.seed > 9": ["walk/a@2"],
    "meta.seed >= 9": ["walk/a@2", "walk/a@1"],
    "meta.seed = 9.0": ["walk/a@1"],
    "meta.seed = ten": ["walk/b@1"],
    "meta.seed != 9": ["walk/a@2", "walk/b@1"],
    "meta.seed ~ 1": ["walk/a@2"],
    "meta.label > 8": [],
    "meta.label = 10": ["walk/a@1"],
    "meta.label != 10": ["run/bare@1", "run/star@1"],
    "meta.label < b": ["run/bare@1", "run/star@1", "walk/a@1"],
    "meta.none = x": [],
    "meta.none != x": [],
    # Metrics: Infinity is above all, NaN is only itself.
    "metric.reward > 900": ["walk/a@1", "walk/b@1"],
    "metric.reward >= inf": ["walk/b@1"],
    "metric.reward < 0": ["run/bare@1", "run/star@1"],
    "metric.reward = nan": ["walk/a@2"],
    "metric.reward != nan": ["run/bare@1", "run/star@1", "walk/a@1", "walk/b@1"],
    "metric.reward = -Infinity": ["run/bare@1"],
    "metric.none > 0": [],
    # Versions of PEFT sort as versions; unknown is none.
    "peft_version < 0.18": ["walk/a@1"],
    "peft_version >= 0.18.0": ["run/star@1", "walk/a@2"],
    "peft_version = 0.18": ["run/star@1"],
    "peft_version != 0.9": ["run/star@1", "walk/a@2"],
    # Tags.
    "tag = prod": ["walk/a@1"],
    "tag ~ prod": ["walk/a@1"],
    "tag ~ ?rod": ["run/star@1", "walk/a@1"],
    "tag != prod and kind = adapter": ["run/bare@1", "run/star@1", "walk/a@2", "walk/b@1"],
    "tag = latest": ["base/model@2", "run/bare@1", "run/star@1", "walk/a@2", "walk/b@1"],
    "tag != latest": ["base/model@1", "walk/a@1"],
    # Bases: a name is any version of it.
    "base = base/model": ["walk/a@2", "walk/a@1", "walk/b@1"],
    "base = base/model@1": ["walk/a@1"],
    "base = base/model:v1": ["walk/a@2", "walk/b@1"],
    "base = base/model:latest": ["walk/a@2", "walk/b@1"],
    "base != base/model@1": ["walk/a@2", "walk/b@1"],
    # Times: a bare date is 00:00 UTC, and with = the whole day.
    "created_at < 2026-11-23T14:00": ["base/model@1"],
    "created_at <= 2026-11-23T14:00Z": ["base/model@2", "base/model@1"],
    "created_at < 2026-11-23T15:00:00.000001+01:00": ["base/model@2", "base/model@1"],
    "created_at >= 2026-11-24": ["run/star@1"],
    "created_at = 2026-11-24": ["run/star@1"],
    "created_at = 20261124": ["run/star@1"],
    "created_at != 2026-11-23": ["run/star@1"],
    "created_at = 9999-12-31": [],
    # Joined.
    "r >= 2 and r <= 8 AND target = v_proj": ["walk/a@2"],
}


@pytest.mark.parametrize("where", FOUND)
def test_a_condition_finds(team: Registry, where: str) -> None:
    assert find(team, where) == FOUND[where]


def test_several_texts_are_joined_by_and(team: Registry) -> None:
    assert find(team, "r >= 2", "r <= 8 and tag != prod") == ["run/bare@1", "walk/a@2"]


def test_options_and_conditions_narrow_together(team: Registry) -> None:
    assert find(team, "r > 1", pattern="walk/*", kind="adapter", base="base/model@2") == ["walk/a@2", "walk/b@1"]
    assert find(team, pattern="walk") == ["walk/a@2", "walk/a@1", "walk/b@1"]
    assert find(team, pattern="model") == ["base/model@2", "base/model@1"]
    assert find(team, pattern="*/b*") == ["run/bare@1", "walk/b@1"]
    assert find(team, tag="latest", kind="base") == ["base/model@2"]
    assert find(team, tag="prod") == ["walk/a@1"]
    assert find(team, pattern="WALK") == find(team, pattern="w_lk/a") == find(team, pattern="w%/a") == []


def test_metrics_that_are_not_finite_sort_last_both_ways(team: Registry) -> None:
    last = ["run/bare@1", "walk/a@2", "walk/b@1"]  # -Infinity, NaN and Infinity, by name
    none = ["base/model@2", "base/model@1"]
    ascending = ["run/star@1", "walk/a@1"]
    rest = sorted([*last, *none], key=lambda one: (one.split("@")[0], -int(one.split("@")[1])))
    assert find(team, order_by="metric.reward") == ascending + rest
    assert find(team, order_by="-metric.reward") == ascending[::-1] + rest
    assert find(team, order_by="-metric.reward", limit=1) == ["walk/a@1"]
    assert find(team, order_by="metric.reward", limit=3) == [*ascending, "base/model@2"]


def test_numbers_in_metadata_sort_as_numbers_before_text(team: Registry) -> None:
    assert find(team, order_by="meta.seed")[:3] == ["walk/a@1", "walk/a@2", "walk/b@1"]
    assert find(team, order_by="-meta.seed")[:3] == ["walk/a@2", "walk/a@1", "walk/b@1"]


def test_peft_versions_sort_as_versions(team: Registry) -> None:
    assert find(team, order_by="peft_version")[:3] == ["walk/a@1", "run/star@1", "walk/a@2"]
    assert find(team, order_by="-peft_version")[:3] == ["walk/a@2", "run/star@1", "walk/a@1"]


def test_bases_sort_by_name_and_number(team: Registry) -> None:
    assert find(team, order_by="-base")[:3] == ["walk/a@2", "walk/b@1", "walk/a@1"]


def test_a_limit_cuts_and_zero_is_none(team: Registry) -> None:
    everything = find(team)
    assert len(everything) == 7
    for limit in range(9):
        assert find(team, limit=limit) == everything[:limit]
        assert find(team, order_by="-metric.reward", limit=limit) == find(team, order_by="-metric.reward")[:limit]
    assert find(team, limit=2**70) == everything
    with pytest.raises(InvalidInput, match="limit -1"):
        team.find(limit=-1)


@pytest.mark.parametrize(
    "value",
    [
        *("' OR '1'='1", "x'; DELETE FROM event; --", "\\'; DELETE FROM event; --", "%' ESCAPE '", "$1", ":key_1"),
        *("%(key_1)s", "?", "/*", "--", "{x}", "\\", "%%"),
    ],
)
def test_a_value_is_only_a_value(team: Registry, value: str) -> None:
    before = counted(team)
    quote = '"' if "'" in value else "'"
    for field in ("message", "name", "meta.label", "tag", "target", "base_model"):
        for op in ("=", "!=", "~", "<"):
            if field != "target" or op != "<":
                team.find(f"{field} {op} {quote}{value}{quote}")
    team.find(pattern=value)
    team.find("kind = base", pattern=f"*{value}*")
    assert counted(team) == before


def counted(team: Registry) -> int:
    with team._context.reading() as connection:
        return connection.execute(select(func.count()).select_from(event)).scalar_one()


REFUSED = {
    "rr > 8": r"unknown field 'rr'; did you mean r\? Known: name, version, kind",
    "lora_alhpa = 8": r"did you mean lora_alpha\?",
    "metrics.reward > 1": "did you mean metric.KEY",
    "zzz = 1": "unknown field 'zzz'. Known: .*meta.KEY, metric.KEY",
    "meta. = 1": "needs a key",
    "r": "expected 'field op value'",
    "r > ": "expected 'field op value'",
    "r => 8": "expected 'field op value'",
    "r > 8 or r < 2": "'or' is not part of the language",
    "r > 8 r < 2": "expected 'and' before",
    "name = 'a": "cannot read",
    "r > eight": "r is a number, 'eight' is not",
    "r > 8,5": "r is a number",
    "r > nan": "nothing compares with NaN",
    "r ~ 8": "'~' compares text, and r is a number",
    "metric.reward ~ 8": "'~' compares text",
    "metric.reward > high": "metric.reward is a number, 'high' is not",
    "use_dora = maybe": "use_dora is true or false",
    "use_dora > true": "use_dora is true or false",
    "peft_version > new": "'new' is not a version such as 0.18",
    "peft_version > 12345678.1": "is not a version",
    "target > q_proj": "use =, != or ~",
    "base > base/model": "use = or !=",
    "message = 'a\0b'": "NUL",
    "message ~ 'a\ud800b'": "surrogate",
    f"message = {'x' * 1001}": "1000 is the most",
    f"meta.{'k' * 2000} = 1": "1000 is the most",
}


@pytest.mark.parametrize("where", REFUSED, ids=lambda where: ascii(where)[:40])
def test_what_cannot_be_asked_is_refused_with_the_reason(team: Registry, where: str) -> None:
    with pytest.raises(InvalidQuery, match=REFUSED[where]):
        team.find(where)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"order_by": "tag"}, InvalidQuery, "a version has several"),
        ({"order_by": "-target"}, InvalidQuery, "a version has several"),
        ({"order_by": "rr"}, InvalidQuery, "did you mean r"),
        ({"order_by": "metric."}, InvalidQuery, "needs a key"),
        ({"order_by": "metric.a\0b"}, InvalidQuery, "NUL|key"),
        ({"order_by": "meta.\ud800"}, InvalidQuery, "surrogate|key"),
        ({"pattern": "a\0*"}, InvalidQuery, "NUL"),
        ({"pattern": "\ud800"}, InvalidQuery, "surrogate"),
        ({"pattern": "*" * 1001}, InvalidQuery, "1000 is the most"),
        ({"kind": "lora"}, InvalidInput, "expected one of adapter, base, checkpoint"),
        ({"tag": "a b"}, InvalidReference, "tag"),
        ({"base": "base/nothing"}, ArtifactNotFound, "no artifact base/nothing"),
        ({"base": "base/model@9"}, VersionNotFound, "highest number of base/model is 2"),
        ({"base": "model"}, InvalidReference, "namespace/name"),
    ],
    ids=ascii,
)
def test_options_that_cannot_be_are_refused(
    team: Registry, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        team.find(**options)


def test_a_time_that_is_none_is_refused(team: Registry) -> None:
    for text in ("yesterday", "2026-13-01", "2026-11-23T25:00", "0001-01-01T00:00+14:00"):
        with pytest.raises(InvalidInput, match="not a date or time"):
            team.find(f"created_at > {text}")
