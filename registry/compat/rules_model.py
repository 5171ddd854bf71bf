"""Rules about the model behind an adapter: its weights, its tokenizer, ties, biases, task, quantisation, and the code
and arguments that it was built with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from registry.compat.case import Case, Weights
from registry.compat.hotswap import swap_findings
from registry.compat.rule import rule
from registry.core.findings import Finding, Severity
from registry.core.model_form import ModelForm
from registry.core.reference import shown

MOST_NAMED = 3
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt"),
    *("chat_template.jinja", "chat_template.json"),
)
_GENERATING = {"CAUSAL_LM", "SEQ_2_SEQ_LM"}
_TASKS = _GENERATING | {"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"}
_IGNORED_ARGUMENTS = frozenset(
    {
        *("_name_or_path", "name_or_path", "transformers_version", "_diffusers_version", "architectures", "dtype"),
        *("torch_dtype", "use_cache", "id2label", "label2id", "num_labels", "problem_type", "output_attentions"),
        *("output_hidden_states", "return_dict", "torchscript", "gradient_checkpointing", "auto_map", "_commit_hash"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "initializer_factor", "device"),
        *("_attn_implementation_autoset", "_attn_implementation", "attn_implementation", "chunk_size_feed_forward"),
        *("_experts_implementation", "router_aux_loss_coef", "output_router_logits", "quantization_config"),
    }
)
"""Arguments that change no output of a model that is not being trained, or that other rules are about."""


def changed_modules(trained: Weights, asked: Weights) -> dict[str, str]:
    """Tensors of two models by live name: `same`, `cast` (equal after rounding to bfloat16), `unknown` (of different
    dtypes, and no rounded digest says more; or saved in parts), `different`; those that one of the two lacks are left
    out."""
    found = {}
    for name, digest in trained.digests.items():
        other = asked.digests.get(name)
        if other is None:
            continue
        if other == digest:
            found[name] = "same"
        elif digest.count("+") != other.count("+"):
            found[name] = "unknown"  # one is saved in parts that a library puts together, the other whole
        elif trained.dtypes.get(name) == asked.dtypes.get(name):
            found[name] = "different"
        else:
            rounded = trained.rounded.get(name), asked.rounded.get(name)
            if None in rounded:
                found[name] = "cast" if trained.reference in asked.cast_of else "unknown"
            else:
                found[name] = "cast" if rounded[0] == rounded[1] else "different"
    return found


@rule("C04", "The base has the weights that the adapter was trained on", "error, warning or info by grade")
def same_base(case: Case) -> Iterator[Finding]:
    """An adapter is a change to certain weights, and PEFT compares nothing of them, not even the name. Here tensors are
    compared by digest. *Same*: all are. *Same at the targets*: those that the adapter changes are, others differ, so
    outputs will (a warning). *Different in n of m targeted modules*: an error that names them. A cast to bfloat16
    counts as the same, and is said. Another name or path is no difference: "same weights under another name or path".

    Reproduce: load an adapter into a model of the same class with fresh weights.
    """
    model, trained = case.model, case.adapter.weights
    if model is None:
        return
    recorded = None if case.adapter.config is None else case.adapter.config.base_model
    if trained is None:
        if model.weights is not None:
            mend = "push the adapter with base=, the version that it was trained on"
            message = "with which weights it was trained is not recorded"
            yield Finding("C04", "undecided", "base", message, model.reference, shown(recorded or "nothing", 200), mend)
        return
    if model.weights is None:
        message = "the model has no weights to compare"
        yield Finding("C04", "info", "base", message, trained.reference, model.reference)
        return
    if model.weights.reference == trained.reference:
        return
    config = case.adapter.config
    trains_biases = config is not None and config.bias not in (None, "none")
    grades = {
        name: grade
        for name, grade in changed_modules(trained, model.weights).items()
        if not (trains_biases and name.endswith(".bias"))  # the adapter brings its own
    }
    if not grades:
        message = "no tensor of the two models has the same name, so their weights were not compared"
        yield Finding("C04", "undecided", "base", message, trained.reference, model.weights.reference)
        return
    yield from _graded(case, grades, trained, model.weights)


def _graded(case: Case, grades: Mapping[str, str], trained: Weights, asked: Weights) -> Iterator[Finding]:
    paths = {one.module.path for one in case.placing.placed if one.module is not None}
    by_module: dict[str, set[str]] = {}
    for name, grade in grades.items():
        by_module.setdefault(name.rpartition(".")[0], set()).add(grade)
    at_targets = {path: by_module[path] for path in sorted(paths) if path in by_module}
    different = [path for path, found in at_targets.items() if "different" in found]
    # A weight that one side has alone, under this name, was not compared: pruned, quantised, or parametrised.
    alone = {
        name.rpartition(".")[0] for name in trained.digests.keys() ^ asked.digests.keys() if name.endswith(".weight")
    }
    unknown = sorted({path for path, found in at_targets.items() if "unknown" in found} | (paths & alone))
    both = trained.reference, asked.reference
    if different:
        message = f"{len(different)} of {len(at_targets)} targeted modules have other weights: {_named(different)}"
        mend = "name the base that it was trained on; if you mean these weights: strict=False, or --force"
        yield Finding("C04", "error", "base", message, *both, mend)
    elif unknown or not at_targets:
        what = f"{len(unknown)} of {len(at_targets)} targeted modules" if unknown else "the targeted modules"
        dtypes = " and ".join(sorted({*trained.dtypes.values(), *asked.dtypes.values()}))
        message = f"the weights of {what} cannot be compared ({shown(dtypes, 80)})"
        mend = "push the base that the other one was cast from"
        yield Finding("C04", "undecided", "base", message, *both, mend)
    elif others := [name for name, grade in grades.items() if grade == "different"]:
        message = f"same weights at the targets; {len(others)} other tensors differ, so outputs will: {_named(others)}"
        yield Finding("C04", "warning", "base", message, *both)
    elif lacking := _lacking(case, trained, asked):
        message = f"same weights at the targets; one of the two lacks {len(lacking)} tensors: {_named(lacking)}"
        yield Finding("C04", "warning", "base", message, *both)
    elif "unknown" in grades.values():
        others = [name for name, grade in grades.items() if grade == "unknown"]
        message = f"same weights at the targets; {len(others)} others are saved in another form: {_named(others)}"
        yield Finding("C04", "info", "base", message, *both)
    elif "cast" in grades.values():
        yield Finding("C04", "info", "base", "same weights, cast to another dtype", *both)
    else:
        yield Finding("C04", "info", "base", "same weights under another name or path", *both)


def _lacking(case: Case, trained: Weights, asked: Weights) -> list[str]:
    """Tensors beside the targets that one of the two models has alone; of tied weights a file may have but one."""
    known = set() if case.model is None else set(case.model.form.ties)
    known |= {one.module.path for one in case.placing.placed if one.module is not None}
    return [name for name in trained.digests.keys() ^ asked.digests.keys() if name.rpartition(".")[0] not in known]


def _named(names: Iterable[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - MOST_NAMED} more" if len(listed) > MOST_NAMED else ""
    return ", ".join(shown(one, 120) for one in listed[:MOST_NAMED]) + more


@rule("C15", "Tokenizer and chat template are the same", "warning")
def same_tokenizer(case: Case) -> Iterator[Finding]:
    """An adapter that was trained with another tokenizer or chat template loads, and answers nonsense. The files that
    were pushed with both are compared; where one side has none, nothing is said.

    Reproduce: train with added special tokens, save the tokenizer beside the adapter, load with the base's own.
    """
    if case.model is None:
        return
    for name in TOKENIZER_FILES:
        own, other = case.adapter.files.get(name), case.model.files.get(name)
        if own is not None and other is not None and own != other:
            message = "the adapter came with another one than the base"
            mend = "use the adapter's"
            yield Finding("C15", "warning", name, message, f"sha256 {other[:12]}", f"sha256 {own[:12]}", mend)


@rule("C16", "No tied weight is changed on one side alone", "warning; error for merge")
def untied(case: Case) -> Iterator[Finding]:
    """Where the head shares its weight with the embedding, a LoRA on one of the two is a change to both once it is
    merged, and to one while it is not. PEFT warns, and merging silently changes the other module as well.

    Reproduce: `target_modules=["lm_head"]` on GPT-2, `merge_and_unload`.
    """
    if case.model is None:
        return
    severity: Severity = "error" if case.purpose == "merge" else "warning"
    for one in case.placing.placed:
        group = () if one.module is None else case.model.form.ties.get(one.module.path, ())
        others = [path for path in group if one.module is not None and path != one.module.path]
        changes = one.target.rank or "full" in one.target.kind.split("+")
        if others and changes:
            message = "it shares its weight with another module, which a merge would change as well"
            yield Finding(
                "C16", severity, one.target.module, message, "a weight of its own", f"tied to {_named(others)}",
                "untie them first, or leave it unmerged",
            )  # fmt: skip


@rule("C19", "A lora_bias has a bias to go into", "error for merge; else info")
def bias_to_merge(case: Case) -> Iterator[Finding]:
    """`lora_bias=True` adds a bias to B. It works beside a layer without a bias, and cannot be merged into it: PEFT
    raises a RuntimeError.

    Reproduce: `lora_bias=True` on Llama's projections, `merge_and_unload`.
    """
    severity: Severity = "error" if case.purpose == "merge" else "info"
    for one in case.placing.placed:
        if "lora_bias" in one.target.kind.split("+") and one.module is not None and one.module.bias is False:
            message = "the layer has no bias into which the adapter's could be merged"
            yield Finding("C19", severity, one.target.module, message, "a bias", "none", "keep the adapter unmerged")


@rule("C20", "The task type suits the model's class", "error; warning for a version")
def suits_task(case: Case) -> Iterator[Finding]:
    """PEFT picks the class of its wrapper by `task_type`, and that class asks the model for methods: for CAUSAL_LM and
    SEQ_2_SEQ_LM `prepare_inputs_for_generation`. A body without a head ends with an AttributeError.

    Reproduce: `task_type="CAUSAL_LM"` with AutoModel in place of AutoModelForCausalLM.
    """
    config, model = case.adapter.config, case.model
    if config is None or model is None or not model.form.exact or config.task_type not in _TASKS:
        return
    if "config" not in model.form.has:
        message = f"PEFT asks a model for {config.task_type} for its config, and this class has none"
        found = shown(model.form.class_name or "a class without it", 120)
        yield Finding("C20", "error", "task_type", message, "a class with a config", found, "set task_type to null")
    if config.task_type not in _GENERATING or "prepare_inputs_for_generation" in model.form.has:
        return
    # A body may be loaded with the head that generates; a class with another head is that class.
    is_body = model.is_version and bool(model.form.prefix) and (model.form.class_name or "").endswith("Model")
    severity: Severity = "warning" if is_body else "error"
    message = f"PEFT asks a model for {config.task_type} for prepare_inputs_for_generation, which this class has not"
    mend = "load the class with the head, or set task_type to null"
    found = shown(model.form.class_name or "a class without it", 120)
    yield Finding("C20", severity, "task_type", message, "a class that generates", found, mend)


@rule("C21", "Quantised weights allow what is asked", "info; error for merge")
def quantised(case: Case) -> Iterator[Finding]:
    """Beside quantised weights an adapter works, and its outputs differ from those on the weights that it was trained
    on. Merged into them it is rounded away (bitsandbytes warns) or refused (GPTQ raises a ValueError).

    Reproduce: load the base with `load_in_4bit`, `merge_and_unload`.
    """
    paths = [one.target.module for one in case.placing.placed if one.module and one.module.kind == "quantised"]
    if paths:
        severity: Severity = "error" if case.purpose == "merge" else "info"
        message = f"{len(paths)} targeted modules are quantised: {_named(paths)}"
        mend = "merge into the base in full precision" if severity == "error" else ""
        yield Finding("C21", severity, paths[0], message, "plain weights", "quantised", mend)


@rule("C28", "A compiled slot can take it", "error for hotswap")
def hotswaps(case: Case) -> Iterable[Finding]:
    """Hot-swapping copies new factors into the layers of an adapter that is loaded already, so that a compiled model
    need not be compiled again. It takes plain LoRA factors and their scaling, and nothing else: no DoRA, no copies of
    modules, no trained biases. Which adapters can follow each other is `Registry.swap_groups`.

    Reproduce: `hotswap_adapter` with an adapter that has `use_dora=True`.
    """
    return swap_findings(case.adapter, case.adapter) if case.purpose == "hotswap" else ()


@rule("C29", "The model was built with the same arguments", "error")
def same_arguments(case: Case) -> Iterator[Finding]:
    """Number of heads, causality, activation, epsilon, rotary base: arguments that change what a model computes and
    that no shape shows. Where both models say what they were built with, what differs is named. Dropout and the like,
    which matter for training alone, are left out.

    Reproduce: train on a transformer with 4 heads, load into the same with 8.
    """
    trained, asked = _forms(case)
    config = case.adapter.config
    if trained is None or asked is None or (config is not None and config.layer_replication):
        return  # with replicated layers the number of layers is not the base's own
    for key, (own, other) in sorted(differing_arguments(trained, asked).items()):
        message = "the model that it was trained on was built with another value"
        mend = "build the model with the same value"
        yield Finding("C29", "error", key, message, shown(repr(own), 80), shown(repr(other), 80), mend)


def differing_arguments(trained: ModelForm, asked: ModelForm) -> dict[str, tuple[Any, Any]]:
    """Arguments by which two models compute differently, with both values; none where they are not known, or are of
    classes that have nothing in common."""
    if trained.arguments is None or asked.arguments is None:
        return {}
    if trained.class_name != asked.class_name and not _same_names(trained, asked):
        return {}
    return _differences(trained.arguments, asked.arguments)


def _same_names(a: ModelForm, b: ModelForm) -> bool:
    return a.arguments is not None and b.arguments is not None and a.arguments.keys() == b.arguments.keys()


def _differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Values that both have, and that differ; what only one has is a default of another release."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in a.keys() & b.keys():
        own, other = a[key], b[key]
        if key in _IGNORED_ARGUMENTS or "drop" in key or key.startswith("_") or key.endswith("_token_id"):
            continue
        if isinstance(own, Mapping) and isinstance(other, Mapping):
            found |= _differences(own, other, f"{prefix}{key}.")
        elif own != other:
            found[f"{prefix}{key}"] = (own, other)
    return found


@rule("C30", "The model's code is the same", "info")
def same_source(case: Case) -> Iterator[Finding]:
    """The source of every class of the model that is not torch's is compared without layout and comments. Another
    release of a library, or an edited class, is said and is no error: most edits do not change what a model computes.

    Reproduce: edit the forward method of a model's class between training and loading.
    """
    trained, asked = _forms(case)
    if trained is None or asked is None or not trained.source or not asked.source:
        return
    common = trained.source.keys() & asked.source.keys()
    changed = [name for name in common if trained.source[name] != asked.source[name]]
    if changed:
        versions = [_packages(form, changed) for form in (trained, asked)]
        message = f"the source of {len(changed)} of its {len(common)} classes has changed: {_named(changed)}"
        yield Finding("C30", "info", "source", message, *versions)


def _packages(form: ModelForm, classes: Iterable[str]) -> str:
    tops = sorted({name.partition(".")[0] for name in classes})
    return ", ".join(f"{top} {form.packages.get(top, 'unknown')}" for top in tops)[:200]


def _forms(case: Case) -> tuple[ModelForm | None, ModelForm | None]:
    trained, asked = case.adapter.form, None if case.model is None else case.model.form
    same = trained is not None and asked is not None and trained.digest == asked.digest
    return (None, None) if same else (trained, asked)
