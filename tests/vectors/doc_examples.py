"""The examples of docs/format.md, taken from the vectors: each stands in the fenced block that follows its comment
`<!-- example: NAME -->`, and is written there by `make_vectors`."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Any

from registry.core import peft_keys
from tests.conformance.independent_content import content_document
from tests.conformance.independent_documents import canonical, parse, read_layout

EXAMPLE = re.compile(r"(<!-- example: (.+?) -->\n```[a-z]+\n)(.*?)(```\n)", re.DOTALL)
WIDTH = 120


def with_examples(page: str, vectors: Path) -> str:
    """The page with every example as the vectors have it.

    Raises:
        KeyError: the page names an example that is not known.
    """
    known = examples(vectors)
    found = {match[2] for match in EXAMPLE.finditer(page)}
    if found != set(known):
        raise KeyError(f"examples {sorted(found ^ set(known))} are on the page alone, or not on it")
    return EXAMPLE.sub(lambda match: f"{match[1]}{known[match[2]].rstrip()}\n{match[4]}", page)


def examples(vectors: Path) -> dict[str, str]:
    store = vectors / "store"
    state = json.loads((vectors / "store_state.json").read_bytes())["names"]

    def blob(digest: str) -> bytes:
        return (store / "blobs" / "sha256" / digest[:2] / digest).read_bytes()

    def read_event(name: str, seq: int) -> bytes:
        return (store / "journal" / name / f"{seq}.json").read_bytes()

    def event(name: str, seq: int) -> str:
        return pretty(json.loads(read_event(name, seq)))

    def manifest(name: str, number: int) -> dict[str, Any]:
        tree: dict[str, Any] = json.loads(blob(state[name]["versions"][str(number)]["digest"]))
        return tree

    tied = manifest("walk/tied", 1)["components"]["model"]["layout"]
    run = manifest("walk/run", 1)
    adapter = manifest("walk/perturb", 3)
    part = adapter["components"]["adapter"]
    tensors = (read_layout(blob(part["layout"])), part["tensors"])
    content = content_document("adapter", {"adapter": tensors}, adapter["config"])
    return {
        "registry.json": (store / "registry.json").read_text(),
        "tensor digests": tensor_digests(json.loads((vectors / "tensors.json").read_bytes())),
        "layout walk/tied@1": blob(tied).decode(),
        "manifest walk/perturb@3": pretty(adapter),
        "content walk/perturb@3": pretty(parse(canonical(content))),
        "tuner names": tuner_names(),
        "known LoRA keys": filled(" ".join(sorted(peft_keys.CONFIG_KEYS["LORA"] | peft_keys.COMMON_KEYS))),
        "event walk/full 1": event("walk/full", 1),
        "state document walk/run@1 optimizer": pretty(json.loads(blob(run["components"]["optimizer"]["data"]))),
        "placement walk/run@1": pretty(json.loads(read_event("walk/run", 1))["payload"]["placement"]),
        "event walk/perturb 3": event("walk/perturb", 3),
    }


def tensor_digests(vectors: list[dict[str, Any]]) -> str:
    wanted = [("F32", []), ("F4", [2]), ("BOOL", [3]), ("F32", [0, 3])]
    lines = []
    for dtype, shape in wanted:
        one = next(vector for vector in vectors if (vector["dtype"], vector["shape"]) == (dtype, shape))
        lines.append(f"{json.dumps(one['head']):<12} {one['bytes'] or '(no bytes)':<10} {one['digest']}")
    return "\n".join(lines)


def tuner_names() -> str:
    groups = {
        "one tensor": peft_keys.TENSORS,
        "one module": peft_keys.MODULES,
        "tensor or module": peft_keys.TENSORS_OR_MODULES,
        "a list": peft_keys.LISTS,
        "by module": peft_keys.BY_MODULE,
        "renamed": peft_keys.RENAMED,
        "one adapter": peft_keys.ONE_ADAPTER,
    }
    return "\n".join(filled(f"{group}: {' '.join(sorted(names))}") for group, names in groups.items())


def filled(text: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def pretty(tree: Any, indent: int = 0) -> str:
    """JSON with what fits on a line on one line."""
    line = json.dumps(tree, ensure_ascii=False)
    if len(line) + indent <= WIDTH - 20 or not isinstance(tree, dict | list) or not tree:
        return line
    space = " " * (indent + 2)
    if isinstance(tree, dict):
        inner = [f"{space}{json.dumps(key)}: {pretty(value, indent + 2)}" for key, value in tree.items()]
        return "{\n" + ",\n".join(inner) + "\n" + " " * indent + "}"
    return "[\n" + ",\n".join(space + pretty(value, indent + 2) for value in tree) + "\n" + " " * indent + "]"
