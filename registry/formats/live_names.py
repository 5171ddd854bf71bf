"""What a library calls the tensors of a model folder once it has loaded them. transformers 5 renames on load, and
stacks, joins and splits (experts, fused projections); an adapter is trained on the live names, so whoever holds it
against a pushed base needs the map. transformers itself is asked, in a process of its own (`live_names_worker`)."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from registry.core.canonical_json import canonical_json
from registry.core.errors import InvalidInput
from registry.core.layout import TensorSpec
from registry.core.model_form import ModelForm, Module, read_model_form
from registry.core.reference import shown

FORMAT = 1
SECONDS = 120.0
"""For the whole process. Importing torch and transformers takes 3 s to 5 s of it, a model of 60,000 tensors 5 s."""
WORKER = Path(__file__).with_name("live_names_worker.py")
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "USE_HUB_KERNELS": "0",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONIOENCODING": "utf-8",
}

_OLD_ATTENTION = re.compile(r"(.+)\.(query|key|value|proj_attn)\.(weight|bias)")
_NEW_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class Operation:
    """One step of a conversion: the name of one of transformers' `ConversionOps`, and its plain arguments."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Conversion:
    """Saved tensors that become live ones by more than a new name.

    Attributes:
        saved: for each pattern of the library's converter, in its order, the saved tensors in the order in which the
            first operation gets them: the index of an expert is its place here.
        live: name and shape of what comes out.
        operations: applied one after another, as `transformers.core_model_loading` has them.
    """

    saved: tuple[tuple[str, ...], ...]
    live: tuple[tuple[str, tuple[int, ...]], ...]
    operations: tuple[Operation, ...]


@dataclass(frozen=True)
class LiveNames:
    """From the names of a saved state dict to those of the live one; a name that stands nowhere is the same in both.

    Attributes:
        library: `transformers` or `diffusers`.
        version: of the library that was asked; None: it was not, the rule is known.
        model_class: the class whose `from_pretrained` the map is of, such as `MixtralForCausalLM`.
        renamed: saved name -> live name.
        conversions: what is stacked, joined, split, turned or reordered.
        tied: live name -> live name of the tensor that it shares, where only the latter is saved.
        missing: live names that no saved tensor gives.
        unused: saved names for which the live model has no place.
        notes: what the user should know.
        form: of the model as the library builds it, with the dtypes of the saved tensors; None: it was not asked.
        no_form: why the library was asked and there is no form.
    """

    library: str
    version: str | None
    model_class: str
    renamed: Mapping[str, str] = field(default_factory=dict)
    conversions: tuple[Conversion, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    form: ModelForm | None = field(default=None, compare=False, repr=False)
    no_form: str | None = field(default=None, compare=False)

    def tree(self) -> dict[str, Any]:
        """Plain data, as it stands in the document; docs/format.md has its members."""
        return {
            "library": self.library,
            "version": self.version,
            "class": self.model_class,
            "renamed": dict(self.renamed),
            "converted": [
                {
                    "saved": [list(names) for names in conversion.saved],
                    "live": [[name, list(shape)] for name, shape in conversion.live],
                    "operations": [[step.name, dict(step.arguments)] for step in conversion.operations],
                }
                for conversion in self.conversions
            ],
            "tied": dict(self.tied),
            "missing": list(self.missing),
            "unused": list(self.unused),
        }


@dataclass(frozen=True)
class NoLiveNames:
    """There is no map.

    Attributes:
        why: for the user, without a full stop.
    """

    why: str


def live_names_document(components: Mapping[str, LiveNames]) -> bytes:
    """Canonical JSON of the maps of a version, by component."""
    tree = {"format": FORMAT, "components": {role: names.tree() for role, names in components.items()}}
    return canonical_json(tree, "the map of live names")


def live_names(
    config: Mapping[str, Any], tensors: Iterable[TensorSpec], *, seconds: float = SECONDS
) -> LiveNames | NoLiveNames:
    """Asks the installed transformers for the map of one component.

    Never raises for what the configuration says: without a map a push is still a push.

    Args:
        config: `config.json`, parsed.
        tensors: the saved tensors; only names and shapes count.
        seconds: after which the library's answer is no longer waited for.
    """
    if importlib.util.find_spec("transformers") is None:
        return NoLiveNames("transformers is not installed")
    specs = list(tensors)
    request = json.dumps({"config": config, "tensors": [[spec.name, spec.shape] for spec in specs]})
    try:
        # -P and the file's own path: nothing is imported from the current folder, which may be the model's.
        ended = subprocess.run(
            [sys.executable, "-P", str(WORKER)],
            input=request,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, **OFFLINE},
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return NoLiveNames(f"transformers had no answer after {seconds:g} s")
    except OSError as error:
        return NoLiveNames(f"the process that asks transformers could not be started: {error.strerror}")
    try:
        answer = json.loads(ended.stdout)
    except ValueError:
        last = (ended.stderr.strip().splitlines() or [""])[-1]
        return NoLiveNames(f"the process that asks transformers ended with {ended.returncode}: {shown(last, 200)}")
    return NoLiveNames(shown(answer["why"], 300)) if "why" in answer else _read_answer(answer, specs)


def _read_answer(answer: Mapping[str, Any], tensors: Iterable[TensorSpec]) -> LiveNames:
    notes = []
    if other := answer["other_shapes"]:
        name, saved, live = other[0]
        notes.append(
            f"{len(other)} tensors do not have the shapes of config.json's {answer['class']}; "
            f"the first is {shown(name, 120)}: saved {saved}, live {live}"
        )
    form, no_form = None, answer.get("no_form")
    if "form" in answer:
        try:
            form = _with_saved_dtypes(read_model_form(answer["form"].encode("utf-8"), "its answer"), answer, tensors)
        except InvalidInput as error:
            no_form = str(error)
    return LiveNames(
        library=answer["library"],
        version=answer["version"],
        model_class=answer["class"],
        renamed=answer["renamed"],
        conversions=tuple(
            Conversion(
                saved=tuple(map(tuple, found["saved"])),
                live=tuple((name, tuple(shape)) for name, shape in found["live"]),
                operations=tuple(Operation(step["name"], step["arguments"]) for step in found["operations"]),
            )
            for found in answer["converted"]
        ),
        tied=answer["tied"],
        missing=tuple(answer["missing"]),
        unused=tuple(answer["unused"]),
        notes=tuple(notes),
        form=form,
        no_form=None if no_form is None else shown(no_form, 300),
    )


def _with_saved_dtypes(form: ModelForm, answer: Mapping[str, Any], tensors: Iterable[TensorSpec]) -> ModelForm:
    """The form with the dtypes of what is saved: the model was built in float32. What no file has stays so."""
    saved = {spec.name: spec.dtype for spec in tensors}
    dtypes = {answer["renamed"].get(name, name): dtype for name, dtype in saved.items()}
    for step in answer["converted"]:
        first = next(name for names in step["saved"] for name in names)
        dtypes |= {name: saved[first] for name, _ in step["live"]}
    dtypes |= {name: dtypes[other] for name, other in answer["tied"].items() if other in dtypes}

    def typed(module: Module) -> Module:
        path = f"{module.path}." if module.path else ""
        parameters = (replace(one, dtype=dtypes.get(path + one.name, one.dtype)) for one in module.parameters)
        return replace(module, parameters=tuple(parameters))

    return replace(form, modules=tuple(map(typed, form.modules)))


def diffusers_live_names(class_name: str, tensors: Iterable[TensorSpec], *, is_sharded: bool) -> LiveNames:
    """The map of a diffusers model, by the one renaming that diffusers does for all its models.

    Its first releases had attention blocks with `query`, `key`, `value` and `proj_attn`. They are loaded as `to_q`,
    `to_k`, `to_v` and `to_out.0`, but not from shards, which came later (`ModelMixin._fix_state_dict_keys_on_load`).
    """
    found = [match for spec in tensors if (match := _OLD_ATTENTION.fullmatch(spec.name))]
    parts: dict[str, set[str]] = {}
    for match in found:
        parts.setdefault(match[1], set()).add(match[2])
    blocks = {path for path, names in parts.items() if names == _NEW_ATTENTION.keys()}
    renamed = {match[0]: f"{match[1]}.{_NEW_ATTENTION[match[2]]}.{match[3]}" for match in found if match[1] in blocks}
    return LiveNames("diffusers", None, class_name, renamed={} if is_sharded else renamed)
