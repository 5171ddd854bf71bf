"""State documents: what was saved comes back, and what cannot is refused by the place where it stands."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.core.errors import InvalidInput, InvalidManifest
from registry.core.state_document import Inert, read_state, state_document


class Tensor:
    """Stands for a tensor: all that a document needs to know is its name."""

    def __init__(self, name: str) -> None:
        self.name = name


def name_of(value: object) -> str | None:
    return value.name if isinstance(value, Tensor) else None


KEYS = st.one_of(st.text(), st.integers(), st.booleans(), st.none(), st.tuples(st.integers(), st.text()))
LEAVES = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.binary()),
    st.complex_numbers(allow_nan=False),
    st.frozensets(st.one_of(st.integers(), st.text())),
    st.sets(st.integers()),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner),
        st.dictionaries(KEYS, inner),
        st.dictionaries(st.text(alphabet="$ab"), inner),
        st.tuples(inner, inner),
        st.builds(Inert, st.text(), inner, inner),
    ),
)


def same(one: Any, other: Any) -> bool:
    """Equality that tells 1 from 1.0 and True, and -0.0 from 0.0."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return len(one) == len(other) and all(
            same(a, b) and same(one[a], other[b])
            for a, b in zip(sorted(one, key=repr), sorted(other, key=repr), strict=True)
        )
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        return repr(one) == repr(other)
    return bool(one == other)


@given(TREES)
def test_a_tree_comes_back_as_it_was(tree: Any) -> None:
    assert same(read_state(state_document(tree, tensor_name=name_of), {}), tree)


def test_an_optimizer_with_tensors_comes_back() -> None:
    step, average = Tensor("state.0.step"), Tensor("state.0.exp_avg")
    tree = {"state": {0: {"step": step, "exp_avg": average}}, "param_groups": [{"lr": 1.0, "betas": (0.9, 0.999)}]}
    document = state_document(tree, tensor_name=name_of)
    assert read_state(document, {"state.0.step": step, "state.0.exp_avg": average}) == tree


def test_what_is_not_finite_comes_back() -> None:
    low, high, none = read_state(state_document([-math.inf, math.inf, math.nan], tensor_name=name_of), {})
    assert (low, high, math.isnan(none)) == (-math.inf, math.inf, True)


def test_what_is_no_plain_data_is_refused_by_its_place() -> None:
    with pytest.raises(InvalidInput, match=r"the state\['groups'\]\[1\]: a object is no plain data"):
        state_document({"groups": [1, object()]}, tensor_name=name_of)


def test_a_cycle_is_refused() -> None:
    tree: list[Any] = []
    tree.append(tree)
    with pytest.raises(InvalidInput, match="nested over 200 deep"):
        state_document(tree, tensor_name=name_of)


@pytest.mark.parametrize(
    "document",
    [
        b"{",
        b'{"$tensor":"gone"}',
        b'{"$call":"os.system"}',
        b'{"$tuple":[],"more":1}',
        b'{"$tuple":1}',
        b'{"$bytes":"*"}',
        b'{"$int":"z"}',
        b'{"$float":"x"}',
        b'{"$dict":[[1]]}',
        b'{"$set":[[1]]}',
        b'{"$opaque":1,"arguments":null,"state":null}',
        b"[" * 100_000,
        b"[" * 900 + b"]" * 900,
    ],
)
def test_what_is_no_state_document_is_refused(document: bytes) -> None:
    with pytest.raises(InvalidManifest):
        read_state(document, {})
