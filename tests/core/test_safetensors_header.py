from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save

from registry.core.errors import InvalidInput, MalformedTensors
from registry.core.layout import DTYPE_BITS, Layout, TensorSpec
from registry.core.safetensors_header import (
    MAX_HEADER_BYTES,
    STRICTER_THAN_RUST,
    Header,
    build_header,
    header_length,
    parse_header,
    read_header,
)

F32 = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


def file_of(header: str | bytes, data: int = 4) -> bytes:
    raw = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(raw)) + raw + b"\x01" * data


def parse(file: bytes) -> Header:
    size = header_length(file[:8], file_size=len(file), what="x.safetensors")
    return parse_header(file[:size], file_size=len(file), what="x.safetensors")


def refusal(file: bytes) -> str:
    with pytest.raises(MalformedTensors) as caught:
        parse(file)
    message = str(caught.value)
    assert message.startswith("x.safetensors: ")
    assert message.isprintable(), "one line, and nothing that a terminal obeys"
    assert len(message) < 1000
    return message


def rust_accepts(file: bytes) -> bool:
    try:
        safetensors.deserialize(file)
    except safetensors.SafetensorError:
        return False
    return True


def entry(dtype: str = "F32", shape: str = "[1]", offsets: str = "[0,4]") -> str:
    return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}'


# ---------------------------------------------------------------- what safetensors writes

TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}


def test_every_dtype_of_the_format_is_tested_here() -> None:
    assert {*TORCH_DTYPES, "F4", "F6_E2M3", "F6_E3M2"} == set(DTYPE_BITS)


@pytest.mark.parametrize("code", TORCH_DTYPES)
def test_what_torch_saves_is_read_with_equal_values(code: str) -> None:
    tensor = torch.zeros(2, 3, dtype=TORCH_DTYPES[code])
    header = parse(save({"w": tensor}, metadata={"format": "pt"}))
    assert header.layout == Layout((TensorSpec("w", code, (2, 3)),))
    assert header.offsets == ((0, tensor.nbytes),)
    assert header.metadata == {"format": "pt"}


def test_the_shape_of_f4_counts_elements_where_torch_counts_pairs() -> None:
    pairs = torch.arange(6, dtype=torch.uint8).view(2, 3).view(torch.float4_e2m1fn_x2)
    header = parse(save({"w": pairs}))
    assert header.layout == Layout((TensorSpec("w", "F4", (2, 6)),))
    assert header.offsets == ((0, 6),)


@pytest.mark.parametrize("code", ["F4", "F6_E2M3", "F6_E3M2"])
def test_sub_byte_tensors_of_whole_bytes_are_read_and_others_refused(code: str) -> None:
    assert parse(file_of(f'{{"a":{entry(code, "[4]", f"[0,{DTYPE_BITS[code] // 2}]")}}}', DTYPE_BITS[code] // 2))
    assert "expected whole bytes" in refusal(file_of(f'{{"a":{entry(code, "[3]", "[0,1]")}}}', 1))
    assert "expected whole bytes" in refusal(file_of(f'{{"a":{entry(code, "[]", "[0,0]")}}}', 0))


def test_many_tensors_stand_in_the_order_of_their_data() -> None:
    tensors = {"z": torch.zeros(3), "a": torch.zeros(5, dtype=torch.uint8), "m": torch.zeros(2, dtype=torch.int64)}
    file = save(tensors)
    header = parse(file)
    assert [spec.name for spec in header.layout] == ["m", "z", "a"]
    assert header.offsets == ((0, 16), (16, 28), (28, 33))
    assert header.file_size == len(file)


def test_the_order_of_the_header_does_not_matter() -> None:
    second, first = f'"first":{entry(offsets="[0,4]")}', f'"second":{entry(offsets="[4,8]")}'
    assert [t.name for t in parse(file_of(f"{{{first},{second}}}", 8)).layout] == ["first", "second"]


def test_tensors_without_bytes_keep_the_order_of_the_header() -> None:
    empty = [
        f'"{name}":{entry(shape="[0]", offsets=at)}' for name, at in (("z", "[4,4]"), ("a", "[4,4]"), ("m", "[0,0]"))
    ]
    full = [f'"x":{entry(offsets="[4,8]")}', f'"w":{entry(offsets="[0,4]")}']
    assert [t.name for t in parse(file_of("{" + ",".join(full + empty) + "}", 8)).layout] == ["m", "w", "z", "a", "x"]


def test_scalars_and_zero_tensors_are_read() -> None:
    assert parse(save({"s": torch.tensor(1.0)})).layout.tensors[0].shape == ()
    nothing = parse(save({}))
    assert (len(nothing.layout), nothing.offsets, nothing.metadata) == (0, (), {})
    assert nothing.file_size == nothing.size


def test_padding_behind_the_json_may_be_any_whitespace() -> None:
    assert parse(file_of(f'{{"a":{F32}}} \n\t\r'))
    assert rust_accepts(file_of(f'{{"a":{F32}}} \n\t\r'))


def test_read_header_leaves_the_file_at_its_data_and_returns_the_raw_bytes() -> None:
    content = save({"a": torch.tensor([1.5])})
    file = io.BytesIO(content)
    header, raw = read_header(file, file_size=len(content), what="x")
    assert raw == content[: header.size]
    assert struct.unpack("<f", file.read()) == (1.5,)


# ---------------------------------------------------------------- where we are stricter than Rust

STRICTER_EXAMPLES = {
    "start": (f' {{"a":{F32}}}', "begins with `{`"),
    "tensor twice": (f'{{"a":{F32},"\\u0061":{F32}}}', "entry 'a': expected one of that name, found two"),
    "metadata key twice": (f'{{"__metadata__":{{"k":"1","k":"2"}},"a":{F32}}}', "'k': expected one value, found two"),
    "unknown field": (f'{{"a":{F32[:-1]},"extra":1}}}}', "tensor 'a': expected dtype, shape and data_offsets"),
    "null metadata": (f'{{"__metadata__":null,"a":{F32}}}', "__metadata__: expected an object of strings, found None"),
    "entry as a list": ('{"a":["F32",[1],[0,4]]}', "found deeper JSON"),
    "dtype as an object": ('{"a":{"dtype":{"F32":null},"shape":[1],"data_offsets":[0,4]}}', "found deeper JSON"),
    "control character": (f'{{"a\\u001b[2J":{F32}}}', "tensor 'a\\x1b[2J': expected a name of plain text"),
    "NUL in metadata": (f'{{"__metadata__":{{"k":"\\u0000"}},"a":{F32}}}', "__metadata__ 'k': expected plain text"),
    "dimension": (f'{{"a":{F32},"b":{entry(shape="[0,9007199254740992]", offsets="[4,4]")}}}', "under 2**53"),
}


def test_every_difference_to_rust_has_an_example_here() -> None:
    assert set(STRICTER_EXAMPLES) == set(STRICTER_THAN_RUST)


@pytest.mark.parametrize("difference", STRICTER_EXAMPLES)
def test_rust_accepts_what_our_list_of_differences_refuses(difference: str) -> None:
    header, message = STRICTER_EXAMPLES[difference]
    assert rust_accepts(file_of(header))
    assert message in refusal(file_of(header))


def test_an_unknown_field_twice_is_refused_as_it_is_once() -> None:
    file = file_of(f'{{"a":{F32[:-1]},"extra":1,"extra":1}}}}')
    assert rust_accepts(file)
    assert "tensor 'a': expected one 'extra', found two" in refusal(file)


@pytest.mark.parametrize("name", ["\\u0000", "\\n", "\\r\\n", "\\u007f", "\x7f", "\x85", "\\u009b"])
def test_a_tensor_name_with_a_control_character_is_refused(name: str) -> None:
    assert rust_accepts(file_of(f'{{"{name}":{F32}}}'))
    assert "rename it" in refusal(file_of(f'{{"{name}":{F32}}}'))


@pytest.mark.parametrize(
    "name", ["", "ü", "日本語", "a b", "\\ud83d\\ude00", "'", '\\"', "\\\\", "\\/", "../../x", "a" * 5000]
)
def test_other_tensor_names_are_kept_as_they_are(name: str) -> None:
    assert [t.name for t in parse(file_of(f'{{"{name}":{F32}}}')).layout] == [json.loads(f'"{name}"')]


def test_metadata_may_hold_line_breaks_and_escapes() -> None:
    header = f'{{"__metadata__":{{"a\\n":"\\u001b\\n\\ud83d\\ude00"}},"a":{F32}}}'
    assert parse(file_of(header)).metadata == {"a\n": "\x1b\n😀"}


# ---------------------------------------------------------------- what both refuse

BOTH_REFUSE = {
    "empty header": ("", "begins with `{`"),
    "array": ("[]", "begins with `{`"),
    "byte order mark": (f'\ufeff{{"a":{F32}}}', "begins with `{`"),
    "not UTF-8": (b'{"\xff":' + F32.encode() + b"}", "expected a header in UTF-8"),
    "surrogate bytes": (b'{"\xed\xa0\x80":' + F32.encode() + b"}", "expected a header in UTF-8"),
    "overlong UTF-8": (b'{"\xc0\x80":' + F32.encode() + b"}", "expected a header in UTF-8"),
    "lone surrogate in a name": (f'{{"\\ud800":{F32}}}', "lone surrogate"),
    "reversed surrogates in a name": (f'{{"\\ude00\\ud83d":{F32}}}', "lone surrogate"),
    "lone surrogate in metadata": (f'{{"__metadata__":{{"a":"\\udfff"}},"a":{F32}}}', "lone surrogate"),
    "lone surrogate in a metadata key": (f'{{"__metadata__":{{"\\udfff":""}},"a":{F32}}}', "lone surrogate"),
    "raw control character": (f'{{"\n":{F32}}}', "expected a header in JSON"),
    "trailing comma": (f'{{"a":{F32},}}', "expected a header in JSON"),
    "trailing bytes": (f'{{"a":{F32}}}x', "expected a header in JSON, found 'Extra data'"),
    "trailing NUL": (f'{{"a":{F32}}}\0', "expected a header in JSON, found 'Extra data'"),
    "second document": (f'{{"a":{F32}}}{{}}', "expected a header in JSON, found 'Extra data'"),
    "comment": (f'{{"a":{F32}/**/}}', "expected a header in JSON"),
    "cut": (f'{{"a":{F32}', "expected a header in JSON"),
    "field twice": (f'{{"a":{F32[:-1]},"dtype":"F32"}}}}', "tensor 'a': expected one 'dtype', found two"),
    "metadata twice": (
        f'{{"__metadata__":{{}},"__metadata__":{{}},"a":{F32}}}',
        "entry '__metadata__': expected one of that name, found two",
    ),
    "metadata of a list": (f'{{"__metadata__":[],"a":{F32}}}', "expected an object of strings"),
    "metadata of a number": (f'{{"__metadata__":{{"a":1}},"a":{F32}}}', "__metadata__ 'a': expected a string, found 1"),
    "metadata of null": (f'{{"__metadata__":{{"a":null}},"a":{F32}}}', "expected a string, found None"),
    "metadata as a tensor": (f'{{"__metadata__":{F32}}}', "__metadata__ 'shape': expected a string"),
    "nested metadata": (f'{{"__metadata__":{{"a":{{}}}},"a":{F32}}}', "deeper JSON"),
    "entry of null": ('{"a":null}', "tensor 'a': expected dtype, shape and data_offsets, found None"),
    "entry without fields": ('{"a":{}}', "tensor 'a': expected dtype, shape and data_offsets, found []"),
    "no offsets": ('{"a":{"dtype":"F32","shape":[1]}}', "found ['dtype', 'shape']"),
    "unknown dtype": (f'{{"a":{entry("F12")}}}', "found 'F12'"),
    "lower case dtype": (f'{{"a":{entry("f32")}}}', "found 'f32'"),
    "dtype of a number": ('{"a":{"dtype":1,"shape":[1],"data_offsets":[0,4]}}', "expected a dtype of BOOL, F4"),
    "negative size": (f'{{"a":{entry(shape="[-1]")}}}', "expected a shape of whole numbers under 2**53, found [-1]"),
    "minus zero": (f'{{"a":{entry(shape="[-0]", offsets="[0,0]")}}}', "found [-0]"),
    "float size": (f'{{"a":{entry(shape="[1.0]")}}}', "found [1.0]"),
    "exponent": (f'{{"a":{entry(shape="[1e0]")}}}', "found [1e0]"),
    "NaN": (f'{{"a":{entry(shape="[NaN]")}}}', "found [NaN]"),
    "Infinity": (f'{{"a":{entry(shape="[-Infinity]")}}}', "found [-Infinity]"),
    "bool size": (f'{{"a":{entry(shape="[true]")}}}', "found [True]"),
    "string size": (f'{{"a":{entry(shape=json.dumps(["1"]))}}}', "found ['1']"),
    "size over u64": (f'{{"a":{entry(shape="[0,18446744073709551616]", offsets="[0,0]")}}}', "under 2**53"),
    "4000 digits": (f'{{"a":{entry(shape=f"[{10**4000}]")}}}', "under 2**53"),
    "shape of null": (f'{{"a":{entry(shape="null")}}}', "expected a shape"),
    "shape of shapes": (f'{{"a":{entry(shape="[[1]]")}}}', "deeper JSON"),
    "three offsets": (f'{{"a":{entry(offsets="[0,4,4]")}}}', "expected data_offsets of begin and end"),
    "one offset": (f'{{"a":{entry(offsets="[4]")}}}', "expected data_offsets of begin and end"),
    "bool offsets": (f'{{"a":{entry("U8", "[1]", "[false,true]")}}}', "expected data_offsets of begin and end"),
    "offset of minus zero": (f'{{"a":{entry(offsets="[-0,4]")}}}', "expected data_offsets of begin and end"),
    "end before begin": (f'{{"a":{entry(offsets="[4,0]")}}}', "expected data_offsets of begin and end"),
    "too few bytes": (f'{{"a":{entry(shape="[2]")}}}', "tensor 'a': expected 8 bytes for F32 [2], found 4"),
    "too many bytes": (f'{{"a":{entry("F16")}}}', "tensor 'a': expected 2 bytes for F16 [1], found 4"),
    "elements overflow": (f'{{"a":{entry(shape="[4294967296,4294967296]", offsets="[0,0]")}}}', "less than 2**64 bits"),
    "bits overflow": (f'{{"a":{entry(shape="[4294967296,268435456]", offsets="[0,0]")}}}', "less than 2**64 bits"),
    "overflow before a zero": (f'{{"a":{entry(shape="[4294967296,4294967296,0]", offsets="[0,0]")}}}', "2**64 bits"),
    "hole at the start": (f'{{"a":{entry(offsets="[4,8]")}}}', "found 4: it leaves a gap after the start of the data"),
    "gap": (
        f'{{"a":{F32},"b":{entry(offsets="[8,12]")}}}',
        "tensor 'b': expected its data at byte 4, found 8: it leaves a gap after tensor 'a'",
    ),
    "overlap": (
        f'{{"a":{F32},"b":{entry(offsets="[2,6]")}}}',
        "tensor 'b': expected its data at byte 4, found 2: it overlaps with tensor 'a'",
    ),
    "shared bytes": (f'{{"a":{F32},"b":{F32}}}', "it overlaps with tensor 'a'"),
}


@pytest.mark.parametrize("fault", BOTH_REFUSE)
def test_what_rust_refuses_we_refuse_and_say_why(fault: str) -> None:
    header, message = BOTH_REFUSE[fault]
    data = 12 if fault in ("gap", "hole at the start") else 6 if fault == "overlap" else 4
    assert not rust_accepts(file_of(header, data))
    assert message in refusal(file_of(header, data))


def test_a_zero_first_keeps_a_huge_shape_from_overflowing_as_in_rust() -> None:
    file = file_of(f'{{"a":{entry(shape="[0,9007199254740991,9007199254740991]", offsets="[0,0]")}}}', 0)
    assert rust_accepts(file)
    assert parse(file).layout.tensors[0].nbytes == 0


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (b"", "found an empty one; the file is truncated: download or save it again"),
        (b"\x02\0\0\0\0\0\0", "expected a file of at least 8 bytes, found 7 bytes; the file is truncated"),
        (b"\x02\0\0\0\0\0\0\0", "expected a header of 8 + 2 bytes, found 8 bytes in all; the file is truncated"),
        (file_of(f'{{"a":{F32}}}')[:20], "found 20 bytes in all; the file is truncated"),
        (file_of(f'{{"a":{F32}}}', 3), "expected 66 bytes, found 65; the file is truncated"),
        (file_of(f'{{"a":{F32}}}', 5), "expected 66 bytes, found 67; bytes follow the last tensor"),
        (file_of("{}", 1), "bytes follow the last tensor"),
        (struct.pack("<Q", 2**64 - 1), "expected a header of at most 100000000 bytes, found 18446744073709551615"),
        (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}", "expected a header of at most 100000000 bytes"),
        (struct.pack("<Q", MAX_HEADER_BYTES) + b"{}", "the file is truncated"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"PK\x03\x04\0\0\x08\x08\0\0", "torch.save"),
        (b"\x80\x02}q\x00(X\x01", "pickle"),
        (b"<!DOCTYPE html>", "web page"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_file_of_the_wrong_length_or_kind_is_refused_with_a_mend(file: bytes, message: str) -> None:
    assert not rust_accepts(file)
    assert message in refusal(file)


def test_malformed_tensors_is_caught_as_invalid_input_and_value_error() -> None:
    with pytest.raises(InvalidInput):
        parse(b"")
    with pytest.raises(ValueError, match="empty"):
        parse(b"")


def test_a_header_shorter_or_longer_than_its_length_says_is_refused() -> None:
    file = file_of(f'{{"a":{F32}}}')
    for raw in (file[:-5], file):
        with pytest.raises(MalformedTensors, match=r"expected 62 bytes of header"):
            parse_header(raw, file_size=len(file), what="x")


def test_a_file_that_ends_while_it_is_read_is_refused() -> None:
    file = file_of(f'{{"a":{F32}}}')
    for end in (0, 5, 8, 30):
        with pytest.raises(MalformedTensors, match="truncated"):
            read_header(io.BytesIO(file[:end]), file_size=len(file), what="x")


# ---------------------------------------------------------------- hostile files


def test_a_4_gb_header_in_a_tiny_file_is_refused_before_anything_is_read_for_it() -> None:
    class Watched(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            assert size == 8
            return super().read(size)

    file = struct.pack("<Q", 4 * 2**30) + b'{"a":1}'
    tracemalloc.start()
    try:
        with pytest.raises(MalformedTensors, match="at most 100000000 bytes, found 4294967296"):
            read_header(Watched(file), file_size=len(file), what="x")
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


DEPTH = 2_000_000
HOSTILE: dict[str, Callable[[], str]] = {
    "deep lists": lambda: '{"a":' + "[" * DEPTH,
    "deep objects": lambda: '{"a":' * (DEPTH // 5),
    "deep objects behind shallow ones": lambda: '{"a":{},"b":' * (DEPTH // 12),
    "deep lists behind a bracket in a string": lambda: '{"]":["]",' * (DEPTH // 10),
    "only quotes": lambda: "{" + '"' * DEPTH,
    "only escaped quotes": lambda: '{"' + '\\"' * (DEPTH // 2),
    "only backslashes": lambda: '{"' + "\\" * DEPTH,
    "many digits": lambda: '{"a":' + entry(shape="[" + "7" * DEPTH + "]") + "}",
    "many huge sizes": lambda: '{"a":' + entry(shape="[" + "9007199254740991," * (DEPTH // 17) + "0]") + "}",
    "one key very often": lambda: "{" + '"a":1,' * (DEPTH // 6) + '"a":1}',
    "a long name": lambda: '{"' + "n" * DEPTH + '":1}',
    "a long name in control characters": lambda: '{"' + "\\u001b" * (DEPTH // 6) + f'":{F32}}}',
    "a long dtype": lambda: f'{{"a":{entry("F" * DEPTH)}}}',
    "many overlaps": lambda: "{" + ",".join(f'"{i}":{F32}' for i in range(DEPTH // 55)) + "}",
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_hostile_header_is_refused_in_linear_time(attack: str) -> None:
    file = file_of(HOSTILE[attack]())
    started = time.perf_counter()
    refusal(file)
    assert time.perf_counter() - started < 5, "2 MB take some tenths of a second; anything quadratic takes minutes"


def test_deep_nesting_is_refused_even_where_the_recursion_limit_was_raised() -> None:
    """In a process of its own: without the guard the interpreter's stack overflows, and it dies of SIGSEGV."""
    program = """
import sys
sys.setrecursionlimit(10**7)
from registry.core.errors import MalformedTensors
from registry.core.safetensors_header import parse_header
text = b'{"a":' + b"[" * 5_000_000
raw = len(text).to_bytes(8, "little") + text
try:
    parse_header(raw, file_size=len(raw), what="x")
except MalformedTensors:
    print("refused", "torch" in sys.modules, "numpy" in sys.modules)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout == "refused False False\n"


def test_2000_tensors_are_read_in_milliseconds() -> None:
    """13 ms on the machine where it was written; the bound leaves room for a busy one."""
    names = [f"base_model.model.layers.{i}.self_attn.q_proj.lora_A.weight" for i in range(2000)]
    layout = Layout(tuple(TensorSpec(name, "BF16", (16, 1024)) for name in names))
    raw = build_header(layout)
    times = []
    for _ in range(7):
        started = time.perf_counter()
        parse_header(raw, file_size=len(raw) + layout.nbytes, what="x")
        times.append(time.perf_counter() - started)
    assert min(times) < 0.1


def test_a_long_or_unprintable_file_name_does_not_spread_over_the_terminal() -> None:
    for what in ("x" * 10_000, "a\n\x1b[2Jb"):
        with pytest.raises(MalformedTensors) as caught:
            header_length(b"", file_size=0, what=what)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 300


# ---------------------------------------------------------------- headers of our own


def test_a_header_that_we_build_is_the_very_one_of_safetensors() -> None:
    tensors = {"b": torch.zeros(2, 3), "ü\u2028": torch.zeros(1), "c": torch.zeros(5, dtype=torch.bfloat16)}
    file = save(tensors, metadata={"format": 'p"t\n\x1f\\/é'})
    header = parse(file)
    assert build_header(header.layout, header.metadata) == file[: header.size]


def test_metadata_comes_first_with_sorted_keys_and_is_left_out_where_empty() -> None:
    layout = Layout((TensorSpec("a", "F32", (1,)),))
    raw = build_header(layout, {"b": "2", "a": "1"})
    assert raw[8:].startswith(
        b'{"__metadata__":{"a":"1","b":"2"},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    )
    assert build_header(layout, {"a": "1", "b": "2"}) == raw
    assert build_header(layout, {}) == build_header(layout) == build_header(layout, None)


@pytest.mark.parametrize("length", range(1, 10))
def test_the_data_begins_at_a_multiple_of_8(length: int) -> None:
    raw = build_header(Layout((TensorSpec("n" * length, "U8", (1,)),)))
    assert len(raw) % 8 == 0
    assert rust_accepts(raw + b"\0")


def test_torch_loads_a_file_in_our_order_whatever_the_alignment(tmp_path: Path) -> None:
    layout = Layout((TensorSpec("bytes", "U8", (3,)), TensorSpec("none", "F32", (0, 2)), TensorSpec("w", "F32", (2,))))
    path = tmp_path / "x.safetensors"
    path.write_bytes(build_header(layout) + b"\1\2\3" + struct.pack("<2f", 1.5, -2.0))
    loaded = load_file(path)
    assert loaded["bytes"].tolist() == [1, 2, 3]
    assert loaded["none"].shape == (0, 2)
    assert loaded["w"].tolist() == [1.5, -2.0]


def test_a_file_without_tensors_can_be_built_and_loaded(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(build_header(Layout(()), {"format": "pt"}))
    assert load_file(path) == {}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (TensorSpec("__metadata__", "F32", (1,)), "expected a name of its own"),
        (TensorSpec("a\0", "F32", (1,)), "expected a name of plain text"),
        (TensorSpec("a\ud800", "F32", (1,)), "expected a name of plain text"),
        (TensorSpec("a", "F12", (1,)), "expected a dtype of"),
        (TensorSpec("a", "F4", (3,)), "expected whole bytes"),
        (TensorSpec("a", "F32", (-1,)), "expected a shape"),
        (TensorSpec("a", "F32", (2**53, 0)), "expected a shape"),
        (TensorSpec("a", "F32", (2**40, 2**40)), "less than 2\\*\\*64 bits"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_tensor_that_the_format_cannot_hold_is_not_written(spec: TensorSpec, message: str) -> None:
    with pytest.raises(MalformedTensors, match=message) as caught:
        build_header(Layout((TensorSpec("first", "U8", (3,)), spec)))
    assert "tensor" in str(caught.value)
    assert str(caught.value).isprintable()


def test_one_name_twice_is_not_written() -> None:
    with pytest.raises(MalformedTensors, match="tensor 'a': expected a name of its own"):
        build_header(Layout((TensorSpec("a", "U8", (1,)), TensorSpec("a", "U8", (1,)))))


@pytest.mark.parametrize("metadata", [{"a": "\0"}, {"\0": "a"}, {"a": "\ud800"}, {"\udfff": "a"}])
def test_metadata_that_is_no_text_is_not_written(metadata: dict[str, str]) -> None:
    with pytest.raises(MalformedTensors, match=r"__metadata__ .*expected plain text"):
        build_header(Layout(()), metadata)


def test_safetensors_itself_writes_a_file_that_nobody_reads_where_we_refuse() -> None:
    """Why `__metadata__` is refused as a tensor's name: safetensors 0.8 takes it, and cannot read what it wrote."""
    assert not rust_accepts(save({"__metadata__": torch.zeros(1)}))


def test_more_than_100_mb_of_header_are_not_written() -> None:
    with pytest.raises(MalformedTensors, match="header of at most 100000000 bytes"):
        build_header(Layout(()), {"a": "x" * MAX_HEADER_BYTES})
