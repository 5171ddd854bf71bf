"""Fills a catalog with versions that look like a team's, without pushing them: for measuring statements, and for
tests of which indexes they use. The same numbers give the same rows."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import cache
from hashlib import sha256
from typing import Any

from sqlalchemy import Connection, Table, insert

from registry.catalog import tables
from registry.catalog.conditions import version_order
from registry.catalog.forms import module_row
from registry.core.digest import index_prefix, pack_digests
from registry.core.model_form import ModelForm, Module, Parameter
from registry.core.placement import pack_entries

START = datetime(2026, 1, 1, tzinfo=UTC)
VERSIONS_A_NAME = 50
BASES = 20
LAYOUTS = 30
CONFIGS = 40
TENSORS = 16
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "fc1")
TASKS = ("walk", "run", "carry", "push", "lift", "turn", "climb", "balance", "throw", "catch")
PEFT_VERSIONS = ("0.9.0", "0.10.0", "0.17.1", "0.18.0", "0.18.1.dev0", "0.21.2", None)
RARE = 100
"""Every so many versions have the metadata key `rare`."""
WRONG = 50
"""Every so many adapters have a finding of severity error, where the catalog has models."""

Sizes = tuple[tuple[str, int, int], ...]


def _llama(width: int, inner: int, kv: int) -> Sizes:
    attention = (("q_proj", width, width), ("k_proj", width, kv), ("v_proj", width, kv), ("o_proj", width, width))
    return (*attention, ("gate_proj", width, inner), ("up_proj", width, inner), ("down_proj", inner, width))


MODELS: dict[str, tuple[str, int, str, int, Sizes]] = {
    "llama-7b": ("model.layers.{}.{}", 32, "lm_head", 32_000, _llama(4096, 11_008, 4096)),
    "llama-1b": ("model.layers.{}.{}", 16, "lm_head", 128_256, _llama(2048, 8192, 512)),
    "qwen-0.5b": ("model.layers.{}.{}", 24, "lm_head", 151_936, _llama(896, 4864, 128)),
    "minilm": (
        "encoder.layer.{}.{}",
        6,
        "pooler.dense",
        384,
        (*((name, 384, 384) for name in ("query", "key", "value", "output")), ("up", 384, 1536), ("down", 1536, 384)),
    ),
    "gpt2": ("h.{}.{}", 12, "lm_head", 50_257, (("c_attn", 768, 2304), ("c_proj", 768, 768), ("c_fc", 768, 3072))),
}
"""Paths, layers, what is behind them, its width, and the linear modules of a layer with their in and out features."""
SUBSETS = (2, 3, 9)
"""How many modules of a layer a recipe targets: with the rank, of which there are four, twelve layouts a model."""


@cache
def form_of(model: str) -> ModelForm:
    """The linear modules, the embedding and the norms of a model."""
    path, layers, head, wide, sizes = MODELS[model]
    width = sizes[0][1]
    modules = [_module("embed_tokens", "embedding", wide, width), _module(head, "linear", width, wide)]
    for layer in range(layers):
        modules += [_module(path.format(layer, name), "linear", given, gives) for name, given, gives in sizes]
        norm = path.format(layer, "norm")
        modules.append(Module(norm, "other", "RMSNorm", parameters=(Parameter("weight", "BF16", (width,)),)))
    return ModelForm(tuple(sorted(modules, key=lambda one: one.path)), class_name=f"models.{model}")


def _module(path: str, kind: str, given: int, gives: int) -> Module:
    shape = (given, gives) if kind == "embedding" else (gives, given)
    weight = Parameter("weight", "BF16", shape)
    bias = None if kind == "embedding" else False
    return Module(path, kind, kind.capitalize(), given, gives, bias=bias, parameters=(weight,))


def layouts_of(model: str) -> list[int]:
    """Row ids of the layouts of a model's adapters."""
    first = 12 * list(MODELS).index(model)
    return list(range(first + 1, first + 13))


def digest(*parts: object) -> str:
    return sha256(repr(parts).encode()).hexdigest()


def name_of(number: int) -> tuple[str, str]:
    """Namespace and name of the artifact with this number, from 1."""
    return f"team-{number % 20:02}", f"adapter-{number:05}"


def fill(connection: Connection, versions: int, *, seed: int = 0, models: bool = False) -> None:
    """Adds bases and `versions` adapters to an empty catalog.

    Args:
        models: the bases are `MODELS` in turn, and each adapter has one of the 12 layouts of its base's model; else
            there are `LAYOUTS` small ones, which say nothing of what fits.
    """
    for table, rows in _chunks(_rows(versions, random.Random(seed), models)):
        connection.execute(insert(table), rows)


def _chunks(
    rows: Iterator[tuple[Table, dict[str, Any]]], size: int = 5000
) -> Iterator[tuple[Table, list[dict[str, Any]]]]:
    """Rows of one table together; when one is full, all are written in the order of the tables' references."""
    waiting: dict[Table, list[dict[str, Any]]] = defaultdict(list)
    for table, row in rows:
        waiting[table].append(row)
        if len(waiting[table]) == size:
            yield from ((one, waiting.pop(one)) for one in tables.metadata.sorted_tables if one in waiting)
    yield from ((one, waiting.pop(one)) for one in tables.metadata.sorted_tables if one in waiting)


def _rows(versions: int, rng: random.Random, models: bool) -> Iterator[tuple[Table, dict[str, Any]]]:
    yield from _shared(models)
    names = -(-versions // VERSIONS_A_NAME)
    for number in range(1, names + 6):
        namespace, name = name_of(number) if number <= names else ("bases", f"base-{number - names}")
        count = min(VERSIONS_A_NAME, versions - (number - 1) * VERSIONS_A_NAME) if number <= names else BASES // 5
        at = START + timedelta(seconds=versions + BASES)
        yield (
            tables.artifact,
            {
                "id": number,
                "namespace": namespace,
                "name": name,
                "last_number": count,
                "last_seq": 4 * count + 2,
                "last_event_at": at,
                "created_at": START,
            },
        )
    for base in range(1, BASES + 1):
        artifact = names + 1 + (base - 1) % 5
        yield from _version(base, artifact, 1 + (base - 1) // 5, rng, base=None, models=models)
    order = [(number, place) for number in range(1, names + 1) for place in range(VERSIONS_A_NAME)][:versions]
    order.sort(key=lambda pair: (pair[1], rng.random()))  # pushed by turns, not name by name
    newest: dict[int, int] = {}
    seqs: dict[int, int] = defaultdict(int)
    for version, (artifact, place) in enumerate(order, BASES + 1):
        yield from _version(version, artifact, place + 1, rng, base=rng.randint(1, BASES), models=models)
        yield from _said(version, artifact, seqs, rng)
        if artifact in newest and rng.random() < 0.5:
            yield (
                tables.lineage,
                {"child_id": version, "parent_id": newest[artifact], "relation": "continued_from", "weight": None},
            )
        newest[artifact] = version
    for artifact, version in newest.items():
        for tag in ("prod", "best"):
            seqs[artifact] += 1
            yield tables.tag, {"artifact_id": artifact, "name": tag, "version_id": version, "moved_at": START}
            yield tables.event, _event(artifact, seqs[artifact], "tag_moved", version, tag)


def _shared(models: bool) -> Iterator[tuple[Table, dict[str, Any]]]:
    if models:
        yield from _models()
    for layout in range(1, LAYOUTS + 1) if not models else ():
        yield (
            tables.layout,
            {
                "id": layout,
                "digest": digest("layout", layout),
                "tensors": TENSORS,
                "parameters": 1000 * layout,
                "nbytes": 4000 * layout,
            },
        )
        for position in range(TENSORS):
            yield (
                tables.layout_tensor,
                {"layout_id": layout, "position": position, "name": f"t{position}", "dtype": "F32", "shape": "8,64"},
            )
        for module in MODULES[: 2 + layout % 7]:
            row = {"module": f"layers.0.{module}", "kind": "linear", "rank": 4 << layout % 5}
            yield tables.target, {"layout_id": layout, **row, "in_features": 64, "out_features": 64}
    for config in range(1, CONFIGS + 1):
        row = {"peft_type": "LORA", "r": 4 << config % 5, "lora_alpha": 16.0, "use_dora": config % 8 == 0}
        yield tables.lora_config, {"id": config, "digest": digest("config", config), "document": "{}", **row}
        for module in MODULES[: 1 + config % 8]:
            yield tables.lora_target, {"lora_config_id": config, "target": module}


def _models() -> Iterator[tuple[Table, dict[str, Any]]]:
    """The forms of the models, and the layouts of their adapters with targets of their sizes."""
    for architecture, model in enumerate(MODELS, 1):
        form = form_of(model)
        row = {"class_name": form.class_name, "exact": True, "document": form.document.decode()}
        yield tables.architecture, {"id": architecture, "digest": form.digest, **row}
        for one in form.modules:
            yield tables.module, {"architecture_id": architecture, **module_row(one)}
        path, layers, head, wide, sizes = MODELS[model]
        for place, layout in enumerate(layouts_of(model)):
            rank, subset = 4 << place % 4, SUBSETS[place // 4]
            targets = [
                (path.format(layer, name), given, gives)
                for layer in range(layers)
                for name, given, gives in sizes[:subset]
            ]
            if subset == max(SUBSETS):  # everything that is linear
                targets.append((head, sizes[0][1], wide))
            row = {"tensors": 2 * len(targets), "parameters": 1000 * layout, "nbytes": 4000 * layout}
            yield tables.layout, {"id": layout, "digest": digest("layout", layout), **row}
            for module, given, gives in targets:
                row = {"module": module, "kind": "linear", "rank": rank, "in_features": given, "out_features": gives}
                yield tables.target, {"layout_id": layout, **row}


def _version(
    version: int, artifact: int, number: int, rng: random.Random, *, base: int | None, models: bool
) -> Iterator[tuple[Table, dict[str, Any]]]:
    names = list(MODELS)
    layout = rng.choice(layouts_of(names[(base or 1) % len(names)])) if models else rng.randint(1, LAYOUTS)
    architecture = 1 + version % len(names) if models and base is None else None
    if models and base is not None and version % WRONG == 0:
        said = {"code": "C17", "subject": "t0", "message": "NaN", "expected": "", "found": "", "mend": ""}
        yield tables.finding, {"version_id": version, "position": 0, "severity": "error", **said}
    peft = rng.choice(PEFT_VERSIONS)
    at = START + timedelta(seconds=version)
    yield (
        tables.version,
        {
            "id": version,
            "artifact_id": artifact,
            "number": number,
            "manifest_digest": digest("manifest", version),
            "content_digest": digest("content", version),
            "kind": "base" if base is None else "adapter",
            "state": "removed" if base and rng.random() < 0.01 else "present",
            "layout_id": None if models and base is None else layout,
            "architecture_id": architecture,
            "lora_config_id": None if base is None else rng.randint(1, CONFIGS),
            "base_id": base,
            "size": 1000 * rng.randint(1, 1000),
            "bytes_new": 1000,
            "peft_version": peft,
            "peft_order": None if peft is None else version_order(peft),
            "torch_version": "2.13.0",
            "python_version": "3.11.2",
            "git_commit": digest("commit", version // 10)[:40],
            "git_dirty": version % 3 == 0,
            "created_by": f"user-{version % 7}",
            "created_at": at,
        },
    )
    tensors = [digest("tensor", version, ordinal) for ordinal in range(TENSORS)]
    blobs = {f"{role}-{version}": role for role in ("tensors", "manifest")}
    for position, (blob, role) in enumerate(blobs.items()):
        identifier = 2 * version + position
        row = {"id": identifier, "digest": digest(blob), "size": 1000, "state": "present", "created_at": at}
        yield tables.blob, {**row, "layout_id": layout if role == "tensors" else None}
        yield tables.version_blob, {"version_id": version, "position": position, "blob_id": identifier, "role": role}
    yield tables.blob_tensors, {"blob_id": 2 * version, "digests": pack_digests(tensors)}
    for ordinal in range(0, TENSORS, 4):
        prefix = index_prefix(tensors[ordinal])
        yield tables.tensor_index, {"prefix": prefix, "blob_id": 2 * version, "ordinal": ordinal}
    yield (
        tables.component,
        {
            "version_id": version,
            "role": "model" if base is None else "adapter",
            "layout_id": layout,
            "digests": pack_digests(tensors),
            "placement": pack_entries([(0, ordinal) for ordinal in range(TENSORS)]),
        },
    )
    file = {"path": "adapter_model.safetensors", "sha256": digest(f"tensors-{version}"), "size": 1000}
    yield tables.version_file, {"version_id": version, **file, "role": "adapter", "blob_position": 0, "whole": True}
    if base is not None:
        yield (
            tables.lineage,
            {"child_id": version, "parent_id": base, "relation": "trained_on", "weight": None},
        )


def _said(
    version: int, artifact: int, seqs: dict[int, int], rng: random.Random
) -> Iterator[tuple[Table, dict[str, Any]]]:
    said: dict[str, tuple[str, float | None]] = {
        "task": (rng.choice(TASKS), None),
        "seed": (str(version % 1000), float(version % 1000)),
        "run": (digest("run", version)[:12], None),
    }
    if version % RARE == 0:
        said["rare"] = ("yes", None)
    for key, (words, number) in said.items():
        yield tables.version_metadata, {"version_id": version, "key": key, "text_value": words, "number_value": number}
    for key in ("reward", "loss"):
        value = None if rng.random() < 0.01 else rng.uniform(0, 1000)
        row = {"value": value, "kind": "nan" if value is None else "finite", "step": 100, "at": START}
        yield tables.metric, {"version_id": version, "key": key, **row}
    for kind in ("pushed", "metadata", "metrics"):
        seqs[artifact] += 1
        yield tables.event, _event(artifact, seqs[artifact], kind, version, None)


def _event(artifact: int, seq: int, kind: str, version: int, tag: str | None) -> dict[str, Any]:
    return {
        "artifact_id": artifact,
        "seq": seq,
        "kind": kind,
        "version_id": version,
        "tag": tag,
        "at": START + timedelta(seconds=version),
        "actor": "somebody",
        "payload": "{}",
    }
