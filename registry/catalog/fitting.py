"""What of a catalog fits a model: targets of adapters joined with modules, over distinct layouts, however many versions
there are. Where sizes do not decide (experts, attention, quantised weights) it says so, and the rules of `compat`
go on. Statements are fast without statistics; `benchmarks/fits.py` measures them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    FromClause,
    Integer,
    Select,
    Text,
    and_,
    case,
    cast,
    exists,
    func,
    literal_column,
    not_,
    or_,
    select,
    tuple_,
    union_all,
)

from registry.catalog.conditions import Clause
from registry.catalog.forms import module_row
from registry.catalog.json_rows import elements, listed, listed_pairs, members
from registry.catalog.rows import batches
from registry.catalog.search import Search, find_ids
from registry.catalog.tables import finding, layout, module, target, version
from registry.core.layout import NOT_IN_A_NAME
from registry.core.model_form import ModelForm

UNCLEAR = ("attention", "experts", "quantised", "other")
"""Kinds of modules whose sizes do not tell whether a LoRA goes in."""
_OPEN_UNIT = 2**32
_SIZES = ("in_features", "out_features", "groups", "rows", "columns")
_NONE = literal_column("0", BigInteger)
_SURE = literal_column("1", BigInteger)
_OPEN = literal_column(str(_OPEN_UNIT + 1), BigInteger)
"""One sum counts two things: modules that match in its lower half, and above those of them that are open."""


@dataclass(frozen=True, slots=True)
class LayoutFit:
    """How a layout of adapters fits a model.

    Attributes:
        matched: targets whose module is there in their sizes; those where this cannot be told are among them.
        total: its targets; 0 where its tensors are no LoRA's.
        open: there are targets of which only the rules can tell.
    """

    layout_id: int
    matched: int
    total: int
    open: bool

    @property
    def fits(self) -> bool:
        """All of its targets match, as far as can be told here."""
        return 0 < self.total == self.matched


def layout_fits(connection: Connection, form: ModelForm, form_id: int | None = None) -> list[LayoutFit]:
    """Every layout that a present adapter has, held against a model; by row id. Nothing is written.

    A model with a head and its body name the same modules with and without `form.prefix`. Of a version either may be
    loaded, so a layout that does not match is tried under the other names, and what matches then is open.

    Args:
        form_id: its row, where it is in the catalog; None: the modules go along with the question.
    """
    found = _fits(connection, form, form_id, "", "")
    prefix = f"{form.prefix}." if form.prefix and form_id is not None else ""
    if prefix and not all(fit.fits for fit in found.values()):
        for strip, add in ((prefix, ""), ("", prefix)):
            for layout_id, other in _fits(connection, form, form_id, strip, add).items():
                if other.matched > found[layout_id].matched:
                    found[layout_id] = replace(other, open=True)
    return [found[layout_id] for layout_id in sorted(found)]


def _fits(connection: Connection, form: ModelForm, form_id: int | None, strip: str, add: str) -> dict[int, LayoutFit]:
    dialect = connection.dialect.name
    there, owner = _sources(form, form_id, dialect)
    path = _path(strip, add)
    bare = func.split_part(target.c.kind, "+", 1) if dialect == "postgresql" else _before_plus(target.c.kind)
    joined = layout.outerjoin(target, target.c.layout_id == layout.c.id)
    joined = joined.outerjoin(there, _is_at(there, form_id, path))
    asked = case((bare == "parameter", _owner(path)))
    if any(one.kind == "attention" for one in form.modules):
        asked = case((or_(bare == "parameter", path.like("%.out_proj")), _owner(path)))
    joined = joined.outerjoin(owner, _is_at(owner, form_id, asked))
    counted = func.sum(_verdict(bare, path, there, owner, exact=form.exact))
    statement = (
        select(layout.c.id, func.count(target.c.module).label("total"), counted.label("counted"))
        .select_from(joined)
        .where(_has_adapter(dialect))
        .group_by(layout.c.id)
    )
    fits = {}
    for row in connection.execute(statement):
        opened, matched = divmod(int(row.counted), _OPEN_UNIT)
        fits[row.id] = LayoutFit(row.id, matched, row.total, opened > 0)
    return fits


def _has_adapter(dialect: str) -> ColumnElement[bool]:
    """Asked of the index, layout by layout: its order says so to both planners, which else might read all versions."""
    first = select(version.c.id).where(version.c.layout_id == layout.c.id, _is_present(dialect)).correlate(layout)
    return first.order_by(version.c.base_id, version.c.id).limit(1).scalar_subquery().is_not(None)


def _is_adapter(dialect: str) -> ColumnElement[bool]:
    # The index of kinds, which SQLite might prefer without statistics, would be read to its end.
    kind = version.c.kind if dialect == "postgresql" else version.c.kind + ""
    return kind == "adapter"


def _is_present(dialect: str) -> ColumnElement[bool]:
    return and_(version.c.state == "present", _is_adapter(dialect))


def _before_plus(kind: ColumnElement[str]) -> ColumnElement[str]:
    return func.substr(kind, 1, func.instr(kind + "+", "+") - 1)


def _path(strip: str, add: str) -> ColumnElement[str]:
    path: ColumnElement[str] = target.c.module
    if strip:
        begins = func.substr(path, 1, len(strip)) == strip
        return case((begins, func.substr(path, len(strip) + 1)), else_=path)
    return add + path if add else path


def _owner(path: ColumnElement[str]) -> ColumnElement[str]:
    """The path before its last dot: what is left once all that is no dot is taken from its end, and then the dot."""
    return func.rtrim(func.rtrim(path, func.replace(path, ".", "")), ".")


# ---------------------------------------------------------------- the modules of a model


def _sources(form: ModelForm, form_id: int | None, dialect: str) -> tuple[FromClause, FromClause]:
    """The modules of the model, twice: one for the module of a target, one for the module that holds it."""
    if form_id is not None:
        return module.alias("there"), module.alias("owner")
    rows = _at_hand(form, dialect)
    return rows.alias("there"), rows.alias("owner")


def _is_at(source: FromClause, form_id: int | None, path: ColumnElement[str]) -> ColumnElement[bool]:
    same = source.c.path == path
    return same if form_id is None else and_(source.c.architecture_id == form_id, same)


def _at_hand(form: ModelForm, dialect: str) -> Any:
    """A form as a table within the statement, from two parameters: the paths, each with the place of its sizes, and the
    sizes, of which a model of 60,000 modules has some dozens."""
    sizes: dict[tuple[Any, ...], int] = {}
    paths: dict[str, int] = {}
    for one in form.modules:
        if not NOT_IN_A_NAME.search(one.path):  # no target has such a name
            row = module_row(one)
            key = (row["kind"], *(row[name] for name in _SIZES), row["bias"])
            paths[one.path] = sizes.setdefault(key, len(sizes))
    given = [[*key[:-1], None if key[-1] is None else int(key[-1])] for key in sizes]
    named, path, at = members(paths, dialect)
    numbered, place, value = elements(given, dialect)
    columns = [value(number, BigInteger).label(name) for number, name in enumerate(_SIZES, 1)]
    bias = value(1 + len(_SIZES), Integer) == 1
    sized = select(place.label("place"), value(0, Text).label("kind"), *columns, bias.label("bias"))
    known = sized.select_from(numbered).cte("sized").prefix_with("MATERIALIZED")
    rows = select(path.label("path"), *(one for one in known.c if one.key != "place"))
    return rows.select_from(named.join(known, known.c.place == at)).cte("modules").prefix_with("MATERIALIZED")


# ---------------------------------------------------------------- whether a target matches


def _verdict(
    bare: ColumnElement[str], path: ColumnElement[str], there: FromClause, owner: FromClause, *, exact: bool
) -> ColumnElement[int]:
    """0, `_SURE` or `_OPEN` of one target, with what is at its path and what holds it (NULLs: nothing)."""
    kind, given, gives = there.c.kind, target.c.in_features, target.c.out_features
    straight = and_(given == there.c.in_features, gives == there.c.out_features)
    turned = and_(given == there.c.out_features, gives == there.c.in_features)
    unclear = kind.in_(_texts(UNCLEAR))

    def of_kinds(*kinds: str) -> ColumnElement[int]:
        return case(
            (kind.in_(_texts(kinds)), _decided(straight)),
            (kind == _text("matrix"), _decided(or_(straight, turned))),
            (unclear, _OPEN),
            else_=_NONE,
        )

    linear = case(
        # torch's MultiheadAttention reads the weight of its out_proj, and never calls it.
        (owner.c.kind == _text("attention"), _OPEN),
        else_=of_kinds("linear", "transformers_conv1d"),
    )
    full = case(
        (or_(kind.is_(None), unclear), _OPEN),  # a head that the model was saved without is made for its task
        (or_(gives != there.c.rows, given != there.c.columns), _NONE),
        (and_(gives == there.c.rows, given == there.c.columns), _SURE),
        (and_(gives == there.c.rows, given.is_(None), there.c["columns"].is_(None)), _SURE),
        else_=_OPEN,
    )
    # Where several parameters of one module are wrapped, which is which stands in no file.
    nested = path.like("%.base_layer")
    parameter = case((or_(kind.is_not(None), owner.c.kind.is_not(None), nested), _OPEN), else_=_NONE)
    found = {
        "linear": linear,
        "embedding": of_kinds("embedding"),
        **{name: _convolution(name, there, exact=exact) for name in ("conv1d", "conv2d", "conv3d")},
        "bias": case((and_(there.c.bias, gives == there.c.out_features), _SURE), else_=_OPEN),
        "token": case((unclear, _OPEN), else_=_decided(gives == there.c["columns"])),
    }
    return case(
        (bare == _text("full"), full),
        (bare == _text("parameter"), parameter),
        (kind.is_(None), _NONE),
        else_=case({_text(name): verdict for name, verdict in found.items()}, value=bare, else_=_OPEN),
    )


def _convolution(name: str, there: FromClause, *, exact: bool) -> ColumnElement[int]:
    """PEFT's A takes the channels of all groups. Of a convolution that was only saved the channels of one are known."""
    kind, given, groups, channels = there.c.kind, target.c.in_features, there.c.groups, there.c.in_features
    gives = target.c.out_features == there.c.out_features
    grouped = (groups > 1) if exact else target.c.kind.like("%+grouped%")
    of_one = given * groups == channels if exact else given % func.nullif(channels, 0) == 0
    some = and_(gives, or_(given == channels, of_one))
    return case(
        (and_(kind == _text(name), grouped), case((not_(some), _NONE), else_=_OPEN)),
        (kind == _text(name), _decided(and_(gives, given == channels))),
        (kind.in_(_texts(UNCLEAR)), _OPEN),
        else_=_NONE,
    )


def _decided(same: ColumnElement[bool]) -> ColumnElement[int]:
    """Open where a size that is not known decides."""
    return case((same, _SURE), (not_(same), _NONE), else_=_OPEN)


def _text(known: str) -> ColumnElement[str]:
    """One of our own words, which need not travel as a parameter."""
    return literal_column(f"'{known}'", Text)


def _texts(known: Sequence[str]) -> list[ColumnElement[str]]:
    return [_text(one) for one in known]


# ---------------------------------------------------------------- versions


def layout_bases(connection: Connection, layout_ids: Collection[int]) -> set[tuple[int, int | None]]:
    """(layout, base version) of present adapters, each once; None: no base is recorded.

    The index is asked for the next base of each layout, so the versions between are not read.
    """
    present = _is_present(connection.dialect.name)
    found: set[tuple[int, int | None]] = set()
    for batch in batches(sorted(set(layout_ids))):
        of_layout = version.c.layout_id == layout.c.id
        first = select(version.c.base_id).where(of_layout, version.c.base_id.is_not(None)).correlate(layout)
        pair = (
            select(layout.c.id.label("layout_id"), _lowest(first).label("base_id"))
            .where(layout.c.id.in_(batch))
            .cte("pair", recursive=True)
        )
        further = select(version.c.base_id).where(
            version.c.layout_id == pair.c.layout_id, version.c.base_id > pair.c.base_id
        )
        step = select(pair.c.layout_id, _lowest(further.correlate(pair))).where(pair.c.base_id.is_not(None))
        pair = pair.union_all(step)
        based = select(version.c.id).where(
            version.c.layout_id == pair.c.layout_id, version.c.base_id == pair.c.base_id, present
        )
        alone = select(version.c.id).where(of_layout, version.c.base_id.is_(None), present)
        statement = union_all(
            select(pair.c.layout_id, pair.c.base_id).where(pair.c.base_id.is_not(None), _any(based.correlate(pair))),
            select(layout.c.id, cast(None, BigInteger)).where(layout.c.id.in_(batch), _any(alone.correlate(layout))),
        )
        found.update((layout_id, base_id) for layout_id, base_id in connection.execute(statement))
    return found


def _lowest(bases: Select[int]) -> ColumnElement[int]:
    return bases.order_by(version.c.base_id).limit(1).scalar_subquery()


def _any(versions: Select[int]) -> ColumnElement[bool]:
    return versions.order_by(version.c.id).limit(1).scalar_subquery().is_not(None)


def fitting_versions(
    connection: Connection,
    layout_ids: Collection[int],
    *,
    excluded: Collection[tuple[int, int | None]] = (),
    search: Search | None = None,
) -> list[int]:
    """Row ids of present adapters of these layouts of which no error was found; in the order of the search, which is by
    name, newest version first, where it says no other.

    Args:
        excluded: (layout, base version) whose versions are left out.
        search: further conditions, a limit and an order.

    Raises:
        InvalidQuery, InvalidReference, NotFound: of the search.
    """
    if not layout_ids:
        return []
    of_layouts = fitting_clause(connection, layout_ids, excluded)
    return find_ids(connection, search or Search(), of_layouts)


def fitting_clause(
    connection: Connection,
    layout_ids: Collection[int],
    excluded: Collection[tuple[int, int | None]] = (),
) -> Clause:
    """The condition of `fitting_versions`, for a search."""
    dialect = connection.dialect.name
    of_layouts: ColumnElement[bool] = version.c.layout_id.in_(listed(sorted(set(layout_ids)), dialect))
    if excluded:
        pairs = sorted({(layout_id, base_id or 0) for layout_id, base_id in excluded})
        pair = tuple_(version.c.layout_id, func.coalesce(version.c.base_id, 0))
        of_layouts = and_(of_layouts, pair.not_in(listed_pairs(pairs, dialect)))
    wrong = exists().where(finding.c.version_id == version.c.id, finding.c.severity == "error").correlate(version)
    asked = and_(of_layouts, _is_adapter(dialect), ~wrong)
    return Clause(asked, select(version.c.id).where(of_layouts))
