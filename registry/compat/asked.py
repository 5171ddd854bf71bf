"""What several rules ask of a case before they say anything."""

from __future__ import annotations

from difflib import get_close_matches

from registry.compat.case import Case
from registry.compat.target_modules import ALL_LINEAR
from registry.core.model_form import ModelForm
from registry.core.reference import shown
from registry.core.tensor_names import without_layers

TASK_HEADS = frozenset({"classifier", "score", "qa_outputs", "summary", "pooler"})
"""Modules that come with a task type."""
TOKENS = ("embed_tokens", "lm_head", "wte", "word_embeddings", "shared")
"""Last names of modules that have a row for each token."""


def is_peft_folder(case: Case) -> bool:
    return {"adapter_config.json", "adapter_model.safetensors"} <= case.adapter.files.keys()


def is_explained(case: Case) -> bool:
    """Whether C26 says already why targets are not found; their names and sizes then say nothing."""
    return case.placing.shift is not None and not case.placing.by_family


def is_all_linear(case: Case) -> bool:
    names = None if case.adapter.config is None else case.adapter.config.target_modules
    return isinstance(names, str) and names.lower() == ALL_LINEAR


def is_within(path: str, name: str) -> bool:
    """Whether a path is the named module, or in it; PEFT compares the ends of names."""
    return f".{name}." in f".{path}."


def nearest_path(path: str, form: ModelForm) -> str:
    end = path.rpartition(".")[2]
    near = get_close_matches(path, [one for one in form.by_path if one.endswith(end)][:2000], 1, 0.8)
    return f"the nearest is {shown(near[0], 120)}" if near else ""


def bare_path(path: str) -> str:
    return ".".join(without_layers(path.split(".")))
