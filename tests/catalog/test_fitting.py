"""What fits a model, as the catalog says it: the same as when every target is looked at by hand, on both databases, for
forms in the catalog and forms at hand; and no statement reads all versions."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Connection, insert, select

from benchmarks.synthetic_catalog import MODELS, fill, form_of
from registry.catalog import tables
from registry.catalog.engine import Database, open_database
from registry.catalog.fitting import LayoutFit, fitting_versions, layout_bases, layout_fits
from registry.catalog.forms import form_of_version, register_form, set_form, weight_sizes
from registry.catalog.search import Search, find_ids
from registry.core.adapter_names import Target
from registry.core.layout import TensorSpec
from registry.core.model_form import ModelForm, Module, Parameter, form_of_layout
from registry.core.query import parse_where
from tests.catalog.fixtures import KINDS, Catalogs
from tests.catalog.test_constraints import NOW, digest
from tests.catalog.test_statements import plans, scans

SIZES = (2, 3, 4, 6, 8)
PATHS = tuple(
    f"{block}.{name}" for block in ("layers.0", "layers.1", "body.layers.0") for name in ("q", "out_proj", "mlp")
)
TARGET_KINDS = (
    *(
        "linear",
        "linear",
        "linear+dora",
        "embedding",
        "conv1d",
        "conv2d",
        "conv2d+grouped",
        "attention",
        "attention_out",
    ),
    *("parameter", "token", "full", "bias", "linear+base_bias", "unknown"),
)
MODULE_KINDS = (
    *("linear", "linear", "linear", "conv1d", "conv2d", "embedding", "transformers_conv1d"),
    *("attention", "experts", "quantised", "matrix", "matrix", "other"),
)

# ---------------------------------------------------------------- by hand


def agrees(*pairs: tuple[int | None, int | None]) -> bool | None:
    """Whether all are equal; None: a size that is not known decides."""
    known = [one == other for one, other in pairs if one is not None and other is not None]
    return False if False in known else True if len(known) == len(pairs) else None


def either(one: bool | None, other: bool | None) -> bool | None:
    return True if True in (one, other) else None if None in (one, other) else False


def verdict(target: Target, form: ModelForm) -> bool | None:
    """Whether a target matches; None where only the rules can tell."""
    kind, _, flags = target.kind.partition("+")
    module, parent = form.by_path.get(target.module), form.by_path.get(target.module.rpartition(".")[0])
    given, gives = target.in_features, target.out_features
    unclear = module is not None and module.kind in ("attention", "experts", "quantised", "other")
    if kind == "parameter":
        return None if module or parent or target.module.endswith(".base_layer") else False
    if kind == "full":
        if module is None or unclear:
            return None
        rows, columns = weight_sizes(module)
        if agrees((given, columns), (gives, rows)) is False:
            return False
        return True if rows is not None and (gives, given) == (rows, columns) else None
    if module is None:
        return False
    if kind in ("attention", "attention_out", "unknown"):
        return None
    if kind == "bias":
        return True if module.bias and gives is not None and gives == module.out_features else None
    if unclear:
        return None
    if kind == "token":
        return agrees((gives, weight_sizes(module)[1]))
    if kind == "linear" and parent is not None and parent.kind == "attention" and target.module.endswith("out_proj"):
        return None
    there = (module.in_features, module.out_features)
    straight = agrees((given, there[0]), (gives, there[1]))
    if module.kind == "matrix" and kind in ("linear", "embedding"):
        return either(straight, agrees((given, there[1]), (gives, there[0])))
    if kind in ("linear", "embedding"):
        kinds = ("linear", "transformers_conv1d") if kind == "linear" else ("embedding",)
        return straight if module.kind in kinds else False
    if module.kind != kind:
        return False
    if form.exact and module.groups > 1:
        of_one = agrees((None if given is None else given * module.groups, there[0]))
        some = either(agrees((given, there[0])), of_one)
        return False if False in (some, agrees((gives, there[1]))) else None
    if not form.exact and "grouped" in flags:
        several = None if given is None or not there[0] else given % there[0] == 0
        return False if False in (several, agrees((gives, there[1]))) else None
    return straight


def by_hand(targets: list[Target], form: ModelForm) -> tuple[int, int, bool]:
    verdicts = [verdict(target, form) for target in targets]
    return sum(one is not False for one in verdicts), len(verdicts), None in verdicts


# ---------------------------------------------------------------- random forms and layouts


def random_module(rng: random.Random, path: str) -> Module:
    kind = rng.choice(MODULE_KINDS)
    given, gives = rng.choice(SIZES), rng.choice(SIZES)
    shape: tuple[int, ...] = {
        "transformers_conv1d": (given, gives),
        "embedding": (given, gives),
        "conv1d": (gives, given, 3),
        "conv2d": (gives, given, 3, 3),
    }.get(kind, (gives, given))
    name = {"attention": "in_proj_weight", "experts": "gate_up_proj"}.get(kind, "weight")
    if kind == "other":
        shape = shape[:1]
    known = kind not in ("experts", "quantised", "other") and rng.random() > 0.1
    return Module(
        path,
        kind,
        in_features=given if known else None,
        out_features=gives if known else None,
        bias=rng.choice((True, False, None)),
        groups=rng.choice((1, 2)) if kind.startswith("conv") else 1,
        parameters=(Parameter(name, "F32", shape),) if rng.random() > 0.1 else (),
    )


def random_form(rng: random.Random) -> ModelForm:
    paths = rng.sample(PATHS, rng.randint(1, len(PATHS)))
    modules = [random_module(rng, path) for path in paths]
    if rng.random() < 0.5:
        modules.append(Module("layers.0", rng.choice(("attention", "experts"))))
    return ModelForm(tuple(modules), exact=rng.random() < 0.5)


def random_targets(rng: random.Random, forms: list[ModelForm]) -> list[Target]:
    """Half of them after modules of a form, so that many match."""
    found: dict[str, Target] = {}
    for path in rng.sample(PATHS, rng.randint(0, 4)):
        kind = rng.choice(TARGET_KINDS)
        sizes: list[int | None] = [rng.choice((*SIZES, None)), rng.choice((*SIZES, None))]
        module = rng.choice(forms).by_path.get(path)
        if module is not None and rng.random() < 0.8:
            sizes = [module.in_features, module.out_features]
            if rng.random() < 0.7:
                kind = {"transformers_conv1d": "linear", "matrix": rng.choice(("linear", "embedding"))}.get(
                    module.kind, module.kind if module.kind in TARGET_KINDS else kind
                )
            if kind in ("full", "token"):
                sizes = list(reversed(weight_sizes(module)))
            if rng.random() < 0.2:
                sizes.reverse()
        if kind == "parameter" and rng.random() < 0.5:
            path += rng.choice((".weight", ".base_layer"))
        found[path] = Target(path, 4, sizes[0], sizes[1], kind)
    return list(found.values())


def add_layout(connection: Connection, layout_id: int, targets: list[Target]) -> None:
    row = {"id": layout_id, "digest": digest(f"layout {layout_id}"), "tensors": 1, "parameters": 1, "nbytes": 1}
    connection.execute(insert(tables.layout).values(**row))
    for one in targets:
        sizes = {"rank": one.rank, "in_features": one.in_features, "out_features": one.out_features}
        connection.execute(insert(tables.target).values(layout_id=layout_id, module=one.module, kind=one.kind, **sizes))


def add_version(connection: Connection, number: int, layout_id: int | None, **changed: object) -> int:
    if number == 1:
        row = {"id": 1, "namespace": "a", "name": "b", "last_event_at": NOW, "created_at": NOW}
        connection.execute(insert(tables.artifact).values(**row))
    row = {"id": number, "artifact_id": 1, "number": number, "kind": "adapter", "state": "present"}
    digests = {"manifest_digest": digest(f"manifest {number}"), "content_digest": digest("content")}
    said = {"size": 0, "bytes_new": 0, "created_by": "me", "created_at": NOW, "layout_id": layout_id}
    connection.execute(insert(tables.version).values(**{**row, **digests, **said, **changed}))
    return number


@pytest.mark.parametrize("seed", range(4))
def test_layouts_match_as_they_do_by_hand(database: Database, seed: int) -> None:
    rng = random.Random(seed)
    forms = [random_form(rng) for _ in range(12)]
    layouts = {number: random_targets(rng, forms) for number in range(1, 60)}
    with database.writing() as connection:
        ids = [register_form(connection, form) for form in forms]
        for number, targets in layouts.items():
            add_layout(connection, number, targets)
            add_version(connection, number, number)
    matching, opened = 0, 0
    with database.reading() as connection:
        for form, form_id in zip(forms, ids, strict=True):
            found = layout_fits(connection, form, form_id)
            wanted = [LayoutFit(number, *by_hand(targets, form)) for number, targets in layouts.items()]
            assert found == wanted
            assert layout_fits(connection, form) == wanted
            matching += sum(one.matched for one in found)
            opened += sum(one.open for one in found)
    assert matching > 100
    assert 50 < opened < 11 * 59


def test_a_layout_without_targets_does_not_fit(database: Database) -> None:
    with database.writing() as connection:
        add_layout(connection, 1, [])
        add_version(connection, 1, 1)
        (found,) = layout_fits(connection, ModelForm(()))
    assert (found.total, found.fits) == (0, False)


def test_only_layouts_of_present_adapters_are_looked_at(database: Database) -> None:
    form = ModelForm((Module("q", "linear", in_features=4, out_features=2),))
    states = ({}, {"state": "removed"}, {"state": "purged"}, {"kind": "checkpoint"}, {"kind": "base"})
    with database.writing() as connection:
        for number, changed in enumerate(states, 1):
            add_layout(connection, number, [Target("q", 1, 4, 2, "linear")])
            add_version(connection, number, number, **changed)
        add_layout(connection, 6, [Target("q", 1, 4, 2, "linear")])
        assert layout_fits(connection, form) == [LayoutFit(1, 1, 1, False)]
        assert layout_bases(connection, range(1, 7)) == {(1, None)}
        assert fitting_versions(connection, range(1, 7)) == [1]


def test_a_body_is_tried_under_the_names_that_its_head_has(database: Database) -> None:
    module = Module("layers.0.q", "linear", in_features=4, out_features=4)
    body = ModelForm((module,), prefix="bert")
    whole = ModelForm((Module("bert.layers.0.q", "linear", in_features=4, out_features=4),), prefix="bert")
    other = ModelForm((module,), prefix="gpt")
    with database.writing() as connection:
        add_layout(connection, 1, [Target("bert.layers.0.q", 1, 4, 4, "linear")])
        add_layout(connection, 2, [Target("layers.0.q", 1, 4, 4, "linear")])
        for number in (1, 2):
            add_version(connection, number, number)
        for form, fits in ((body, (True, False)), (whole, (False, True))):
            found = layout_fits(connection, form, register_form(connection, form))
            assert found == [LayoutFit(1, 1, 1, fits[0]), LayoutFit(2, 1, 1, fits[1])]
        found = layout_fits(connection, other, register_form(connection, other))
        assert [one.fits for one in found] == [False, True]
        assert [one.fits for one in layout_fits(connection, body)] == [False, True]  # a model at hand is what it is


def test_a_model_of_60000_modules_goes_along_with_the_question(database: Database) -> None:
    names = [f"layers.{number // 100}.experts.{number}.weight" for number in range(60_000)]
    form = form_of_layout([TensorSpec(f'{name}"\\é.weight', "BF16", (8, 16)) for name in names])
    with database.writing() as connection:
        targets = [Target(f'{name}"\\é', 4, 16, 8, "linear") for name in names[::1000]]
        add_layout(connection, 1, targets)
        add_version(connection, 1, 1)
    with database.reading() as connection:
        assert layout_fits(connection, form) == [LayoutFit(1, 60, 60, False)]


def test_names_that_no_catalog_holds_do_not_stop_the_question(database: Database) -> None:
    form = ModelForm((Module("a\0b", "linear"), Module("c\ud800", "linear"), Module("q", "linear", "", 4, 2)))
    with database.writing() as connection:
        add_layout(connection, 1, [Target("q", 1, 4, 2, "linear")])
        add_version(connection, 1, 1)
        assert layout_fits(connection, form) == [LayoutFit(1, 1, 1, False)]


# ---------------------------------------------------------------- forms


def test_a_form_comes_back_as_it_was_and_is_kept_once(database: Database) -> None:
    form = random_form(random.Random(5))
    with database.writing() as connection:
        add_version(connection, 1, None, kind="base")
        add_version(connection, 2, None, kind="base")
        assert form_of_version(connection, 1) is None
        form_id = register_form(connection, form)
        assert register_form(connection, ModelForm(form.modules, exact=form.exact)) == form_id
        set_form(connection, 1, form_id)
        assert form_of_version(connection, 1) == (form_id, form)
        assert form_of_version(connection, 2) is None
        assert len(connection.execute(select(tables.module)).all()) == len(form.modules)


def test_writers_that_register_one_form_at_once_get_one_row(database: Database) -> None:
    form = form_of("minilm")

    def register(_: int) -> int:
        with database.writing() as connection:
            return register_form(connection, form)

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(register, range(8)))) == 1
    with database.reading() as connection:
        assert len(connection.execute(select(tables.architecture)).all()) == 1
        assert len(connection.execute(select(tables.module)).all()) == len(form.modules)


# ---------------------------------------------------------------- a catalog like a team's

VERSIONS = 3000


@pytest.fixture(scope="module", params=KINDS)
def team(request: pytest.FixtureRequest, catalogs: Catalogs) -> Iterator[Connection]:
    database = open_database(catalogs.database(request.param))
    with database.writing() as opened:
        fill(opened, VERSIONS, models=True)
    with database.reading() as opened:
        yield opened
    database.close()


def naive_versions(connection: Connection, layouts: set[int], excluded: set[tuple[int, int | None]]) -> list[int]:
    wrong = set(connection.scalars(select(tables.finding.c.version_id).where(tables.finding.c.severity == "error")))
    rows = connection.execute(
        select(tables.version, tables.artifact.c.namespace, tables.artifact.c.name).join(tables.artifact)
    ).all()
    kept = [
        row
        for row in rows
        if (row.kind, row.state) == ("adapter", "present")
        and row.layout_id in layouts
        and (row.layout_id, row.base_id) not in excluded
        and row.id not in wrong
    ]
    return [row.id for row in sorted(kept, key=lambda row: (row.namespace, row.name, -row.number))]


@pytest.mark.parametrize("model", MODELS)
def test_adapters_of_a_model_fit_it_and_no_other(team: Connection, model: str) -> None:
    form = form_of(model)
    bases = select(tables.version.c.id).where(
        tables.version.c.kind == "base", tables.architecture.c.digest == form.digest
    )
    bases = bases.join(tables.architecture, tables.architecture.c.id == tables.version.c.architecture_id)
    base_ids = set(team.scalars(bases))
    found = form_of_version(team, min(base_ids))
    assert found is not None
    form_id, stored = found
    assert stored == form
    fits = layout_fits(team, form, form_id)
    assert layout_fits(team, form) == fits
    assert len(fits) == 60
    layouts = {one.layout_id for one in fits if one.fits}
    adapters = tables.version.c.layout_id.in_(layouts) & (tables.version.c.kind == "adapter")
    assert set(team.scalars(select(tables.version.c.base_id).where(adapters))) == base_ids
    assert len(layouts) == 12
    pairs = layout_bases(team, layouts)
    present = adapters & (tables.version.c.state == "present")
    rows = team.execute(select(tables.version.c.layout_id, tables.version.c.base_id).where(present))
    assert pairs == {(layout_id, base_id) for layout_id, base_id in rows}
    excluded = set(sorted(pairs, key=str)[::3])
    every = naive_versions(team, layouts, excluded)
    assert fitting_versions(team, layouts, excluded=excluded) == every
    assert fitting_versions(team, layouts, excluded=excluded, search=Search(limit=10)) == every[:10]
    search = Search(where=parse_where(("meta.task = walk", "metric.reward > 500")), limit=5)
    wanted = [one for one in find_ids(team, Search(where=search.where)) if one in set(every)][:5]
    assert fitting_versions(team, layouts, excluded=excluded, search=search) == wanted


@pytest.mark.parametrize("team", ["sqlite"], indirect=True)
@pytest.mark.parametrize("limit", [None, 9])
def test_no_statement_reads_all_versions(team: Connection, limit: int | None) -> None:
    form = form_of("llama-7b")
    form_id = team.execute(
        select(tables.architecture.c.id).where(tables.architecture.c.digest == form.digest)
    ).scalar_one()
    layouts = [one.layout_id for one in layout_fits(team, form, form_id) if one.fits]
    for question in (
        lambda c: layout_fits(c, form, form_id),
        lambda c: layout_fits(c, form),
        lambda c: layout_bases(c, layouts),
        lambda c: fitting_versions(c, layouts, excluded=[(layouts[0], 3)], search=Search(limit=limit)),
    ):
        steps = [step for one in plans(team, question) for step in one]
        read = [step for step in steps if step.startswith("SCAN") and "version" in step]
        assert read == []
        assert not [step for step in steps if "ix_version_kind_id" in step]


@pytest.mark.parametrize("team", ["sqlite"], indirect=True)
def test_each_layout_is_probed_by_its_index(team: Connection) -> None:
    form = form_of("llama-7b")
    form_id = register_id(team, form)
    (steps,) = plans(team, lambda c: layout_fits(c, form, form_id))
    assert [step for step in scans([steps]) if not step.startswith("SCAN layout")] == []
    assert any("USING INDEX ix_version_layout_id_base_id_id (layout_id=?)" in step for step in steps)
    assert any("SEARCH there USING PRIMARY KEY (architecture_id=? AND path=?)" in step for step in steps)
    for step in plans(team, lambda c: layout_bases(c, [1, 2, 3]))[0]:
        assert "version" not in step or "layout_id=?" in step


def register_id(connection: Connection, form: ModelForm) -> int:
    of_form = tables.architecture.c.digest == form.digest
    return int(connection.execute(select(tables.architecture.c.id).where(of_form)).scalar_one())
