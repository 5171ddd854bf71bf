"""Differential tests of our header reader against the Rust library that ships with `safetensors`.

Two claims. What we accept, Rust accepts, and both say the same of it. What Rust accepts and we refuse is refused for
a reason of `STRICTER_THAN_RUST`. Files begin valid and are then changed, mostly at the level of JSON, a few times."""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import hypothesis.strategies as st
import pytest
import safetensors
from hypothesis import given, settings

from registry.core.errors import MalformedTensors
from registry.core.layout import DTYPE_BITS, Layout, TensorSpec
from registry.core.safetensors_header import Header, build_header, header_length, parse_header

# Every place of the data has bytes of its own, so equal data means equal offsets.
DATA = random.Random(0).randbytes(4096)

# How each entry of STRICTER_THAN_RUST reads; tests/core has one example of each.
KNOWN_DIFFERENCES = (
    "expected a header that begins with `{`",
    "expected one of that name, found two",
    "expected one value, found two",
    "expected an object of strings, found None",
    "expected dtype, shape and data_offsets",
    "', found two",  # an unknown field twice: Rust drops both
    "expected a header of dtype, shape and data_offsets for each tensor, found deeper JSON",
    "expected a name of plain text",
    "expected plain text, found NUL",
    "expected a shape of whole numbers under 2**53",
)

# Keys and values as they are spelled in JSON, so that a mutation can spell them wrongly.
Entry = list[tuple[str, str]]
Document = list[tuple[str, Entry | str]]


def ours(file: bytes) -> Header:
    size = header_length(file[:8], file_size=len(file), what="fuzz")
    return parse_header(file[:size], file_size=len(file), what="fuzz")


def described(header: Header, file: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    data = file[header.size :]
    return {
        spec.name: (spec.dtype, list(spec.shape), data[begin:end])
        for spec, (begin, end) in zip(header.layout, header.offsets, strict=True)
    }


def rust(file: bytes) -> dict[str, tuple[str, list[int], bytes]] | None:
    try:
        tensors = safetensors.deserialize(file)
    except safetensors.SafetensorError:
        return None
    return {name: (tensor["dtype"], tensor["shape"], bytes(tensor["data"])) for name, tensor in tensors}


def compare(file: bytes, scratch: Path) -> str:
    """Holds both claims for one file.

    Returns:
        Who accepted it: `both`, `rust` or `neither`.
    """
    theirs = rust(file)
    try:
        header = ours(file)
    except MalformedTensors as error:
        message = str(error)
        assert message.isprintable()
        assert len(message) < 1000
        if theirs is None:
            return "neither"
        assert any(reason in message for reason in KNOWN_DIFFERENCES), f"stricter without saying so: {message}"
        return "rust"
    assert described(header, file) == theirs
    assert header.file_size == len(file)
    scratch.write_bytes(file)
    with safetensors.safe_open(scratch, framework="np") as handle:
        assert (handle.metadata() or {}) == header.metadata
        filled = [spec.name for spec in header.layout if spec.elements]
        assert [name for name in handle.offset_keys() if header.layout.by_name[name].elements] == filled
    return "both"


# ---------------------------------------------------------------- valid files

NAMES = ["a", "b", "layers.0.lora_A.weight", "ü", "日本", "😀", "", 'q"\\/', "a b", "\u2028", "[{]}", "x"]


def a_layout(rng: random.Random) -> Layout:
    tensors = []
    for name in rng.sample(NAMES, rng.randint(0, 4)):
        dtype = rng.choice(sorted(DTYPE_BITS))
        shape = rng.choices(range(5), k=rng.randint(0, 3))
        if DTYPE_BITS[dtype] < 8:
            shape.append(4)
        tensors.append(TensorSpec(name, dtype, tuple(shape)))
    return Layout(tuple(tensors))


def some_metadata(rng: random.Random) -> dict[str, str] | None:
    keys = rng.sample(["format", "é", "\n", '"'], rng.randint(0, 3))
    return {key: "".join(rng.choices("p{[\n\\é😀", k=3)) for key in keys} or rng.choice([None, {}])


# ---------------------------------------------------------------- mutations

# fmt: off
NUMBERS = [
    "0", "1", "2", "3", "4", "7", "8", "16", "-0", "-1", "1.0", "4.0", "1e0", "8E0", "01", "+1", "0x4", "1_0", "٣",
    "9007199254740991", "9007199254740992", "9223372036854775807", "9223372036854775808",
    "18446744073709551615", "18446744073709551616", "99999999999999999999", "1" * 30, "1" * 5000,
    "NaN", "Infinity", "-Infinity", "null", "true", "false", '"1"', "[1]", "{}", "[]", "[[1]]", "",
]
VALUES = [
    "null", "true", "0", "1.5", "-0", "NaN", '""', '"x"', "[]", "{}", '{"a":1}', "[[]]", '{"a":{"b":{}}}', "1e999",
    "[0,0]", "[0,4]", "[4]", "[0,4,8]", "[0]", '["0","4"]', "[2,2]", "[1,]", "[,1]", "[0, 4 ]", "[\t1\n]",
    *(f'"{dtype}"' for dtype in DTYPE_BITS),
    '{"F32":null}', '{"F32":1}', '{"F32":[]}', '{"F32":null,"F32":null}', '"f32"', '"F\\u00332"', '"F32 "', "F32",
    '"\\ud800"', '"\\x"', "'x'", '"\n"', "[" * 200 + "]" * 200, "[" * 3000, '{"a":' * 3000, "/*c*/1", "1//",
]
KEYS = [
    '"a"', '"b"', '"x"', '"dtype"', '"shape"', '"data_offsets"', '"__metadata__"', '"\\u0064type"', '""', '"ü"',
    '"\\u0061"', '"\\u0000"', '"\\n"', '"\\u001b[2J"', '"\x7f"', '"\x85"', '"\\ud800"', '"\\udc00\\ud800"',
    '"\\ud83d\\ude00"', '"\\ud83dx"', '"\\ud83d\\u0041"', "1", "null", "a", "'a'", '"\\a"', '"\\u12"', '"\\u+123"',
]
METADATA_TEXTS = [
    "null", "{}", "[]", '""', "1", '{"a":"b"}', '{"a":"b","a":"c"}', '{"a":1}', '{"a":null}', '{"a":{}}', '{"a":[]}',
    '{"a":"\\u0000"}', '{"\\u0000":"a"}', '{"a":"\\ud800"}', '{"\\udfff":"a"}', '{"a":"b",}', '{1:"a"}',
    '{"\\n":"\\u001b\\ud83d\\ude00"}', '{"a":"b","\\u0061":"c"}', '[["a","b"]]', '{"a":true}', '{"a":"\t"}',
]
SPACES = [
    "", " ", "  ", "\t", "\n", "\r", "\r\n", "\x0b", "\x0c", "\0", "\xa0", "\ufeff", "\u2003", "x", "{}", ",", "}",
]
BYTES = b'{}[]",:\\0129-+.eEuNatfnsF \t\n\r\x00\x1f\x7f\x80\xbf\xc0\xe2\xed\xa0\xf4\xff'
# fmt: on


def mutate_spelling(rng: random.Random, document: Document) -> None:
    """Writes a number as a lenient reader would still understand it."""
    entry = any_entry(rng, document)
    at = rng.randint(0, len(entry) - 1)
    key, text = entry[at]
    numbers = text.strip("[]").split(",")
    where = rng.randint(0, len(numbers) - 1)
    number = numbers[where].strip()
    spellings = ["{}.0", "{}e0", "-{}", '"{}"', "0{}", "[{}]", " {}\t"]
    numbers[where] = rng.choice(spellings).format(number)
    if number in ("0", "1") and rng.choice([True, False]):
        numbers[where] = rng.choice(["NaN", "null", "-0", "false"] if number == "0" else ["true", "1E-0"])
    entry[at] = (key, f"[{','.join(numbers)}]" if text.startswith("[") else ",".join(numbers))


def mutate_tensor(rng: random.Random, document: Document) -> None:
    """Adds a tensor behind the others, whose length is right, if rounded, and whose shape may be at a limit."""
    ends = [0] + [end for _, end in offsets_of(document)]
    dtype = rng.choice(["U8", "F32", *sorted(DTYPE_BITS), "f32", "F8", "u8"])
    sizes = [0, 1, 2, 3, 4, 5, 2**32, 2**53 - 1, 2**53, 2**63, 2**64 - 1, 2**64]
    limits = [[2**53 - 1, 2**53 - 1, 0], [2**32, 2**32, 0], [0, 2**53 - 1, 2**53 - 1], [2**32, 2**29]]
    shape = rng.choice([rng.choices(sizes, k=rng.randint(0, 3)), *limits])
    length = math.prod(shape) * DTYPE_BITS.get(dtype, 8 * len(dtype)) // 8
    end = max(ends) + (length if length < len(DATA) else 0)
    document.append((rng.choice(['"new"', *KEYS]), entry_of(f'"{dtype}"', shape, max(ends), end)))


def mutate_number(rng: random.Random, document: Document) -> None:
    entry = any_entry(rng, document)
    at = rng.randint(0, len(entry) - 1)
    key, text = entry[at]
    numbers = text.strip("[]").split(",")
    where = rng.randint(0, len(numbers) - 1)
    if numbers[where].isascii() and numbers[where].isdigit() and rng.choice([True, False]):
        numbers[where] = str(int(numbers[where][:30]) + rng.choice([-8, -4, -1, 1, 4, 8, 2**32, 2**64]))
    else:
        numbers[where] = rng.choice(NUMBERS)
    if rng.randint(0, 3) == 0:
        numbers.insert(where, rng.choice(["0", "1", "2"]))
    entry[at] = (key, f"[{','.join(numbers)}]")


def mutate_shift(rng: random.Random, document: Document) -> None:
    """Moves one tensor, or all from one on: gaps, overlaps, holes at the start, data after the end."""
    first = rng.randint(0, max(0, len(document) - 1))
    last = rng.choice([first, len(document)])
    by = rng.choice([-8, -4, -1, 1, 4, 8])
    for _, entry in document[first : last + 1]:
        for at, (key, text) in enumerate(entry if isinstance(entry, list) else []):
            if key == '"data_offsets"' and all(part.isdigit() for part in text.strip("[]").split(",")):
                numbers = [str(max(0, int(part[:30]) + by)) for part in text.strip("[]").split(",")]
                entry[at] = (key, f"[{','.join(numbers)}]")


def mutate_value(rng: random.Random, document: Document) -> None:
    entry = any_entry(rng, document)
    at = rng.randint(0, len(entry) - 1)
    entry[at] = (entry[at][0], rng.choice(VALUES))


def mutate_key(rng: random.Random, document: Document) -> None:
    entry = any_entry(rng, document)
    at = rng.randint(0, len(entry) - 1)
    entry[at] = (rng.choice(KEYS), entry[at][1])


def mutate_fields(rng: random.Random, document: Document) -> None:
    entry = any_entry(rng, document)
    match rng.choice(["twice", "drop", "add", "reorder"]):
        case "twice":
            entry.append(rng.choice(entry))
        case "drop" if len(entry) > 1:
            entry.pop()
        case "add":
            entry.append((rng.choice(KEYS), rng.choice(VALUES)))
        case _:
            entry.reverse()


def mutate_tensors(rng: random.Random, document: Document) -> None:
    any_entry(rng, document)
    at = rng.randint(0, len(document) - 1)
    name, entry = document[at]
    match rng.choice(["twice", "copy", "drop", "reorder", "rename", "replace", "list"]):
        case "twice":
            document.append(document[at])
        case "copy":
            document.append((rng.choice(KEYS), list(entry) if isinstance(entry, list) else entry))
        case "drop":
            del document[at]
        case "reorder":
            document.reverse()
        case "rename":
            document[at] = (rng.choice(KEYS), entry)
        case "replace":
            document[at] = (name, rng.choice(VALUES))
        case _ if isinstance(entry, list):
            document[at] = (name, f"[{','.join(value for _, value in entry)}]")


def mutate_metadata(rng: random.Random, document: Document) -> None:
    text = rng.choice(METADATA_TEXTS)
    key = rng.choice(['"__metadata__"', '"__metadata__"', '"\\u005f_metadata__"'])
    document.insert(rng.choice([0, len(document)]), (key, text))


MUTATIONS: list[Callable[[random.Random, Document], None]] = [
    mutate_spelling,
    mutate_tensor,
    mutate_number,
    mutate_shift,
    mutate_value,
    mutate_key,
    mutate_fields,
    mutate_tensors,
    mutate_metadata,
]


def entry_of(dtype: str, shape: Sequence[int], begin: int, end: int) -> Entry:
    sizes = ",".join(map(str, shape))
    return [('"dtype"', dtype), ('"shape"', f"[{sizes}]"), ('"data_offsets"', f"[{begin},{end}]")]


def offsets_of(document: Document) -> list[tuple[int, int]]:
    """Those offsets that are whole numbers yet."""
    texts = [text for _, entry in document if isinstance(entry, list) for key, text in entry if key == '"data_offsets"']
    found = [re.fullmatch(r"\[([0-9]{1,4}),([0-9]{1,4})\]", text) for text in texts]
    return [(int(match[1]), int(match[2])) for match in found if match]


def any_entry(rng: random.Random, document: Document) -> Entry:
    entries = [entry for _, entry in document if isinstance(entry, list) and entry]
    if not entries:
        entries = [[('"dtype"', '"U8"'), ('"shape"', "[0]"), ('"data_offsets"', "[0,0]")]]
        document.append(('"new"', entries[0]))
    return rng.choice(entries)


def spell(document: Document, space: str) -> str:
    def fields(pairs: list[tuple[str, str]]) -> str:
        return "{" + ",".join(f"{key}{space}:{value}" for key, value in pairs) + space + "}"

    return fields([(name, fields(entry) if isinstance(entry, list) else entry) for name, entry in document])


def mutated_json(rng: random.Random) -> bytes:
    layout = a_layout(rng)
    document: Document = []
    end = 0
    for spec in layout:
        begin, end = end, end + spec.nbytes
        fields = entry_of(f'"{spec.dtype}"', spec.shape, begin, end)
        document.append((json.dumps(spec.name), rng.sample(fields, len(fields))))
    if rng.choice([True, False]):
        rng.shuffle(document)
    for _ in range(rng.choice([0, 1, 1, 1, 1, 2, 3])):
        rng.choice(MUTATIONS)(rng, document)
    if rng.randint(0, 7):  # else the data has the old length
        end = min(max([0] + [end for _, end in offsets_of(document)]), len(DATA))
    space = rng.choice(["", "", "", "", " ", "\n\t\r", "\x0b", "\xa0"])
    text = spell(document, space)
    if rng.randint(0, 7) == 0:
        text = rng.choice(SPACES) + text + rng.choice(SPACES)
    header = text.encode("utf-8", "surrogatepass")
    if rng.randint(0, 15) == 0:
        end = max(0, end + rng.choice([-8, -1, 1, 4, 8]))
    return len(header).to_bytes(8, "little") + header + DATA[:end]


def mutated_bytes(rng: random.Random) -> bytes:
    layout = a_layout(rng)
    file = bytearray(build_header(layout, some_metadata(rng)) + DATA[: layout.nbytes])
    for _ in range(rng.randint(0, 2)):
        at = rng.randint(0, max(0, len(file) - 1))
        byte = rng.choice(BYTES)
        match rng.choice(["replace", "flip", "insert", "delete", "cut", "lengthen"]):
            case "replace":
                file[at : at + 1] = bytes([byte])
            case "flip" if file:
                file[at] ^= 1 << rng.randint(0, 7)
            case "insert":
                file.insert(at, byte)
                file[:1] = bytes([(file[0] + 1) % 256])
            case "delete":
                del file[at : at + 1]
                file[:1] = bytes([(file[0] - 1) % 256]) if file else b""
            case "cut":
                del file[at:]
            case _:
                file.append(byte)
    return bytes(file)


def fuzz(mutated: Callable[[random.Random], bytes], scratch: Path, examples: int) -> Counter[str]:
    """Hypothesis draws the seeds only: its own draws cost three times as much, and repeat themselves."""
    accepted: Counter[str] = Counter()

    @settings(max_examples=examples)
    @given(file=st.randoms(use_true_random=True).map(mutated))
    def each(file: bytes) -> None:
        accepted[compare(file, scratch)] += 1

    each()
    return accepted


# ---------------------------------------------------------------- claims


def test_what_we_accept_of_changed_json_rust_accepts_as_the_same(tmp_path: Path) -> None:
    accepted = fuzz(mutated_json, tmp_path / "fuzz.safetensors", examples=5000)
    assert min(accepted["both"], accepted["rust"], accepted["neither"]) >= 100, "the mutations miss one side"


def test_what_we_accept_of_changed_bytes_rust_accepts_as_the_same(tmp_path: Path) -> None:
    accepted = fuzz(mutated_bytes, tmp_path / "fuzz.safetensors", examples=1500)
    assert min(accepted["both"], accepted["neither"]) >= 100, "the mutations miss one side"


@settings(max_examples=200)
@given(rng=st.randoms(use_true_random=True))
def test_rust_reads_every_header_that_we_build(rng: random.Random) -> None:
    layout, metadata = a_layout(rng), some_metadata(rng)
    raw = build_header(layout, metadata)
    file = raw + DATA[: layout.nbytes]
    assert len(raw) % 8 == 0
    assert rust(file) == described(ours(file), file)
    assert ours(file).metadata == (metadata or {})
    assert sorted(ours(file).layout, key=lambda t: t.name) == sorted(layout, key=lambda t: t.name)


@settings(max_examples=200)
@given(length=st.integers(0, 12), rest=st.binary(max_size=24))
def test_what_we_accept_of_random_bytes_rust_accepts_as_the_same(
    tmp_path_factory: pytest.TempPathFactory, length: int, rest: bytes
) -> None:
    compare(length.to_bytes(8, "little") + rest, tmp_path_factory.getbasetemp() / "random.safetensors")
