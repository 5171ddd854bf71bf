"""Plain values and what is rebuilt as such: containers, numbers, dates, paths, numpy, OmegaConf, dill."""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import pathlib
import pickle
import types

import numpy
import pytest
import torch

from registry.core.errors import InvalidInput, RegistryError, UnsupportedTensor
from registry.formats.pickles import Opaque, OpaqueGlobal, read_pickle_bytes
from tests.formats.pickles import assembler as asm
from tests.formats.pickles.compare import assert_same
from tests.formats.pickles.test_limits import array

protocols = pytest.mark.parametrize("protocol", range(6))


def tree_of(raw: bytes) -> object:
    return read_pickle_bytes(raw, what="values").tree


@protocols
def test_plain_data_reads_as_pickle_itself_reads_it(protocol: int) -> None:
    shared = [1]
    value = {
        "none": None,
        "flags": [True, False],
        "integers": [0, -1, 255, 256, -(2**31), 2**31, 2**63, -(2**70), 2**2000],
        "floats": [0.0, -1.5, 1e300, float("inf")],
        "texts": ["", "a", "ä\u20ac\U0001f600", "line\nbreak\\\x00'\"", "x" * 300],
        "bytes": [b"", b"\x00\xff", b"y" * 300],
        "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
        "sets": [set(), {1, "a"}, frozenset({(1, 2)})],
        "dict": {1: 2, (1, "a"): 3, None: 4, 2.5: 5, b"k": 6},
        "shared": [shared, shared],
        "complex": 1 + 2j,
        "range": range(1, 10, 2),
        "slice": slice(1, None, 2),
    }
    raw = pickle.dumps(value, protocol)
    found = tree_of(raw)
    assert found == value == pickle.loads(raw)
    assert isinstance(found, dict)
    assert found["shared"][0] is found["shared"][1]


@protocols
def test_a_circle_of_plain_data_is_the_same_circle(protocol: int) -> None:
    circle: list[object] = [1]
    circle.append({"self": circle})
    found = tree_of(pickle.dumps(circle, protocol))
    assert isinstance(found, list)
    assert found[1]["self"] is found


@protocols
def test_other_containers_become_plain_ones(protocol: int) -> None:
    ordered = collections.OrderedDict(b=1, a=2)
    default: collections.defaultdict[str, list[int]] = collections.defaultdict(list, x=[1])
    value = [ordered, default, collections.Counter("aab"), collections.deque([1, 2], 5), bytearray(b"ab")]
    found = tree_of(pickle.dumps(value, protocol))
    assert found == [{"b": 1, "a": 2}, {"x": [1]}, {"a": 2, "b": 1}, [1, 2], b"ab"]


@pytest.mark.parametrize("protocol", range(2, 6))
def test_namespaces_dates_and_paths_become_plain_data(protocol: int) -> None:
    zone = datetime.timezone(datetime.timedelta(hours=2))
    value = [
        argparse.Namespace(lr=0.1, layers=[1, 2]),
        types.SimpleNamespace(a=1),
        datetime.datetime(2026, 2, 28, 23, 59, 58, 123456, tzinfo=zone),
        datetime.datetime(2026, 10, 25, 2, 30, fold=1),
        datetime.date(1999, 12, 31),
        datetime.time(1, 2, 3, 4),
        datetime.timedelta(days=-1, seconds=5),
        pathlib.PurePosixPath("/a/b.ckpt"),
        pathlib.PurePosixPath("a"),
        pathlib.PurePosixPath("."),
        pathlib.PureWindowsPath("C:\\x\\y"),
    ]
    result = read_pickle_bytes(pickle.dumps(value, protocol), what="values")
    assert result.opaque == ()
    assert result.tree == [
        {"lr": 0.1, "layers": [1, 2]},
        {"a": 1},
        *value[2:7],
        "/a/b.ckpt",
        "a",
        ".",
        "C:\\x\\y",
    ]
    assert isinstance(result.tree, list)
    assert result.tree[3].fold == pickle.loads(pickle.dumps(value[3], protocol)).fold


@protocols
def test_numbers_and_arrays_of_numpy(protocol: int) -> None:
    generator = numpy.random.default_rng(1)
    arrays = {
        kind: generator.integers(0, 2, (2, 3)).astype(kind)
        for kind in ["?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "c8"]
    }
    arrays["fortran"] = numpy.asfortranarray(generator.random((3, 4)))
    arrays["0-d"] = numpy.array(3.5)
    arrays["empty"] = numpy.zeros((0, 2))
    found = tree_of(pickle.dumps(arrays, protocol))
    assert_same(found, {key: torch.from_numpy(value) for key, value in arrays.items()}, io.BytesIO())
    scalars = [numpy.float32(0.5), numpy.int64(-3), numpy.bool_(True), numpy.float64(2.5), numpy.complex64(1 + 2j)]
    texts = [numpy.str_("grün"), numpy.bytes_(b"abc")]
    found = tree_of(pickle.dumps([*scalars, *texts], protocol))
    assert found == [0.5, -3, True, 2.5, 1 + 2j, "grün", b"abc"]
    assert isinstance(found, list)
    assert [type(value) for value in found] == [float, int, bool, float, complex, str, bytes]


@pytest.mark.parametrize(
    "value",
    [
        numpy.array([object()], dtype=object),
        numpy.array(["a"]),
        numpy.zeros(2, dtype=[("a", "f4")]),
        numpy.array(["2026-01-01"], dtype="M8[D]"),
        numpy.zeros(2, dtype=">f4"),
        numpy.zeros(2, dtype="c16"),
        numpy.datetime64("2026-01-01"),
    ],
    ids=lambda value: str(getattr(value, "dtype", value)),
)
def test_an_array_of_anything_but_common_numbers_is_refused(value: object) -> None:
    with pytest.raises(RegistryError, match=r"numpy|builtins\.object"):
        tree_of(pickle.dumps({"a": value}, 4))


@pytest.mark.parametrize(
    "code",
    [
        array((2,), b"1234567"),
        array((2.0,), b"12345678"),
        array([2], b"12345678"),
        array((2,), [1, 2]),
        array((2,), None),
        array((-2,), b"12345678"),
        array((2,), b"12345678", kind="O"),
        array((2,), b"12345678", kind="f4,f4"),
        array((2,), b"12345678", kind=4),
        array((2,), b"12345678", state=(3, ">", None, None, None, -1, -1, 0)),
        array((2,), b"12345678", state=(3, "<", None, ("a",), {}, 8, 1, 0)),
        array((2,), b"12345678", state=(3, "x", None, None, None, -1, -1, 0)),
        array((2,), b"12345678", state=[]),
        array((2,), b"12345678", cls=asm.name("numpy", "matrix")),
        asm.build(asm.call(asm.name("numpy.core.multiarray", "_reconstruct"), asm.name("numpy", "ndarray"), 0, 0), 1),
        asm.call(asm.name("numpy.core.multiarray", "_reconstruct"), asm.name("numpy", "ndarray"), 0, 0),
        asm.call(asm.name("numpy.core.multiarray", "_reconstruct")),
        asm.call(asm.name("numpy", "dtype"), "f4"),
        asm.call(asm.name("numpy.core.multiarray", "scalar"), "f4", b"1234"),
        asm.call(asm.name("numpy._core.numeric", "_frombuffer"), b"1234", "f4", (1,), "C"),
        asm.call(asm.name("numpy._core.numeric", "_frombuffer")),
    ],
    ids=str,
)
def test_a_damaged_array_is_refused(code: asm.Code) -> None:
    with pytest.raises(InvalidInput):
        tree_of(asm.pickle(code))


# ------------------------------------------------------------------------------------------- classes


def test_an_unknown_class_is_inert_data_with_all_that_was_saved() -> None:
    cls = asm.name("mypkg.models", "Outer.Inner")
    value = asm.build(asm.new(cls, 1, "a"), {"x": [1]})
    listed = asm.Code(asm.value(asm.new(asm.name("mypkg", "List"))) + b"(K\x01K\x02e")
    entries = asm.Code(asm.value(asm.new(asm.name("mypkg", "Dict"))) + b"K\x01K\x02s")
    result = read_pickle_bytes(asm.pickle([value, listed, entries]), what="classes")
    assert isinstance(result.tree, list)
    first, second, third = result.tree
    assert (first.type_name, first.arguments, first.state, first.items) == (
        "mypkg.models.Outer.Inner",
        (1, "a"),
        {"x": [1]},
        None,
    )
    assert (second.items, third.items) == ([1, 2], {1: 2})
    assert result.opaque == ("mypkg.Dict", "mypkg.List", "mypkg.models.Outer.Inner")
    assert str(first).startswith("Opaque(type_name='mypkg.models.Outer.Inner'")


def test_a_class_with_keywords_and_slots() -> None:
    code = asm.Code(asm.value(asm.name("mypkg", "A")) + asm.value((1,)) + asm.value({"k": 2}) + b"\x92")
    found = tree_of(asm.pickle(asm.build(code, (None, {"slot": 3}))))
    assert isinstance(found, Opaque)
    assert (found.arguments, found.keywords, found.state) == ((1,), {"k": 2}, (None, {"slot": 3}))


def test_a_function_that_is_only_named_is_a_name() -> None:
    result = read_pickle_bytes(asm.pickle({"_target_": asm.name("os", "system")}), what="names")
    assert result.tree == {"_target_": OpaqueGlobal("os", "system")}
    assert result.opaque == ("os.system",)


def test_a_reconstructed_class_takes_the_content_of_its_base() -> None:
    def made(base: str, content: object) -> Opaque:
        code = asm.call(
            asm.name("copy_reg", "_reconstructor"), asm.name("mypkg", "A"), asm.name("__builtin__", base), content
        )
        found = tree_of(asm.pickle(code))
        assert isinstance(found, Opaque)
        return found

    assert made("object", None).items is None
    assert made("list", [1]).items == [1]
    assert made("dict", {1: 2}).items == {1: 2}
    assert made("unicode", "text").arguments == ("text",)


# ------------------------------------------------------------------------------------------- OmegaConf and dill


def node(value: object, kind: str = "AnyNode") -> asm.Code:
    state = {"_metadata": asm.new(asm.name("omegaconf.base", "Metadata")), "_parent": None, "_val": value}
    return asm.build(asm.new(asm.name("omegaconf.nodes", kind)), state)


def config(content: object, kind: str = "dict") -> asm.Code:
    cls = asm.name(f"omegaconf.{kind}config", f"{kind.capitalize()}Config")
    state = {"_metadata": asm.new(asm.name("omegaconf.base", "ContainerMetadata")), "_parent": None}
    return asm.build(asm.new(cls), state | {"_content": content})


def test_a_configuration_is_the_data_in_it() -> None:
    inner = config([node(1), config({"x": node(None)}), node("${a.b}")], "list")
    union = asm.build(asm.new(asm.name("omegaconf.base", "UnionNode")), {"_content": node(2.5, "FloatNode")})
    tree = config(
        {
            "a": inner,
            "none": config(None),
            "interpolated": config("${other}", "list"),
            "missing": node("???", "StringNode"),
            "flag": node(True, "BooleanNode"),
            "union": union,
            1: node(3, "IntegerNode"),
        }
    )
    result = read_pickle_bytes(asm.pickle(tree), what="cfg")
    assert result.tree == {
        "a": [1, {"x": None}, "${a.b}"],
        "none": None,
        "interpolated": "${other}",
        "missing": "???",
        "flag": True,
        "union": 2.5,
        1: 3,
    }
    assert result.opaque == ()


def test_a_part_of_a_configuration_that_leads_back_to_the_whole_is_complete() -> None:
    # cfg.policy, saved by itself: its parent is built while it is still without content.
    whole = config({"policy": asm.Code(b"h\x00"), "seed": node(1)})
    state = asm.value({"_parent": whole, "_content": {"lr": node(0.1)}})
    raw = b"\x80\x02comegaconf.dictconfig\nDictConfig\n)\x81q\x00" + state + b"b."
    assert tree_of(raw) == {"lr": 0.1}


@pytest.mark.parametrize(
    "code",
    [
        asm.new(asm.name("omegaconf.nodes", "AnyNode")),
        asm.build(asm.new(asm.name("omegaconf.nodes", "AnyNode")), {"value": 1}),
        asm.build(asm.new(asm.name("omegaconf.dictconfig", "DictConfig")), 1),
        config([1]),
        config({1: 2}, "list"),
    ],
    ids=str,
)
def test_a_damaged_configuration_is_refused(code: asm.Code) -> None:
    with pytest.raises(InvalidInput):
        tree_of(asm.pickle({"cfg": code}))


def test_types_that_dill_names_are_names() -> None:
    for module in ("dill._dill", "dill.dill"):
        result = read_pickle_bytes(asm.pickle(asm.call(asm.name(module, "_load_type"), "dict")), what="dill")
        assert result.tree == OpaqueGlobal("builtins", "dict")
        assert result.opaque == ()


@pytest.mark.parametrize(
    "code",
    [
        asm.call(asm.name("collections", "OrderedDict"), 1),
        asm.call(asm.name("collections", "OrderedDict"), [(1, 2, 3)]),
        asm.call(asm.name("collections", "OrderedDict"), [1]),
        asm.call(asm.name("collections", "defaultdict"), 1),
        asm.call(asm.name("builtins", "set"), [[]]),
        asm.call(asm.name("builtins", "set"), 1),
        asm.call(asm.name("builtins", "dict"), [1], [2]),
        asm.call(asm.name("builtins", "int"), "1.5"),
        asm.call(asm.name("builtins", "int"), float("nan")),
        asm.call(asm.name("builtins", "float"), 10**400),
        asm.call(asm.name("builtins", "float"), "x"),
        asm.call(asm.name("builtins", "complex"), "1"),
        asm.call(asm.name("builtins", "complex"), 10**400, 0),
        asm.call(asm.name("builtins", "str"), 1),
        asm.call(asm.name("builtins", "slice"), 1, 2, []),
        asm.call(asm.name("builtins", "range"), 1, 2, 0),
        asm.call(asm.name("builtins", "object"), 1),
        asm.call(asm.name("_codecs", "encode"), "\u20ac", "latin1"),
        asm.call(asm.name("_codecs", "encode"), 1, "utf-8", 3),
        asm.call(asm.name("pathlib", "PosixPath"), 1),
        asm.call(asm.name("datetime", "date"), b"\x00\x00\x00\x00"),
        asm.call(asm.name("datetime", "date"), b"\x00"),
        asm.call(asm.name("datetime", "datetime"), b"\xff" * 10),
        asm.call(asm.name("datetime", "datetime"), b"\x07\xd0\x01\x01" + bytes(6), 1),
        asm.call(asm.name("datetime", "time"), b"\xff" * 6),
        asm.call(asm.name("datetime", "timedelta"), 10**20, 0, 0),
        asm.call(asm.name("datetime", "timezone"), 1),
        asm.call(asm.name("argparse", "Namespace"), 1),
        asm.build(asm.call(asm.name("types", "SimpleNamespace")), 1),
        asm.call(asm.name("torch", "Size"), 1),
        asm.call(asm.name("torch", "device"), 1),
        asm.call(asm.name("torch.serialization", "_get_layout"), "x"),
        asm.call(asm.name("torch.storage", "_load_from_bytes"), 1),
        asm.call(asm.name("copyreg", "_reconstructor"), 1),
        asm.call(asm.name("dill._dill", "_load_type"), 1),
        asm.Code(asm.value(asm.name("collections", "OrderedDict")) + b"NR"),
        asm.Code(asm.value(asm.name("mypkg", "A")) + b"N\x81"),
        asm.Code(asm.value(asm.name("mypkg", "A")) + b")N\x92"),
    ],
    ids=str,
)
def test_wrong_arguments_of_a_known_name_are_refused(code: asm.Code) -> None:
    with pytest.raises(InvalidInput) as refused:
        tree_of(asm.pickle(code))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "raw",
    [
        b".", b"0.", b"1.", b"2.", b"a.", b"]a.", b"e.", b"]e.", b"s.", b"u.", b"}(Nu.", b"d.", b"(Nd.", b"t.", b"l.",
        b"\x85.", b"N\x86.", b"NN\x87.", b"h\x00.", b"g0\n.", b"gx\n.", b"g-1\n.", b"j\0\0\0\0.", b"q\x00.", b"R.",
        b"NR.", b"b.", b"Nb.", b"\x81.", b"\x92.", b"\x93.", b"NN\x93.", b"o.", b"(o.", b"i\n\n.", b"(ios\n.", b"Q.",
        b"P\n.", b"NN.", b"(N.", b"(.", b"\x8f(]\x90.", b"]\x90.", b"N(N\x90.", b"NNa.", b"NNNs.", b"\x97.", b"\x98.",
        b"Fx\n.", b"F1__0\n.", b"Ix\n.", b"I\n.", b"L\n.", b"Lx\n.", b"S\n.", b"S'\n.", b"S'a\n.", b"S'\\q'\n.",
        b"S'\\x1'\n.", b"V\\u12\n.", b"V\\ud800\n.", b"X\x01\0\0\0\xff.", b"X\x03\0\0\0\xed\xa0\x80.", b"c\xff\nx\n.",
        b"c\n\n.", b"cos\n.", b"}](NN\x86Nu.", b"I" + b"\xc2\xb2" + b"\n.", b"G\0.", b"\x80.", b"", b"N",
    ],
)  # fmt: skip
def test_instructions_that_do_not_fit_together_are_refused(raw: bytes) -> None:
    with pytest.raises(InvalidInput) as refused:
        tree_of(raw)
    assert "\n" not in str(refused.value)


def test_texts_of_python_2() -> None:
    assert tree_of(b"S'a\\n\\x41\\'\\\\\\101'\np0\n.") == "a\nA'\\A"
    assert tree_of(b'S"it\'s"\n.') == "it's"
    assert tree_of(b"U\x02\xc3\xa4.") == "ä"
    assert tree_of(b"U\x01\xff.") == b"\xff"
    assert tree_of(b"T\x01\x00\x00\x00a.") == "a"
    assert tree_of(b"V\\u20ac\n.") == "\u20ac"
    assert tree_of(b"I01\n.") is True
    assert tree_of(b"L-12L\n.") == -12


def test_an_unsupported_tensor_says_how_to_save_it() -> None:
    with pytest.raises(UnsupportedTensor, match="save it as an array of common little-endian numbers"):
        tree_of(pickle.dumps(numpy.zeros(2, dtype=">f4"), 4))
