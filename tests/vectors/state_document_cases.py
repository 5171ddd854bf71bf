"""State documents of every form, and what is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from registry.core.state_document import Inert, state_document

TENSORS = ("0.exp_avg", "0.step")


@dataclass(frozen=True)
class _Named:
    """Stands for the tensor of this name."""

    name: str


def _name(value: object) -> str | None:
    return value.name if isinstance(value, _Named) else None


CASES: tuple[tuple[str, Any], ...] = (
    ("plain values", {"epoch": 3, "name": "walk\n\u00e9\U0001f600", "done": False, "best": None, "lr": 0.001}),
    ("lists and dicts", [[], {}, [[1, -2], {"a": {"b": []}}], ""]),
    ("tuples and sets", ((), (1, "a"), {3, 1, 2}, frozenset(("b", "a")), set())),
    ("floats that are integral", [1.0, -0.0, 1e16, 1e22, 1.5e300, 0.5]),
    ("floats that are not finite", [float("nan"), float("inf"), -float("inf")]),
    ("complex numbers", [1 + 2j, complex(0.5, float("nan"))]),
    ("integers", [2**53 - 1, 2**53, -(2**64), 10**30]),
    ("bytes", [b"", b"\x00\xff\x10"]),
    ("keys that are no text", {0: "zero", (1, 2): "pair", None: 1, True: 2, 0.5: 3}),
    ("keys that begin with a dollar", {"$tensor": "x", "y": 1}),
    (
        "tensors",
        {"state": {0: {"exp_avg": _Named("0.exp_avg"), "step": _Named("0.step")}}, "groups": [{"params": [0]}]},
    ),
    ("a tensor twice", [_Named("0.step"), _Named("0.step")]),
    ("classes that are not rebuilt", Inert("numpy.random.Generator", (1, [2]), {"state": {"key": b"k"}})),
    ("a document that is a tensor", _Named("0.step")),
    ("nested", [[[[[[[[(((((1,),),),),)]]]]]]]]),
)
REFUSED: tuple[tuple[str, str], ...] = (
    ("", "not JSON"),
    ("NaN", "no JSON number"),
    ('{"a":1, "b":2}', "not canonical: spaces"),
    ('{"b":1,"a":2}', "not canonical: out of order"),
    ("[1.0]", "not canonical: a number"),
    ('{"a":1,"a":1}', "a member twice"),
    ('{"$tensor":"1.exp_avg"}', "a tensor that the component does not have"),
    ('{"$tensor":0}', "a tensor without a name"),
    ('{"$tensor":"0.step","x":1}', "a member beside a tensor"),
    ('{"$list":[]}', "an unknown form"),
    ('{"$":1}', "an empty form"),
    ('{"$dict":[["a"]]}', "a key without a value"),
    ('{"$dict":{"a":1}}', "a dict that is no list"),
    ('{"$dict":[[0,1,2]]}', "a key with two values"),
    ('{"$tuple":7}', "a tuple that is no list"),
    ('{"$tuple":[1],"$set":[1]}', "two forms"),
    ('{"$bytes":"A"}', "base64 that is cut off"),
    ('{"$bytes":"A A="}', "no base64"),
    ('{"$bytes":7}', "bytes that are a number"),
    ('{"$float":"one"}', "no float"),
    ('{"$int":"0.5"}', "no integer"),
    ('{"$int":"xyz"}', "not hexadecimal"),
    ('{"$complex":[1]}', "half of a complex number"),
    ('{"$complex":["x",1]}', "a complex number of text"),
    ('{"$opaque":"C"}', "a class without arguments"),
    ('{"$opaque":1,"arguments":[],"state":null}', "a class without a name"),
    ('{"$opaque":"C","arguments":[],"more":null}', "a class with another member"),
)


def state_document_vectors() -> dict[str, Any]:
    cases = []
    for what, tree in CASES:
        document = state_document(tree, tensor_name=_name, what=what)
        cases.append({"what": what, "document": document.decode()})
    return {
        "tensors": list(TENSORS),
        "cases": cases,
        "refused": [{"document": document, "reason": reason} for document, reason in REFUSED],
    }
