"""Rules about the place of an adapter's tensors in a model: that each has one, that its sizes are those of the module,
and that the module is one that a LoRA works on."""

from __future__ import annotations

import re
from collections.abc import Iterator

from registry.compat.asked import (
    TASK_HEADS,
    TOKENS,
    is_all_linear,
    is_explained,
    is_peft_folder,
    is_within,
    nearest_path,
)
from registry.compat.case import Case
from registry.compat.placing import Placed
from registry.compat.rule import rule
from registry.core.adapter_config import rank_of
from registry.core.findings import Finding, Severity
from registry.core.model_form import Module
from registry.core.reference import shown

PEFT_PREFIX = "base_model.model."
PEFT_DEFAULT_R = 8
FOREIGN_PREFIXES = (
    *("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_transformer_", "lycoris_"),
    *("diffusion_model.", "transformer.", "unet.", "text_encoder.", "model.language_model."),
)
"""What files of other programs begin with; those that end in `_` are kohya's, whose names have no dots."""
_PART = re.compile(r"\.lora_[AB]\.(?!(?:weight|bias)$)(.*)$")


@rule("C05", "Every tensor lands on a module of the model", "error")
def lands(case: Case) -> Iterator[Finding]:
    """A tensor of the adapter is for a module that the model does not have, or for a module of another kind. PEFT drops
    such tensors, and says so at most in the result of `load_state_dict`, which nobody reads: the layer serves the base.

    Reproduce: load an adapter of a model with 12 layers into one with 6.
    """
    yield from (one for one in case.adapter.read if one.code == "C05")
    yield from _not_targeted(case)
    yield from _of_no_part(case)
    if case.model is None or is_explained(case):
        return
    form = case.model.form
    for one in case.placing.placed:
        if one.target.kind.partition("+")[0] == "full":
            continue  # C13
        if one.fault == "module":
            mend = nearest_path(one.target.module, form) or "is this the base that the adapter was trained on?"
            message = "the model has no such module"
            yield Finding("C05", "error", one.target.module, message, "a module", "none", mend)
        elif one.fault == "kind" and one.module is not None and one.module.kind not in ("other", "experts"):
            message = "the module is of another kind than the adapter's factors"
            mend = "is this the base that the adapter was trained on?"
            yield Finding(
                "C05", "error", one.target.module, message, one.target.kind.partition("+")[0], _kind(one.module), mend
            )


def _of_no_part(case: Case) -> Iterator[Finding]:
    """Names in a folder of PEFT's whose last part PEFT does not know: elsewhere it would be an adapter's name."""
    if case.adapter.config is None or case.adapter.config.peft_type != "LORA" or not is_peft_folder(case):
        return
    for spec in case.adapter.layout:
        found = _PART.search(spec.name)
        if found is not None:
            message = "PEFT has no LoRA tensor of this name, and would drop it"
            yield Finding("C05", "error", spec.name, message, "weight or bias", found[1], "rename it")


def _not_targeted(case: Case) -> Iterator[Finding]:
    """Factors of modules that the configuration does not target: PEFT wraps what it targets, and drops the others."""
    config = case.adapter.config
    if config is None or case.targeting is None or config.peft_type != "LORA":
        return
    if config.document.get("ensure_weight_tying"):
        return
    for target in case.adapter.targets:
        kind = target.kind.partition("+")[0]
        if not target.rank or kind in ("parameter", "unknown"):
            continue
        paths = [target.module] if kind != "attention_out" else [target.module, target.module.rpartition(".")[0]]
        if all(case.targeting.names(path) is False for path in paths):
            message = "the configuration does not target this module, so PEFT drops its factors"
            mend = "correct target_modules, exclude_modules or layers_to_transform"
            yield Finding("C05", "error", target.module, message, "a targeted module", "none", mend)


@rule("C08", "A and B have the sizes of their module", "error")
def sizes(case: Case) -> Iterator[Finding]:
    """A is (r, in) and B is (out, r) of the module that they change; those of a convolution have its kernel as well.
    Other sizes make PEFT fail in the middle of loading. Where a module is square, factors that were saved the wrong
    way round have the right sizes, and only a probe can tell.

    Reproduce: load an adapter of a 768 wide model into a 512 wide one.
    """
    yield from (one for one in case.adapter.read if one.code == "C08")
    if case.model is None or is_explained(case):
        return
    for one in case.placing.of_fault("sizes"):
        if one.target.kind.startswith("full") or _is_vocabulary(one) or _is_widened(case, one):
            continue
        mend = "this is not the base that the adapter was trained on, or not in this size"
        yield Finding(
            "C08", "error", one.target.module, "(in, out) differ", _sizes(one.there), _sizes(one.wanted), mend
        )


@rule("C09", "Ranks are those of the tensors", "error")
def ranks(case: Case) -> Iterator[Finding]:
    """`r` and `rank_pattern` say how large A and B are made; tensors of another rank do not go in, and PEFT raises a
    RuntimeError for each.

    Reproduce: set `r` to 16 in the configuration of an adapter of rank 8.
    """
    yield from (one for one in case.adapter.read if one.code == "C09")
    config = case.adapter.config
    if config is None or config.peft_type != "LORA" or config.r is not None:
        return
    for target in case.adapter.targets:
        if target.rank not in (0, PEFT_DEFAULT_R) and rank_of(config, target.module) is None:
            message = "the configuration has no r, and PEFT's default is 8"
            yield Finding("C09", "error", target.module, message, str(target.rank), "8", f"write r: {target.rank}")


@rule("C13", "modules_to_save are in the model, in these shapes", "error; info where the task brings the head")
def saved_modules(case: Case) -> Iterator[Finding]:
    """`modules_to_save` brings whole modules, such as a new head. Where the model has no module of the name, PEFT drops
    the copy silently or ends with a KeyError; where it is of another shape, loading fails. A head that the task type
    brings (a classifier on a body that was saved without one) is made when the model is loaded for that task.

    Reproduce: load a classifier of 3 labels into a model with 2.
    """
    model, config = case.model, case.adapter.config
    if model is None or is_explained(case):
        return
    for one in case.placing.placed:
        if not one.target.kind.startswith("full") or not one.fault or _is_vocabulary(one):
            continue
        head = model.is_version and bool(TASK_HEADS & set(one.target.module.split(".")))
        if one.fault == "sizes":
            mend = "build the model with the same head (number of labels, vocabulary)"
            yield Finding(
                "C13",
                "error",
                one.target.module,
                "the copy has another shape",
                _shape(one.there),
                _shape(one.wanted),
                mend,
            )
        elif head and config is not None and config.task_type:
            message = f"the version was saved without this head, and a model for {shown(config.task_type)} has it"
            yield Finding("C13", "info", one.target.module, message, "the module", "none yet")
        else:
            mend = "load into a model that has this module"
            message = "the adapter has a copy of it, and the model has no such module"
            yield Finding("C13", "error", one.target.module, message, "a module", "none", mend)
    names = () if config is None else config.modules_to_save
    paths = model.form.paths
    missing = [name for name in names if not any(f".{path}".endswith(f".{name}") for path in paths)]
    if missing and not (set(missing) <= TASK_HEADS and (len(missing) < len(names) or model.is_version)):
        copied = {one.target.module for one in case.placing.of_fault("module")}
        for name in missing:
            if not any(is_within(path, name) for path in copied):
                message = "modules_to_save names it, and the model has no such module"
                mend = nearest_path(name, model.form) or "correct modules_to_save"
                yield Finding("C13", "error", shown(name), message, "a module", "none", mend)


@rule("C14", "The vocabulary is as large as the adapter's", "error")
def vocabulary(case: Case) -> Iterator[Finding]:
    """An adapter that was trained with added tokens has more rows in the embedding than the base. PEFT notices only
    where the embedding itself is saved, and then fails in the middle of loading.

    Reproduce: `resize_token_embeddings`, train with `modules_to_save=["embed_tokens"]`, load into the plain base.
    """
    if case.model is None or is_explained(case):
        return
    mend = "call resize_token_embeddings with the adapter's number of tokens first"
    for one in case.placing.of_fault("sizes"):
        if _is_vocabulary(one):
            rows = _rows(one)
            yield Finding("C14", "error", one.target.module, "another number of tokens", *rows, mend)
    config = case.adapter.config
    tokens = None if config is None else config.trainable_token_indices
    for name, indices in tokens.items() if isinstance(tokens, dict) else [("", tokens or ())]:
        for module in case.model.form.modules:
            # Without a name PEFT takes the input embedding; the rows of all embeddings are at least as telling.
            if module.kind != "embedding" or (name and not f".{module.path}".endswith(f".{name}")):
                continue
            highest = max(indices, default=-1)
            if module.in_features is not None and highest >= module.in_features and name:
                yield Finding(
                    "C14", "error", module.path, "a trained token is not in it", f"below {module.in_features}",
                    str(highest), mend,
                )  # fmt: skip


@rule("C18", "LoRA works on modules of these kinds", "error where it does nothing; else warning or info")
def layer_kinds(case: Case) -> Iterator[Finding]:
    """Some modules are not called the way LoRA needs it. torch's MultiheadAttention reads the weight of its
    `out_proj` and never calls it, so a LoRA on `out_proj` alone is silently without effect. A LayerNorm has no
    factors. PEFT cannot merge a grouped convolution (NotImplementedError), and turns `fan_in_fan_out` to what the
    layer is.

    Reproduce: `target_modules=["out_proj"]` on a model with nn.MultiheadAttention.
    """
    model, config = case.model, case.adapter.config
    if model is None or is_explained(case):
        return
    form = model.form
    if config is not None and config.peft_type == "LORA" and form.exact and not is_all_linear(case):
        for path in case.targeting.unsupported(form) if case.targeting is not None else ():
            message = "target_modules matches it, and PEFT has no LoRA for a module of this kind"
            mend = "name the layers in it, or leave it out with exclude_modules"
            there = form.by_path.get(path)
            found = "a module that holds others" if there is None else _kind(there)
            yield Finding("C18", "error", path, message, "a linear, convolution or embedding", found, mend)
    wrapped = {one.target.module for one in case.placing.placed}
    for one in case.placing.placed:
        module = one.module
        if module is None or not one.target.rank:
            continue
        owner = form.by_path.get(module.path.rpartition(".")[0])
        if owner is not None and owner.kind == "attention" and owner.path not in wrapped:
            message = "torch's MultiheadAttention reads this layer's weight and never calls it: LoRA here does nothing"
            mend = "target the attention itself"
            severity: Severity = "error" if _all_are_read(case) else "warning"
            yield Finding("C18", severity, module.path, message, owner.path, module.path, mend)
        elif one.fault == "kind" and module.kind in ("other", "experts") and one.target.kind != "parameter":
            message = "PEFT has no LoRA for a module of this kind"
            mend = "name its parameters in target_parameters" if module.kind == "experts" else "leave it out"
            yield Finding(
                "C18", "error", module.path, message, "a linear, convolution or embedding", _kind(module), mend
            )
        elif module.groups > 1 and case.purpose == "merge":
            message = "PEFT cannot merge a grouped convolution"
            yield Finding("C18", "warning", module.path, message, "1 group", f"{module.groups} groups", "keep it apart")
        elif config is not None and form.exact and module.kind in ("linear", "transformers_conv1d"):
            turned = module.kind == "transformers_conv1d"
            if config.fan_in_fan_out != turned and case.purpose == "merge":
                message = (
                    "fan_in_fan_out is not what the layer is; PEFT corrects it, other programs transpose the delta"
                )
                yield Finding(
                    "C18", "info", module.path, message, str(turned).lower(), str(config.fan_in_fan_out).lower()
                )


def _all_are_read(case: Case) -> bool:
    """Whether every target is the output of a MultiheadAttention, and so nothing of the adapter is ever called."""
    form = None if case.model is None else case.model.form
    owners = (target.module.rpartition(".")[0] for target in case.adapter.targets)
    return form is not None and all((one := form.by_path.get(path)) and one.kind == "attention" for path in owners)


@rule("C26", "Names begin as PEFT and the model have them", "error; undecided where only saved names are known")
def prefixes(case: Case) -> Iterator[Finding]:
    """PEFT looks for `base_model.model.` and then the model's own path. Files of other programs begin with
    `diffusion_model.`, `transformer.`, `lora_unet_`, or with the path that the module had in another release
    (`model.language_model.`). PEFT finds nothing under such names, makes factors with a B of zeros, warns, and serves
    the base.

    Reproduce: take `base_model.model.` off the names in adapter_model.safetensors.
    """
    adapter, model = case.adapter, case.model
    yield from _foreign_names(case)
    shift = case.placing.shift
    if model is None or shift is None:
        return
    total = len(case.placing.placed)
    told = f"{shift.found} of {total} targets"
    if case.placing.by_family:
        message = f"{told} are found once the model is loaded with the head of the adapter's task"
        yield Finding(
            "C26",
            "info",
            shift.strip or shift.add,
            message,
            shown(shift.add) or "no prefix",
            shift.strip or "no prefix",
        )
        return
    severity: Severity = "error" if case.model is not None and case.model.form.exact else "undecided"
    was = f"begin with {shift.strip}" if shift.strip else "have no prefix"
    fits = f"with {shift.add}" if shift.add else "without it"
    message = f"the adapter's names {was}; {told} are found {fits}"
    mend = (
        "rename the tensors"
        if severity == "error"
        else "push the base with its config.json, so that the names of the live model are known"
    )
    first = adapter.targets[0].module if adapter.targets else ""
    yield Finding("C26", severity, first, message, shift.add or "no prefix", shift.strip or "no prefix", mend)


def _foreign_names(case: Case) -> Iterator[Finding]:
    adapter = case.adapter
    if adapter.config is None or not is_peft_folder(case):
        return
    names = [spec.name for spec in adapter.layout if ".lora_" in spec.name or spec.name.startswith("lora_")]
    wrong = [name for name in names if not name.startswith(PEFT_PREFIX) or name.startswith(2 * PEFT_PREFIX)]
    if 2 * len(wrong) > len(names):
        known = [prefix for prefix in FOREIGN_PREFIXES if wrong[0].startswith(prefix)]
        found = known[0] if known else wrong[0].partition(".")[0] + "."
        message = f"{len(wrong)} of {len(names)} tensors do not begin with one {PEFT_PREFIX}, so PEFT finds none"
        mend = "pull it with --format peft, which names them as PEFT does"
        if known and known[0].endswith("_"):
            mend = "these are kohya's names; convert the file first"
        yield Finding("C26", "error", shown(wrong[0], 200), message, PEFT_PREFIX, found, mend)


def _is_vocabulary(one: Placed) -> bool:
    """Whether sizes differ in the number of tokens alone."""
    kind = one.target.kind
    module = one.module
    if module is None or one.fault != "sizes":
        return False
    if module.kind != "embedding" and module.path.rpartition(".")[2] not in TOKENS:
        return False
    if kind.startswith("full"):
        return one.wanted[0] == one.there[0]
    return kind.partition("+")[0] == "embedding" and one.wanted[1] == one.there[1]


def _is_widened(case: Case, one: Placed) -> bool:
    """Whether QA-LoRA is switched on beside a layer that is not quantised, where PEFT does plain LoRA."""
    config = case.adapter.config
    if config is None or not config.document.get("use_qalora") or one.module is None or one.there[0] is None:
        return False
    group = config.document.get("qalora_group_size")
    is_plain = one.module.kind in ("linear", "matrix")
    return is_plain and type(group) is int and one.wanted == (group * one.there[0], one.there[1])


def _rows(one: Placed) -> tuple[str, str]:
    place = 1 if one.target.kind.startswith("full") else 0
    return str(one.there[place]), str(one.wanted[place])


def _sizes(pair: tuple[int | None, int | None]) -> str:
    return f"({', '.join('?' if one is None else str(one) for one in pair)})"


def _shape(pair: tuple[int | None, int | None]) -> str:
    return str([one for one in reversed(pair) if one is not None])


def _kind(module: Module) -> str:
    return f"{module.kind} ({shown(module.type_name, 80)})" if module.type_name else module.kind
