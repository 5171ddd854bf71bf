"""docs/format.md and the code name the same things."""

from __future__ import annotations

import re
from typing import get_args

from registry.catalog import tables
from registry.core import content_digest, event, layout, manifest, peft_keys, placement, reference, state_document
from registry.store import local
from tests.conformance import independent_content, independent_documents
from tests.vectors.make_vectors import PAGE

TEXT = PAGE.read_text(encoding="utf-8")


def test_the_page_has_every_dtype_with_its_bits() -> None:
    rows = re.findall(r"^\| (\d+) \| (`.*`) \|$", TEXT, re.MULTILINE)
    found = {dtype: int(bits) for bits, dtypes in rows for dtype in re.findall("`([A-Z0-9_]+)`", dtypes)}
    assert found == layout.DTYPE_BITS


def test_the_page_has_every_kind_of_event_and_no_other() -> None:
    table = TEXT.partition("### Kinds")[2].partition("Payload of `pushed`")[0]
    named = re.findall(r"^\| ((?:`[a-z_]+`(?:, )?)+) \|", table, re.MULTILINE)
    kinds = {kind for cell in named for kind in re.findall("`([a-z_]+)`", cell)} - {"version", "tag"}
    check = next(str(one.sqltext) for one in tables.event.constraints if "kind" in str(getattr(one, "sqltext", "")))
    assert kinds == set(re.findall("'([a-z_]+)'", check))


def test_the_page_has_every_relation_kind_and_role() -> None:
    for word in (*manifest.KINDS, *manifest.RELATIONS, *placement.ROLES):
        assert f"`{word}`" in TEXT
    assert get_args(manifest.Relation) == independent_documents.RELATIONS


def test_the_limits_on_the_page_are_those_of_the_code() -> None:
    assert (reference.MAX_PART, manifest.MAX_FILE_PATH) == (128, 512)
    assert (placement.MAX_TENSORS, state_document.MAX_DEPTH) == (2**24, 200)
    assert (local.STORE_FORMAT, manifest.FORMAT, event.FORMAT, content_digest.FORMAT) == (1, 1, 1, 1)


def test_the_names_of_tuners_are_the_same_on_the_page_in_the_code_and_in_the_reader() -> None:
    groups = {
        "one tensor": peft_keys.TENSORS,
        "one module": peft_keys.MODULES,
        "tensor or module": peft_keys.TENSORS_OR_MODULES,
        "a list": peft_keys.LISTS,
        "by module": peft_keys.BY_MODULE,
        "renamed": peft_keys.RENAMED,
        "one adapter": peft_keys.ONE_ADAPTER,
    }
    block = TEXT.partition("<!-- example: tuner names -->")[2].split("```")[1].removeprefix("text\n")
    page = dict(one.split(": ") for one in block.replace("\n  ", " ").strip().splitlines())
    assert {group: set(names.split()) for group, names in page.items()} == groups
    assert {group: set(names.split()) for group, names in independent_content.TUNER_NAMES.items()} == groups


def test_the_keys_of_a_lora_are_the_same_on_the_page_in_the_code_and_in_the_reader() -> None:
    known = peft_keys.CONFIG_KEYS["LORA"] | peft_keys.COMMON_KEYS
    block = TEXT.partition("<!-- example: known LoRA keys -->")[2].split("```")[1].removeprefix("text\n")
    assert set(block.split()) == known == set(independent_content.KNOWN_LORA_KEYS)
    assert set(independent_content.OPTIONS) == set(content_digest.LORA_OPTIONS)
    for word in (*content_digest.LORA_OPTIONS, *content_digest.PLAIN_INITS, *content_digest.OUTSIDE):
        assert f"`{word}`" in TEXT
