from __future__ import annotations

import re
import time
import warnings

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from registry.core import name_patterns
from registry.core.name_patterns import PatternTable, Undecided


def peft_key(keys: list[str], path: str) -> str | None:
    """PEFT 0.21's `get_pattern_key`, which gives the path back where we give None."""
    return next((key for key in keys if re.match(rf"(.*\.)?({key})$", path)), None)


PATHS = st.text("abq.1_", max_size=12)
PLAIN = st.text("abq.1_^", max_size=6)
ATOMS = st.sampled_from(
    ["a", "b", "q", ".", r"\.", r"\d", r"\w", r"\S", "[ab]", "[^.]", "[a-q1]", "[]a]", r"[\d.]", "^", "$", "1", "_"]
)
COUNTS = st.sampled_from(["", "", "", "*", "+", "?", "*?", "+?", "??", "{2}", "{1,2}", "{,2}", "{1,}", "{2,1}", "{0}"])
EXPRESSIONS = st.recursive(
    st.builds(str.__add__, ATOMS, COUNTS),
    lambda parts: st.one_of(
        st.builds("".join, st.lists(parts, max_size=4)),
        st.builds(lambda inner, count: f"({inner}){count}", parts, COUNTS),
        st.builds(lambda inner: f"(?:{inner})", parts),
        st.builds("|".join, st.lists(parts, min_size=2, max_size=3)),
    ),
    max_leaves=8,
)


@given(st.lists(PLAIN, max_size=6), PATHS)
@example(["q.a", "q_a"], "b.q_a")
@example(["^a.b", "b"], "a.b")
@example([""], "a.")
def test_plain_keys_are_found_as_peft_finds_them(keys: list[str], path: str) -> None:
    table = PatternTable(keys)
    try:
        found = table.find(path)
    except Undecided:
        assert table.unreadable  # a caret in the middle, counted or not, is an expression
        return
    assert found == peft_key(keys, path)


@given(st.lists(EXPRESSIONS, min_size=1, max_size=3), PATHS)
@example(["(a|ab)(c|bcd)?q$"], "abq")
@example(["a$|b"], "a.b")
@example(["(^)*a"], "b.a")
@example([r"layers\.(1|2)\.q_proj", "q_proj"], "layers.1.q_proj")
@example(["(()|a)*b"], "aab")
def test_expressions_are_found_as_peft_finds_them(keys: list[str], path: str) -> None:
    table = PatternTable(keys)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `re` warns of sets that may mean something else one day
        try:
            for key in keys:
                re.compile(f"({key})")
        except re.error:
            assert table.unreadable
            return
        try:
            found = table.find(path)
        except Undecided:
            return
        assert found == peft_key(keys, path)


@given(EXPRESSIONS)
def test_what_is_generated_here_is_mostly_evaluated(key: str) -> None:
    """So that the test above does not pass by refusing everything."""
    try:
        re.compile(f"({key})")
    except re.error:
        return
    assume("^" not in key)
    assume("$" not in key)
    assert PatternTable([key]).unreadable == ()


@pytest.mark.parametrize(
    ("key", "path", "matches"),
    [
        ("q_proj", "model.layers.0.self_attn.q_proj", True),
        ("proj", "model.layers.0.self_attn.q_proj", False),
        ("self_attn.q_proj", "model.layers.0.self_attn.q_proj", True),
        ("^model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj", True),
        ("^layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj", False),
        (r".*\.layers\.(0|1)\..*", "model.layers.1.self_attn.q_proj", True),
        (r".*\.layers\.[0-9]\.self_attn\.(q|v)_proj", "model.layers.1.self_attn.k_proj", False),
        ("q_proj|v_proj", "x.v_proj", True),
    ],
)
def test_the_forms_that_people_write_are_evaluated(key: str, path: str, matches: bool) -> None:
    assert (PatternTable([key]).find(path) == key) is matches
    assert (peft_key([key], path) == key) is matches


@pytest.mark.parametrize(
    "key", ["a(?=b)", r"(a)\1", "(?i)a", "a++", "a{2}{3}", "(", "*a", "[a", "a)", r"\bq", "(?P<n>a)", "a\\"]
)
def test_what_is_malformed_or_not_supported_is_undecided(key: str) -> None:
    table = PatternTable(["q_proj", key, "v_proj"])
    assert table.unreadable == (key,)
    assert table.find("x.q_proj") == "q_proj", "an earlier key decides"
    with pytest.raises(Undecided):
        table.find("x.v_proj")


HOSTILE = [
    "(a+)+b",
    "(a|a)*b",
    "(a|aa)+b",
    "(.*)*b",
    ".*" * 100 + "b",
    "(a?){25}a{25}",
    "(" * 200 + "a" + ")" * 200,
    "(((a{9}){9}){9}){9}",
    "((){1000}){1000}",
    "a{9999}",
    "(a*)*" * 80,
    "|".join(["a"] * 240),
]


@pytest.mark.parametrize("key", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_expression_costs_little(key: str) -> None:
    started = time.process_time()
    table = PatternTable([key])
    for number in range(300):
        try:
            found = table.find(f"{'a' * 60}.{number}." + "a" * 60)
        except Undecided:
            continue
        assert found in (None, key)
    assert time.process_time() - started < 5


def test_many_hostile_expressions_share_one_budget() -> None:
    started = time.process_time()
    table = PatternTable([f"(a|b|.)*{number}x" for number in range(name_patterns.MAX_EXPRESSIONS)])
    undecided = 0
    for number in range(2000):
        try:
            table.find(f"layers.{number}." + "ab." * 20)
        except Undecided:
            undecided += 1
    assert undecided
    assert time.process_time() - started < 10


def test_a_plain_key_for_each_of_ten_thousand_modules_is_looked_up_at_once() -> None:
    """EVA writes such a rank_pattern."""
    paths = [f"model.layers.{layer}.mlp.experts.{expert}.up_proj" for layer in range(80) for expert in range(125)]
    started = time.process_time()
    table = PatternTable(paths)
    assert all(table.find(path) == path for path in paths)
    assert table.find("model.layers.80.mlp.experts.0.up_proj") is None
    assert time.process_time() - started < 5


@pytest.mark.parametrize("path", ["a" * 1001, "a." * 61, "a\nb"])
def test_a_path_beyond_the_limits_is_undecided(path: str) -> None:
    with pytest.raises(Undecided):
        PatternTable(["a"]).find(path)


def test_more_keys_than_the_limit_are_undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(name_patterns, "MAX_KEYS", 2)
    with pytest.raises(Undecided, match="3 keys"):
        PatternTable(["a", "b", "c"]).find("a")


def test_without_keys_nothing_matches() -> None:
    assert PatternTable([]).find("a.b") is None
