"""State documents of docs/format.md, read from that page alone: held against their form, not made into objects."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Collection
from typing import Any

from tests.conformance.independent_documents import Refused, is_number, is_text, parse_canonical, require

FLOAT = re.compile(r"-?([0-9]+\.0|[0-9](\.[0-9]+)?e\+[0-9]+|inf)|nan")


def read_state_document(document: bytes, tensors: Collection[str]) -> Any:
    """The document's tree.

    Args:
        tensors: names that the component has.
    """
    tree = parse_canonical(document)
    try:
        check(tree, tensors)
    except RecursionError as error:
        raise Refused("a state document that is nested too deeply") from error
    return tree


def check(value: Any, tensors: Collection[str]) -> None:
    if isinstance(value, list):
        for item in value:
            check(item, tensors)
    elif isinstance(value, dict):
        special = [name for name in value if name.startswith("$")]
        if special:
            check_special(special[0], value, tensors)
        else:
            for item in value.values():
                check(item, tensors)


def check_special(kind: str, value: dict[str, Any], tensors: Collection[str]) -> None:
    content = value[kind]
    wanted = {kind, "arguments", "state"} if kind == "$opaque" else {kind}
    require(set(value) == wanted, f"a state document with the members {sorted(value)}")
    if kind == "$tensor":
        require(is_text(content) and content in tensors, f"a state document names the tensor {content!r}")
    elif kind in ("$tuple", "$set", "$frozenset", "$dict"):
        require(isinstance(content, list), f"{kind} is no list")
        require(
            kind != "$dict" or all(isinstance(pair, list) and len(pair) == 2 for pair in content), "$dict: no pairs"
        )
        check(content, tensors)
    elif kind == "$bytes":
        try:
            base64.b64decode(content, validate=True)
        except (TypeError, ValueError, binascii.Error) as error:
            raise Refused(f"$bytes: {error}") from error
    elif kind == "$int":
        require(is_text(content) and re.fullmatch("-?[0-9a-f]+", content), f"$int {content!r}")
    elif kind == "$float":
        require(is_text(content) and FLOAT.fullmatch(content), f"$float {content!r}")
    elif kind == "$complex":
        require(isinstance(content, list) and len(content) == 2, "$complex is no pair")
        good = all(is_number(part) or (isinstance(part, dict) and set(part) == {"$float"}) for part in content)
        require(good, "$complex of no numbers")
        check(content, tensors)
    else:
        require(kind == "$opaque" and is_text(content), f"a state document with the member {kind!r}")
        check(value["arguments"], tensors)
        check(value["state"], tensors)
