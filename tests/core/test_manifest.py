from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from registry.core.digest import sha256_hex
from registry.core.errors import InvalidInput, InvalidManifest
from registry.core.manifest import KINDS, RELATIONS, Component, File, Manifest, Parent, check_file_path

D = [f"{n:064x}" for n in range(10)]
ADAPTER = Manifest(
    "adapter",
    (Component("adapter", D[0], (D[1], D[2])),),
    (File("adapter_config.json", D[3], 10), File("adapter_model.safetensors", D[4], 20, "adapter")),
    {"r": 8, "lora_alpha": 16.0},
    D[5],
    (Parent("continued_from", D[6]), Parent("merged_from", D[6], 0.5)),
    {"method": "ties"},
)


def changed(**fields: Any) -> Manifest:
    return dataclasses.replace(ADAPTER, **fields)


def test_the_document_is_canonical_and_its_sha256_is_the_digest() -> None:
    tree = json.loads(ADAPTER.document)
    assert list(tree) == sorted(tree)
    assert b" " not in ADAPTER.document
    assert sha256_hex(ADAPTER.document) == ADAPTER.digest
    assert set(tree) == {"format", "kind", "components", "files", "config", "base", "parents", "recipe"}


def test_a_document_is_read_back() -> None:
    assert Manifest.from_document(ADAPTER.document) == ADAPTER
    for kind in KINDS:
        empty = Manifest(kind, ())
        assert Manifest.from_document(empty.document) == empty


def test_the_order_of_components_and_of_config_keys_does_not_matter() -> None:
    parts = (Component("ema", D[1], ()), Component("model", D[2], (D[3],)))
    one = Manifest("base", parts, config={"a": 1, "b": [2]})
    other = Manifest("base", parts[::-1], config={"b": [2.0], "a": 1.0})
    assert one.digest == other.digest


def test_all_that_a_version_is_changes_the_digest() -> None:
    others = [
        changed(kind="checkpoint"),
        changed(components=(Component("adapter", D[9], (D[1], D[2])),)),
        changed(components=(Component("adapter", D[0], (D[2], D[1])),)),
        changed(files=ADAPTER.files[:1]),
        changed(files=(dataclasses.replace(ADAPTER.files[0], size=11), ADAPTER.files[1])),
        changed(config={"r": 8, "lora_alpha": 17}),
        changed(config=None),
        changed(base=None),
        changed(parents=ADAPTER.parents[::-1]),
        changed(parents=()),
        changed(recipe=None),
    ]
    assert len({ADAPTER.digest, *(other.digest for other in others)}) == len(others) + 1


@pytest.mark.parametrize("number", [1e16, 1e20, -1e20, 1e21, 5e-324, 0.1, 2**53 - 1, -(2**53 - 1)])
def test_a_config_with_any_finite_number_can_be_read_again(number: float) -> None:
    manifest = changed(config={"x": number})
    found = Manifest.from_document(manifest.document)
    assert (found.config, found.digest) == ({"x": number}, manifest.digest)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2**53, "\ud800", {1, 2}, object()])
def test_a_config_that_json_cannot_hold_is_refused(value: object) -> None:
    with pytest.raises(InvalidInput, match="manifest"):
        _ = changed(config={"x": value}).document


@pytest.mark.parametrize(
    ("manifest", "reason"),
    [
        (changed(kind="lora"), "kind 'lora'"),
        (changed(kind=["adapter"]), "kind"),
        (changed(base="sha256:" + D[0]), "not a digest"),
        (changed(base=D[0][:12]), "not a digest"),
        (changed(components=(Component("adapter", "x", ()),)), "not a digest"),
        (changed(components=(Component("adapter", D[0], (D[1], D[2].upper().replace("0", "A"))),)), "not a digest"),
        (changed(components=(Component("", D[0], ()),), files=()), "roles"),
        (changed(components=(Component("../x", D[0], ()),), files=()), "roles"),
        (changed(components=(Component("a" * 65, D[0], ()),), files=()), "roles"),
        (changed(components=(Component("model", D[0], ()),) * 2, files=()), "roles"),
        (changed(files=ADAPTER.files[::-1]), "not ordered"),
        (changed(files=ADAPTER.files[:1] * 2), "not ordered"),
        (changed(files=(File("a", D[0], 1), File("a/b", D[0], 1))), "both a file and a folder"),
        (changed(files=(File("a/b", D[0], 1), File("a/b/c", D[0], 1))), "both a file and a folder"),
        (changed(files=(File("a", D[0], 1, "model"),)), "component 'model'"),
        (changed(files=(File("a", D[0], 1, "adapter"), File("b", D[0], 1, "adapter"))), "carried"),
        (changed(files=(File("a", D[0], -1),)), "size of 'a'"),
        (changed(files=(File("a", D[0], 2**53),)), "size of 'a'"),
        (changed(files=(File("a", D[0], True),)), "size of 'a'"),
        (changed(files=(File("a", D[0], 1.0),)), "size of 'a'"),
        (changed(files=(File("a", "", 1),)), "not a digest"),
        (changed(config=["r"]), "config: expected an object"),
        (changed(recipe="ties"), "recipe: expected an object"),
        (changed(parents=(Parent("copied_from", D[0]),)), "relation 'copied_from'"),
        (changed(parents=(Parent("continued_from", D[0], 0.5),)), "weight 0.5"),
        (changed(parents=(Parent("merged_from", D[0], float("nan")),)), "weight nan"),
        (changed(parents=(Parent("merged_from", D[0], "1"),)), "weight '1'"),
        (changed(parents=(Parent("merged_from", D[0], 0.5), Parent("merged_from", D[0], 0.6))), "twice"),
        (changed(parents=(Parent("trained_on", D[5]),)), "or is the base"),
        (changed(parents=(Parent("merged_from", "x"),)), "not a digest"),
    ],
)
def test_a_manifest_that_cannot_be_is_refused(manifest: Manifest, reason: str) -> None:
    with pytest.raises(InvalidManifest, match=reason) as caught:
        manifest.check()
    assert len(str(caught.value)) < 400


def test_every_relation_may_stand_beside_another_to_the_same_parent() -> None:
    changed(base=None, parents=tuple(Parent(relation, D[0]) for relation in RELATIONS)).check()


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b'"text"',
        b"\xff",
        b"{" * 100_000,
        ADAPTER.document + b" ",
        ADAPTER.document.replace(b'"format":1', b'"format":2'),
        ADAPTER.document.replace(b'"format":1', b'"format":1.0'),
        ADAPTER.document.replace(b'"format":1', b'"format":true'),
        ADAPTER.document.replace(b'"format":1', b'"format":1,"format":1'),
        ADAPTER.document.replace(b'"format":1', b'"extra":0,"format":1'),
        ADAPTER.document.replace(b'"r":8', b'"r":8.0'),
        ADAPTER.document.replace(b'"r":8', b'"r":NaN'),
        ADAPTER.document.replace(b'"r":8', b'"r":9007199254740993'),
        ADAPTER.document.replace(b'"size":10', b'"size":9007199254740993'),
        ADAPTER.document.replace(b'"components":{"adapter":{', b'"components":{"adapter":null,"b":{'),
        ADAPTER.document.replace(b'"component":"adapter"', b'"component":["adapter"]'),
        ADAPTER.document.replace(b'"recipe":{"method":"ties"}', b'"recipe":[]'),
        ADAPTER.document.replace(b'"parents":[', b'"parents":[{},'),
        ADAPTER.document.replace(b'"path":"adapter_config.json"', b'"path":7'),
    ],
)
def test_a_document_that_is_no_manifest_is_refused(document: bytes) -> None:
    assert document != ADAPTER.document
    with pytest.raises(InvalidManifest) as caught:
        Manifest.from_document(document)
    assert len(str(caught.value)) < 400


def test_a_newer_format_is_named() -> None:
    with pytest.raises(InvalidManifest, match="manifest format 2; this program reads format 1"):
        Manifest.from_document(ADAPTER.document.replace(b'"format":1', b'"format":2'))


@pytest.mark.parametrize(
    "path",
    [
        "a",
        "a/b/c.json",
        "...",
        "a..b",
        ".hidden",
        "with space",
        "ü/😀",
        "C:x",
        "ab:",
        "x" * 512,
        "~",
        "-rf",
        "a\u00a0b",
    ],
)
def test_a_plain_relative_path_is_taken(path: str) -> None:
    assert check_file_path(path) == path


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "/a",
        "a/",
        "a//b",
        ".",
        "..",
        "a/..",
        "../a",
        "a/./b",
        "a\\b",
        "C:",
        "C:/a",
        "a\0",
        "a\n",
        "a\x1b[2J",
        "a\x7f",
        "a\x85",
        "a\u202eb",
        "a\u2028b",
        "a\u2066b",
        "a\u200fb",
        "\ud800",
        "x" * 513,
        None,
        7,
        b"a",
        ["a"],
    ],
)
def test_any_other_path_is_refused_in_one_line(path: Any) -> None:
    with pytest.raises(InvalidManifest) as caught:
        check_file_path(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300
