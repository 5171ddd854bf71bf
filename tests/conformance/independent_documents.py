"""The documents and digests of docs/format.md, read from that page alone: canonical JSON, names, tensors, layouts,
manifests, events. The standard library and BLAKE3, nothing of ours."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from itertools import pairwise
from typing import Any

from blake3 import blake3


class Refused(Exception):
    """What docs/format.md says that a reader must refuse."""


def require(condition: object, why: str) -> None:
    if not condition:
        raise Refused(why)


# ---------------------------------------------------------------- canonical JSON

LARGEST = 2**53 - 1
ESCAPES = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f", "\r": "\\r"}


def parse(document: bytes) -> Any:
    """JSON of doubles: integers beyond 2**53 - 1 are read as such."""

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        require(len(dict(pairs)) == len(pairs), "a member stands twice")
        return dict(pairs)

    def constant(text: str) -> Any:
        raise Refused(f"{text} is not JSON")

    def whole(text: str) -> int | float:
        return int(text) if len(text) < 20 and abs(int(text)) <= LARGEST else real(text)

    def real(text: str) -> float:
        require(math.isfinite(float(text)), f"{text} is no double")
        return float(text)

    try:
        return json.loads(
            document.decode("utf-8"),
            object_pairs_hook=members,
            parse_constant=constant,
            parse_int=whole,
            parse_float=real,
        )
    except (ValueError, RecursionError) as error:
        raise Refused(f"not JSON: {error}") from error


def canonical(tree: Any) -> bytes:
    try:
        return written(tree).encode("utf-8")
    except UnicodeEncodeError as error:
        raise Refused("half of a surrogate pair") from error
    except RecursionError as error:
        raise Refused("nested too deeply") from error


def written(tree: Any) -> str:
    if tree is None or isinstance(tree, bool):
        return {None: "null", True: "true", False: "false"}[tree]
    if isinstance(tree, int | float):
        return number(float(tree))
    if isinstance(tree, str):
        return '"' + "".join(ESCAPES.get(c) or (f"\\u{ord(c):04x}" if c < " " else c) for c in tree) + '"'
    if isinstance(tree, dict):
        order = sorted(tree, key=lambda name: name.encode("utf-16-be"))
        return "{" + ",".join(f"{written(name)}:{written(tree[name])}" for name in order) + "}"
    return "[" + ",".join(map(written, tree)) + "]"


def number(value: float) -> str:
    """A double as ECMAScript writes it (Number::toString, radix 10)."""
    if value < 0:
        return "-" + number(-value)
    if value == 0:
        return "0"
    mantissa, _, exponent = repr(value).partition("e")
    before, _, after = mantissa.partition(".")
    after = "" if after == "0" else after
    point = len(before) + int(exponent or 0)  # where the decimal point stands in the digits
    digits = (before + after).lstrip("0")
    point -= len(before + after) - len(digits)
    digits = digits.rstrip("0")
    if len(digits) <= point <= 21:
        return digits.ljust(point, "0")
    if 0 < point <= 21:
        return f"{digits[:point]}.{digits[point:]}"
    if -6 < point <= 0:
        return f"0.{'0' * -point}{digits}"
    fraction = f".{digits[1:]}" if len(digits) > 1 else ""
    return f"{digits[0]}{fraction}e{point - 1:+d}"


def parse_canonical(document: bytes) -> Any:
    tree = parse(document)
    require(canonical(tree) == document, "not canonical JSON")
    return tree


# ---------------------------------------------------------------- small types


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_text_or_null(value: Any) -> bool:
    return value is None or isinstance(value, str)


def is_whole(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value <= LARGEST


def is_number(value: Any) -> bool:
    return type(value) in (int, float)


def is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def is_role(value: str) -> bool:
    return re.fullmatch("[a-z][a-z0-9_.-]{0,63}", value) is not None


def members(tree: Any, what: str, names: str) -> dict[str, Any]:
    require(isinstance(tree, dict), f"{what}: not an object")
    require(set(tree) == set(names.split()), f"{what}: members {sorted(tree)}, expected {names}")
    return tree


# ---------------------------------------------------------------- names and references


def name_parts(text: str) -> tuple[str, str]:
    parts = text.split("/")
    require(len(parts) == 2, f"{text!r}: not namespace/name")
    for part in parts:
        good = re.fullmatch("[a-z0-9]([a-z0-9._-]*[a-z0-9])?", part) and ".." not in part and len(part) <= 128
        require(good, f"{text!r}: {part!r} is no name")
    return parts[0], parts[1]


def check_tag(tag: str) -> None:
    good = re.fullmatch("[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_])?", tag) and ".." not in tag and len(tag) <= 128
    require(good and not re.fullmatch("[0-9]+", tag), f"{tag!r} is no tag")


def parse_reference(text: str) -> dict[str, Any]:
    require(len(text) <= 512, "too long")
    found: dict[str, Any] = {"tag": None, "number": None, "digest": None, "moment": None}
    rest = text.removeprefix("registry://")
    if rest.endswith("}") and "@{" in rest:
        rest, _, time = rest[:-1].rpartition("@{")
        try:
            moment = datetime.fromisoformat(time)
            moment = moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
        except (ValueError, OverflowError) as error:
            raise Refused(f"{time!r} is no time") from error
        found["moment"] = moment.isoformat()
    if "@" in rest:
        rest, _, pin = rest.partition("@")
        require(found["moment"] is None, "a pin and a time")
        if re.fullmatch("[1-9][0-9]{0,17}", pin):
            found["number"] = int(pin)
        else:
            require(re.fullmatch("sha256:[0-9a-f]{4,64}", pin), f"{pin!r} is no pin")
            found["digest"] = pin.removeprefix("sha256:")
    elif ":" in rest:
        rest, _, tag = rest.partition(":")
        check_tag(tag)
        found["tag"] = None if tag == "latest" else tag
    found["namespace"], found["name"] = name_parts(rest)
    return found


# ---------------------------------------------------------------- tensors and layouts


def words(text: str) -> list[str]:
    return text.split()


BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
BITS |= dict.fromkeys(words("BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ"), 8)
BITS |= dict.fromkeys(words("I16 U16 F16 BF16"), 16) | dict.fromkeys(words("I32 U32 F32"), 32)
BITS |= dict.fromkeys(words("I64 U64 F64 C64"), 64)

Spec = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


def check_spec(name: Any, dtype: Any, shape: Any) -> Spec:
    require(is_text(name) and not re.search("[\x00-\x1f\x7f-\x9f\ud800-\udfff]", name), f"{name!r} is no name")
    require(is_text(dtype) and dtype in BITS, f"{name!r}: unknown dtype {dtype!r}")
    require(isinstance(shape, list) and all(map(is_whole, shape)), f"{name!r}: no shape")
    require(math.prod(shape) * BITS[dtype] % 8 == 0, f"{name!r}: no whole number of bytes")
    return name, dtype, tuple(shape)


def length(spec: Spec) -> int:
    return math.prod(spec[2]) * BITS[spec[1]] // 8


def tensor_head(dtype: str, shape: tuple[int, ...]) -> bytes:
    return f"{dtype}[{','.join(map(str, shape))}]\n".encode("ascii")


def tensor_digest(dtype: str, shape: tuple[int, ...], data: bytes) -> str:
    return str(blake3(tensor_head(dtype, shape) + data).hexdigest())


NOT_FINITE = {"F64": (8, 0x7FF0_0000_0000_0000), "F32": (4, 0x7F80_0000), "C64": (4, 0x7F80_0000)}
NOT_FINITE |= {
    "F16": (2, 0x7C00),
    "BF16": (2, 0x7F80),
    "F8_E5M2": (1, 0x7C),
    "F8_E4M3": (1, 0x7F),
    "F8_E8M0": (1, 0xFF),
}


def is_finite(dtype: str, data: bytes) -> bool:
    """Whether no element is NaN or an infinity."""
    if dtype in ("F8_E4M3FNUZ", "F8_E5M2FNUZ"):
        return 0x80 not in data
    size, mask = NOT_FINITE.get(dtype, (0, 0))
    starts = range(0, len(data), size) if size else ()
    return all(int.from_bytes(data[place : place + size], "little") & mask != mask for place in starts)


def read_layout(document: bytes) -> list[Spec]:
    rows = parse_canonical(document)
    require(isinstance(rows, list), "a layout is a list")
    require(all(isinstance(row, list) and len(row) == 3 for row in rows), "a tensor is a list of three")
    specs = [check_spec(*row) for row in rows]
    require(len({name for name, _, _ in specs}) == len(specs), "a name stands twice in a layout")
    return specs


@dataclass
class TensorFile:
    """A safetensors file: its tensors in layout order, with where each begins."""

    specs: list[Spec]
    begins: list[int]
    head: int
    size: int


def read_header(raw: bytes) -> TensorFile:
    """Reads the first 8 + N bytes of a safetensors file."""
    require(len(raw) >= 8, "no safetensors file: under 8 bytes")
    count = int.from_bytes(raw[:8], "little")
    require(count <= 100_000_000 and len(raw) >= 8 + count, "a header that is too long, or cut off")
    text = raw[8 : 8 + count]
    require(text.startswith(b"{"), "a header that does not begin with {")
    tree = parse(text.rstrip(b" "))
    metadata = tree.pop("__metadata__", {})
    require(isinstance(metadata, dict) and all(map(is_text, metadata.values())), "__metadata__ is no object of strings")
    placed = []
    for name, entry in tree.items():
        members(entry, name, "dtype shape data_offsets")
        spec = check_spec(name, entry["dtype"], entry["shape"])
        offsets = entry["data_offsets"]
        require(isinstance(offsets, list) and len(offsets) == 2 and all(map(is_whole, offsets)), f"{name!r}: offsets")
        require(offsets[1] - offsets[0] == length(spec), f"{name!r}: its bytes and its shape differ")
        placed.append((offsets[0], offsets[1], spec))
    placed.sort(key=lambda one: one[:2])  # which keeps the order of the text where both are equal
    end = 0
    for begin, stop, spec in placed:
        require(begin == end, f"{spec[0]!r}: an overlap or a gap before it")
        end = stop
    return TensorFile([one[2] for one in placed], [one[0] for one in placed], 8 + count, 8 + count + end)


# ---------------------------------------------------------------- manifests

RELATIONS = ("trained_on", "continued_from", "merged_from", "extracted_from", "converted_from")
NOT_IN_A_PATH = re.compile("[\\\\\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def read_manifest(document: bytes) -> dict[str, Any]:
    tree = parse_canonical(document)
    require(isinstance(tree, dict) and type(tree.get("format")) is int and tree["format"] == 1, "not format 1")
    members(tree, "manifest", "format kind components files config base parents recipe")
    require(tree["kind"] in ("adapter", "base", "checkpoint"), "unknown kind")
    require(tree["base"] is None or is_digest(tree["base"]), "base is no digest")
    for name in ("config", "recipe"):
        require(tree[name] is None or isinstance(tree[name], dict), f"{name} is no object")
    require(isinstance(tree["components"], dict), "components are no object")
    for role, part in tree["components"].items():
        require(is_role(role), f"role {role!r}")
        members(part, role, "layout tensors data" if "data" in part else "layout tensors")
        require(is_digest(part["layout"]) and isinstance(part["tensors"], list), f"component {role}")
        require(all(map(is_digest, part["tensors"])), f"component {role}: a tensor is no digest")
        require("data" not in part or is_digest(part["data"]), f"component {role}: its state document is no digest")
    check_files(tree)
    check_parents(tree)
    return tree


def check_files(tree: dict[str, Any]) -> None:
    require(isinstance(tree["files"], list), "files are no list")
    carried = []
    for file in tree["files"]:
        members(file, "file", "path sha256 size component")
        check_path(file["path"])
        require(is_digest(file["sha256"]) and is_whole(file["size"]), f"file {file['path']}")
        if file["component"] is not None:
            require(is_text(file["component"]) and file["component"] in tree["components"], "unknown component")
            carried.append(file["component"])
    require(len(set(carried)) == len(carried), "two files carry one component")
    paths = [file["path"] for file in tree["files"]]
    require(all(one < other for one, other in pairwise(paths)), "files out of order")  # Python compares code points
    require(not any(other.startswith(f"{one}/") for one in paths for other in paths), "a file is a folder")


def check_path(path: Any) -> None:
    require(is_text(path) and 0 < len(path) <= 512 and not NOT_IN_A_PATH.search(path), f"path {path!r}")
    parts = path.split("/")
    require(not any(part in ("", ".", "..") for part in parts), f"path {path!r}")
    require(not (len(parts[0]) == 2 and parts[0][1] == ":"), f"path {path!r}")


def check_parents(tree: dict[str, Any]) -> None:
    require(isinstance(tree["parents"], list), "parents are no list")
    seen = {("trained_on", tree["base"])}
    for parent in tree["parents"]:
        members(parent, "parent", "relation digest weight")
        require(parent["relation"] in RELATIONS and is_digest(parent["digest"]), "parent")
        weight = parent["weight"]
        require(weight is None or (parent["relation"] == "merged_from" and is_number(weight)), "weight")
        edge = (parent["relation"], parent["digest"])
        require(edge not in seen, "a parent stands twice, or is the base")
        seen.add(edge)


# ---------------------------------------------------------------- events

EVENT_MEMBERS = "format registry namespace name seq kind version tag at actor payload sha256"
AT = re.compile("[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\\.[0-9]{6}Z")


def read_event(document: bytes) -> dict[str, Any]:
    """Reads an event by itself."""
    tree = parse_canonical(document)
    require(isinstance(tree, dict) and type(tree.get("format")) is int and tree["format"] == 1, "not format 1")
    members(tree, "event", EVENT_MEMBERS)
    rest = {name: value for name, value in tree.items() if name != "sha256"}
    require(sha256(canonical(rest)).hexdigest() == tree["sha256"], "the event's sha256 is not its own")
    require(is_text(tree["kind"]) and is_text(tree["actor"]) and isinstance(tree["payload"], dict), "event")
    require(is_text(tree["at"]) and AT.fullmatch(tree["at"]), f"time {tree['at']!r}")
    return tree
