"""Writes every conformance vector of this folder again, with today's code, and the examples of docs/format.md with
them: `python -m tests.vectors.make_vectors`.

Nothing here is random, and two runs write the same bytes: see `sample_store` for where time and ids come from. The
vectors change only where a format does."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from registry.core.canonical_json import canonical_json, parse_json
from registry.core.digest import tensor_hasher
from registry.core.event import Event, number_to_json
from registry.core.layout import DTYPE_BITS, Layout, TensorSpec
from registry.core.manifest import Component, File, Manifest, Parent
from registry.core.placement import ROLES, FilePlacement, Placement, Splice
from tests.vectors.content_cases import content_vectors
from tests.vectors.doc_examples import with_examples
from tests.vectors.reference_cases import reference_vectors
from tests.vectors.sample_store import REGISTRY_ID, make_store
from tests.vectors.state_document_cases import state_document_vectors
from tests.vectors.tensor_bytes import hexes, stream

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "format.md"


# ---------------------------------------------------------------- canonical JSON


def canonical_vectors() -> dict[str, Any]:
    numbers = (
        "0 -0 -0.0 1 1.0 -1 16.0 0.1 1.5 100 1e2 1E2 1e-2 123456789012 9007199254740991 -9007199254740991 "
        "9007199254740992 9007199254740993 1e15 1e16 1e20 123456789012345680000 1e21 1.5e300 -1e21 0.000001 0.0000001 "
        "1.5e-7 333333333.33333329 1E30 4.50 2e-3 0.000000000000000000000000001 5e-324 2.2250738585072014e-308 "
        "1.7976931348623157e308 9.999999999999999e22 1e23 0.30000000000000004 18446744073709551616"
    )
    texts = (
        r'"plain"',
        r'"\u0000\u0001\b\t\n\u000b\f\r\u001f"',
        r'"quote \" backslash \\ solidus \/"',
        r'"\u007f\u0080\u00e9\u2028\ufeff"',
        r'"\ud83d\ude00"',
        r'"e\u0301 is not \u00e9"',
    )
    trees = (
        "[]",
        "{}",
        "null",
        "[true, false, null, [], {}]",
        '{"b": 1, "a": {"d": [3, 2], "c": ""}}',
        '{"10": 1, "9": 2, "": 3}',
        # By UTF-16 code unit U+1F600 (d83d de00) stands before U+FB33 and U+FFFF; by code point it comes last.
        r'{"\uffff": 1, "\ud83d\ude00": 2, "\ufb33": 3, "\u20ac": 4, "\u0080": 5, "\u00f6": 6, "1": 7, "\r": 8}',
    )
    cases = [
        {"json": text, "canonical": canonical_json(parse_json(text), "vector").decode()}
        for text in (*numbers.split(), *texts, *trees)
    ]
    refused = [
        {"json": '{"a": 1, "a": 1}', "reason": "a key twice"},
        {"json": "[NaN]", "reason": "no JSON number"},
        {"json": "[-Infinity]", "reason": "no JSON number"},
        {"json": "[1e400]", "reason": "too large for a double"},
        {"json": r'["\ud83d"]', "reason": "half of a surrogate pair"},
        {"json": r'{"\ude00": 1}', "reason": "half of a surrogate pair, in a key"},
        {"json": "[1,]", "reason": "not JSON"},
    ]
    return {"cases": cases, "refused": refused}


# ---------------------------------------------------------------- tensors and layouts


def tensor_vectors() -> list[dict[str, Any]]:
    shapes: dict[str, list[tuple[int, ...]]] = {dtype: [(2, 4)] for dtype in DTYPE_BITS}
    shapes["F32"] += [(), (8,), (4, 2), (1, 8), (0,), (0, 3), (3, 0), (1,)]
    shapes["F4"] += [(2,), (0,), (4, 4)]
    shapes["F6_E2M3"] += [(4,), (8, 2)]
    shapes["BOOL"] += [(3,)]
    shapes["U8"] += [(8,), (1000003,)]  # more than one chunk of BLAKE3, and a size with many digits
    found = []
    for dtype, those in shapes.items():
        for shape in those:
            size = TensorSpec("", dtype, shape).nbytes
            data = stream(f"{dtype} {shape}", size) if dtype != "BOOL" else bytes([1, 0, 1, 1, 0, 0, 1, 0])[:size]
            hasher = tensor_hasher(dtype, shape)
            hasher.update(data)
            # What is long is given as what it repeats, so that the file stays small.
            held: dict[str, Any] = {"bytes": data.hex()}
            if size > 1000:
                data = (b"\x00\x01\x02" * size)[:size]
                hasher = tensor_hasher(dtype, shape)
                hasher.update(data)
                held = {"bytes": "000102", "repeated_to": size}
            head = f"{dtype}[{','.join(map(str, shape))}]\n"
            found.append({"dtype": dtype, "shape": list(shape), **held, "head": head, "digest": hasher.hexdigest()})
    return found


def layout_vectors() -> dict[str, Any]:
    layouts = [
        [],
        [["weight", "F32", [2, 3]]],
        [["b", "F32", [2]], ["a", "F32", [2]]],
        [["scalar", "I64", []], ["nothing", "F32", [0, 3]], ["codes", "F4", [4, 4]], ["mask", "BOOL", [3]]],
        [[f"every.{dtype}", dtype, [8]] for dtype in DTYPE_BITS],
        [['name with spaces and ü 😀 " \\', "BF16", [1, 1, 1, 1]], ["", "U8", [9007199254740991, 0]]],
    ]
    cases = []
    for rows in layouts:
        layout = Layout(tuple(TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in rows))
        cases.append({"document": layout.document.decode(), "digest": layout.digest, "bytes": layout.nbytes})
    refused = [
        ('[["a","F32",[1]],["a","F32",[2]]]', "a name twice"),
        ('[["a","F32",[1]] ]', "not canonical"),
        ('[["a","f32",[1]]]', "unknown dtype"),
        ('[["a","F32",[1.5]]]', "a shape of numbers that are not whole"),
        ('[["a","F32",[-1]]]', "a negative size"),
        ('[["a","F32",[true]]]', "a flag in a shape"),
        ('[["a","F32",[9007199254740992,0]]]', "a size over 2**53 - 1"),
        ('[["a","F4",[3]]]', "12 bits are no whole number of bytes"),
        ('[["a","F32"]]', "no shape"),
        ('[["a","F32",[1],0]]', "four members"),
        ('[["a\\u0001","F32",[1]]]', "a control character in a name"),
        ('[["a\x7f","F32",[1]]]', "DEL in a name"),
        ('[["a\x85","F32",[1]]]', "a C1 control in a name"),
        ('{"a":1}', "not a list"),
        ("", "not JSON"),
    ]
    return {"cases": cases, "refused": [{"document": document, "reason": reason} for document, reason in refused]}


# ---------------------------------------------------------------- manifests and placements


def manifest_vectors() -> dict[str, Any]:
    layout = hexes("layout")
    base = Manifest("base", (Component("model", layout, (hexes("t0"), hexes("t1"))),))
    config = {
        "peft_type": "LORA",
        "r": 16,
        "lora_alpha": 32.0,
        "lora_dropout": 0.05,
        "target_modules": ["k_proj", "q_proj"],
        "rank_pattern": {},
        "big": 1e20,
        "small": 1e-7,
        "\uffff": "U+FFFF",
        "😀": "U+1F600 stands before U+FFFF",
        "text": 'quote " backslash \\ tab \t é',
        "nothing": None,
    }
    adapter = Manifest(
        "adapter",
        (Component("adapter", layout, (hexes("t0"), hexes("t0"))),),
        (
            File("adapter_config.json", hexes("config"), 700),
            File("adapter_model.safetensors", hexes("file"), 4352, "adapter"),
        ),
        config,
        base.digest,
        (Parent("continued_from", hexes("other")),),
    )
    checkpoint = Manifest(
        "checkpoint",
        (
            Component("ema", layout, ()),
            Component("model", layout, (hexes("t2"),)),
            Component("optimizer", layout, (hexes("t3"),), hexes("data")),
            Component("scheduler", layout, (), hexes("data")),
        ),
        (File("a/b.safetensors", hexes("f0"), 0, "model"), File("a/c.safetensors", hexes("f1"), 2**53 - 1, "ema")),
        config,
        None,
        (
            Parent("merged_from", hexes("p0"), 0.7),
            Parent("merged_from", hexes("p1"), -1),
            Parent("merged_from", hexes("p2")),
            Parent("extracted_from", hexes("p0")),
        ),
        {"method": "ties", "density": 0.5},
    )
    empty = Manifest("base", ())
    cases = [{"document": one.document.decode(), "digest": one.digest} for one in (base, adapter, checkpoint, empty)]

    def changed(**members: Any) -> str:
        tree = parse_json(adapter.document)
        tree.update(members)
        return canonical_json({k: v for k, v in tree.items() if v != "LEAVE OUT"}, "vector").decode()

    tree = parse_json(adapter.document)
    plain, tensors = tree["files"]
    part = tree["components"]["adapter"]
    parent = tree["parents"][0]
    refused = [
        (changed(format=2), "a newer format"),
        (changed(format=True), "the format is no number"),
        (changed(kind="lora"), "an unknown kind"),
        (changed(kind="LEAVE OUT"), "a member is missing"),
        (changed(comment=""), "an unknown member"),
        (adapter.document.decode() + "\n", "not canonical: a line feed at the end"),
        (json.dumps(tree, ensure_ascii=False), "not canonical: spaces"),
        (changed(base=tree["base"].upper()), "a digest in upper case"),
        (changed(base=tree["base"][:-1]), "a short digest"),
        (changed(components={"": part}), "an empty role"),
        (changed(components={"Adapter": part}), "a role in upper case"),
        (changed(components={"adapter": {**part, "layout": None}}), "no layout"),
        (changed(components={"adapter": {**part, "note": 1}}), "an unknown member of a component"),
        (changed(components={"adapter": {**part, "data": None}}), "a state document that is null"),
        (changed(components={"adapter": {**part, "data": hexes("data")[:8]}}), "a state document that is no digest"),
        (changed(files=[tensors, plain]), "files out of order"),
        (changed(files=[plain, plain]), "a path twice"),
        (changed(files=[plain, {**tensors, "component": "model"}]), "a file of an unknown component"),
        (changed(files=[{**plain, "component": "adapter"}, tensors]), "two files of one component"),
        (changed(files=[plain, {**tensors, "size": -1}]), "a negative size"),
        (changed(files=[plain, {**tensors, "size": 1.5}]), "a size that is not whole"),
        (changed(files=[{**plain, "path": "adapter_model.safetensors/x"}, tensors][::-1]), "a file that is a folder"),
        *((changed(files=[{**plain, "path": path}]), f"path: {why}") for path, why in BAD_PATHS),
        (changed(config=[]), "a config that is no object"),
        (changed(parents=[parent, parent]), "a parent twice"),
        (changed(parents=[{**parent, "relation": "trained_on", "digest": tree["base"]}]), "the base again"),
        (changed(parents=[{**parent, "relation": "copied_from"}]), "an unknown relation"),
        (changed(parents=[{**parent, "weight": 1}]), "a weight, and no merge"),
        (changed(parents=[{**parent, "relation": "merged_from", "weight": "1"}]), "a weight that is text"),
        (changed(parents=[{**parent, "relation": "merged_from", "weight": True}]), "a weight that is a flag"),
    ]
    return {"cases": cases, "refused": [{"document": document, "reason": reason} for document, reason in refused]}


BAD_PATHS = (
    ("", "empty"),
    ("/etc/passwd", "absolute"),
    ("../x", "above its folder"),
    ("a/../../x", "above its folder"),
    ("a//b", "an empty part"),
    ("./a", "a part that is a dot"),
    ("a/", "a folder"),
    ("a\\b", "a backslash"),
    ("C:", "a drive"),
    ("C:/a", "a drive"),
    ("a\nb", "a control character"),
    ("a\u202eb", "a change of direction"),
    ("x" * 513, "513 characters"),
)


def placement_vectors() -> dict[str, Any]:
    blobs = tuple((hexes(f"b{place}"), role) for place, role in enumerate(ROLES))
    entries = ((0, 0), (0, 1), (1, 5), (0, 2), (1, 6), (1, 7), (1, 7))
    splices = (
        Splice(0, "model", 0, 3),
        Splice(9, "ema", 0, 1),
        Splice(9, "model", 3, 1),
        Splice(2**53 - 1, "ema", 0, 1),
    )
    placement = Placement(
        blobs,
        {"model": entries, "ema": ((7, 0),), "scheduler": ()},
        {
            "model.safetensors": FilePlacement(2, False),
            "config.json": FilePlacement(3, True),
            "run.pth": FilePlacement(2, False, splices),
            "last.pth": FilePlacement(3, False, ()),
        },
    )
    tree = placement.to_json()

    def spliced(*splices: Any) -> dict[str, Any]:
        return {**tree, "files": {"run.pth": [2, False, [*splices]]}}

    def changed(**members: Any) -> dict[str, Any]:
        return {**tree, **members}

    refused = [
        (changed(components={"model": [[len(blobs), 0, 1]]}), "a blob that is not listed"),
        (changed(components={"model": [[-1, 0, 1]]}), "a negative position"),
        (changed(components={"model": [[0, -1, 1]]}), "a negative ordinal"),
        (changed(components={"model": [[0, 0, 0]]}), "an empty run"),
        (changed(components={"model": [[0, 0, 10**12]]}), "more tensors than a file can hold"),
        (changed(components={"model": [[0, 0]]}), "a run of two numbers"),
        (changed(components={"model": [["0", 0, 1]]}), "a position that is text"),
        (changed(components={"model": [[True, 0, 1]]}), "a position that is a flag"),
        (changed(files={"model.safetensors": [len(blobs), True]}), "a file in a blob that is not listed"),
        (changed(files={"model.safetensors": [2, 0]}), "a number for a flag"),
        (changed(files=[]), "a list for an object"),
        (changed(components={"model": 7}), "a number for a list"),
        (changed(files={"run.pth": [3, True, []]}), "splices in a whole file"),
        (changed(files={"run.pth": [2, False, None]}), "splices that are null"),
        (changed(files={"run.pth": [2, False, [], []]}), "splices twice"),
        (changed(files={"run.pth": [2]}), "no flag"),
        (spliced([0, "model", 0]), "a splice of three"),
        (spliced([-1, "model", 0, 1]), "a splice before the begin"),
        (spliced([9, "model", 0, 1], [8, "model", 1, 1]), "splices that do not ascend"),
        (spliced([2**53, "model", 0, 1]), "a splice beyond 2**53 - 1"),
        (spliced([0.5, "model", 0, 1]), "a splice at half a byte"),
        (spliced([0, "model", -1, 1]), "a splice of a negative tensor"),
        (spliced([0, "model", 0, 0]), "an empty splice"),
        (spliced([0, "model", 5, 3]), "a splice of more tensors than there are"),
        (spliced([0, "model", True, 1]), "a splice with a flag"),
        (spliced([0, "optimizer", 0, 1]), "a splice of an unknown component"),
        (spliced([0, "scheduler", 0, 1]), "a splice of a component without tensors"),
        (spliced([0, None, 0, 1]), "a splice of no component"),
        (changed(blobs=[[blobs[0][0], "stolen"]]), "an unknown role"),
        (changed(blobs=[[blobs[0][0][:8], "tensors"]]), "no digest"),
        (changed(blobs=[*tree["blobs"], tree["blobs"][0]]), "a blob twice"),
        ({"blobs": []}, "members are missing"),
    ]
    return {
        "cases": [{"json": tree, "entries": {"model": entries, "ema": [(7, 0)], "scheduler": []}}],
        "refused": [{"json": one, "reason": reason} for one, reason in refused],
    }


# ---------------------------------------------------------------- events


def event_vectors() -> list[dict[str, Any]]:
    at = datetime(2026, 11, 1, 12, 30, 0, 5, tzinfo=UTC)
    nan = {"values": {"nan": float("nan"), "up": float("inf"), "down": -float("inf"), "big": 1e20, "x": 1.5, "n": 3.0}}
    values = {key: number_to_json(value) for key, value in nan["values"].items()}
    metadata = {"seed": {"text": str(2**60), "number": 2.0**60}, "run": {"text": "0x10", "number": None}}
    said: list[tuple[str, int, str | None, datetime, str, dict[str, Any]]] = [
        ("metrics", 1, None, at, "ada", {"values": values, "step": 100}),
        ("metrics", 1, None, at, "ada", {"values": {"x": 0.1}, "step": None}),
        ("metadata", 1, None, at, "ada", metadata),
        ("tag_moved", 1, "prod", at, "ada", {"from": None, "to": 1, "why": None}),
        ("tag_moved", 2, "prod", at, "ada", {"from": 1, "to": 2, "why": 'better "reward"\n\t😀'}),
        ("tag_protected", 2, "prod", at, "ada", {"why": None}),
        ("tag_unprotected", 2, "prod", at, "ada", {"why": "retrained"}),
        ("tag_deleted", 2, "prod", at, "ada", {"from": 2, "why": None}),
        ("described", 2, None, at, "ada", {"blobs": {"live_names": hexes("names"), "probe": hexes("probe")}}),
        ("note", 2, None, at.replace(microsecond=0), "ünal", {"text": "flew twice"}),
        ("note", 2, None, datetime(999, 1, 1, 1, tzinfo=UTC), "a clock that is off", {"text": ""}),
        ("note", 2, None, datetime(2026, 11, 1, 16, tzinfo=timezone(timedelta(hours=2))), "ada", {"text": "\u2028"}),
    ]
    events = [
        Event("walk", "perturb", seq, kind, version, tag, when, actor, payload)
        for seq, (kind, version, tag, when, actor, payload) in enumerate(said, 2)
    ]
    return [
        {
            "event": {
                "namespace": one.namespace,
                "name": one.name,
                "seq": one.seq,
                "kind": one.kind,
                "version": one.version,
                "tag": one.tag,
                "at": one.at.isoformat(),
                "actor": one.actor,
                "payload": one.payload,
            },
            "document": one.document(REGISTRY_ID).decode(),
        }
        for one in events
    ]


# ---------------------------------------------------------------- all of it


def make(folder: Path) -> None:
    """Writes all vectors into an empty folder."""
    vectors = {
        "canonical_json": canonical_vectors(),
        "tensors": tensor_vectors(),
        "layouts": layout_vectors(),
        "manifests": manifest_vectors(),
        "placements": placement_vectors(),
        "state_documents": state_document_vectors(),
        "content": content_vectors(),
        "references": reference_vectors(),
        "events": event_vectors(),
        "store_state": make_store(folder / "store"),
    }
    for name, tree in vectors.items():
        text = json.dumps(tree, indent=1, ensure_ascii=True) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="ascii")


def main() -> None:
    with tempfile.TemporaryDirectory(dir=HERE) as temporary:
        made = Path(temporary)
        make(made)
        shutil.rmtree(HERE / "store", ignore_errors=True)
        for path in made.iterdir():
            path.replace(HERE / path.name)
    PAGE.write_text(with_examples(PAGE.read_text(encoding="utf-8"), HERE), encoding="utf-8")
    files = [path for path in HERE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    print(f"{len(files)} files, {sum(path.stat().st_size for path in files)} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
