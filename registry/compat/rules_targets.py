"""Rules about the place of an adapter's tensors in a model: that each has one, that its sizes are those of the module,
and that the module is one that a LoRA works on."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from difflib import get_close_matches

from registry.compat.case import Case
from registry.compat.placing import Placed, layer_order
from registry.compat.rule import rule
from registry.compat.target_modules import ALL_LINEAR, is_targeted, targeted, unsupported
from registry.core.adapter_config import rank_of
from registry.core.adapter_names import canonical_name
from registry.core.findings import Finding, Severity
from registry.core.model_form import ModelForm, Module
from registry.core.reference import shown
from registry.core.tensor_names import split_at_tuner, without_layers

PEFT_PREFIX = "base_model.model."
PEFT_DEFAULT_R = 8
FOREIGN_PREFIXES = (
    *("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_transformer_", "lycoris_"),
    *("diffusion_model.", "transformer.", "unet.", "text_encoder.", "model.language_model."),
)
"""What files of other programs begin with; those that end in `_` are kohya's, whose names have no dots."""
_PART = re.compile(r"\.lora_[AB]\.(?!(?:weight|bias)$)(.*)$")
_TASK_HEADS = frozenset({"classifier", "score", "qa_outputs", "summary", "pooler"})
_TOKENS = ("embed_tokens", "lm_head", "wte", "word_embeddings", "shared")


@rule("C05", "Every tensor lands on a module of the model", "error")
def lands(case: Case) -> Iterator[Finding]:
    """A tensor of the adapter is for a module that the model does not have, or for a module of another kind. PEFT drops
    such tensors, and says so at most in the result of `load_state_dict`, which nobody reads: the layer serves the base.

    Reproduce: load an adapter of a model with 12 layers into one with 6.
    """
    yield from (one for one in case.adapter.read if one.code == "C05")
    yield from _not_targeted(case)
    yield from _of_no_part(case)
    if case.model is None or _is_explained(case):
        return
    form = case.model.form
    severity: Severity = "error" if _names_are_certain(case) else "undecided"
    for one in case.placing.placed:
        if one.target.kind.partition("+")[0] == "full":
            continue  # C13
        if one.fault == "module":
            mend = _near(one.target.module, form) or "is this the base that the adapter was trained on?"
            message = "the model has no such module" if severity == "error" else "the saved names have no such module"
            yield Finding("C05", severity, one.target.module, message, "a module", "none", mend)
        elif one.fault == "kind" and one.module is not None and one.module.kind not in ("other", "experts"):
            message = "the module is of another kind than the adapter's factors"
            mend = "is this the base that the adapter was trained on?"
            yield Finding(
                "C05", "error", one.target.module, message, one.target.kind.partition("+")[0], _kind(one.module), mend
            )


def _of_no_part(case: Case) -> Iterator[Finding]:
    """Names in a folder of PEFT's whose last part PEFT does not know: elsewhere it would be an adapter's name."""
    if case.adapter.config is None or case.adapter.config.peft_type != "LORA" or not _is_peft_folder(case):
        return
    for spec in case.adapter.layout:
        found = _PART.search(spec.name)
        if found is not None:
            message = "PEFT has no LoRA tensor of this name, and would drop it"
            yield Finding("C05", "error", spec.name, message, "weight or bias", found[1], "rename it")


def _is_peft_folder(case: Case) -> bool:
    return {"adapter_config.json", "adapter_model.safetensors"} <= case.adapter.files.keys()


def _not_targeted(case: Case) -> Iterator[Finding]:
    """Factors of modules that the configuration does not target: PEFT wraps what it targets, and drops the others."""
    config = case.adapter.config
    if config is None or config.peft_type != "LORA" or config.document.get("ensure_weight_tying"):
        return
    for target in case.adapter.targets:
        kind = target.kind.partition("+")[0]
        if not target.rank or kind in ("parameter", "unknown"):
            continue
        paths = [target.module] if kind != "attention_out" else [target.module, target.module.rpartition(".")[0]]
        if all(is_targeted(config, path) is False for path in paths):
            message = "the configuration does not target this module, so PEFT drops its factors"
            mend = "correct target_modules, exclude_modules or layers_to_transform"
            yield Finding("C05", "error", target.module, message, "a targeted module", "none", mend)


@rule("C06", "Every targeted module has its tensors", "error")
def complete(case: Case) -> Iterator[Finding]:
    """A module that the configuration targets has no tensors in the file, or one of A and B is missing. PEFT makes
    fresh factors with a B of zeros for it: the module serves the base. `from_pretrained` warns, `load_adapter` only
    returns the keys.

    Reproduce: leave every second layer out of adapter_model.safetensors.
    """
    adapter, model = case.adapter, case.model
    yield from (one for one in adapter.read if one.code == "C06")
    config = adapter.config
    if config is None or config.peft_type != "LORA":
        return
    yield from _unsaved_copies(case)
    yield from _lacking_tokens(case)
    yield from _lacking_parts(case)
    if model is None or not adapter.targets or (_is_all_linear(case) and not model.form.exact):
        return
    yield from _lacking_parameters(case)
    yield from _lacking_biases(case)
    yield from _lacking_copies(case)
    there = {one.path for one in case.placing.placed}
    if case.placing.shift is not None:
        shift = case.placing.shift
        there |= {shift.add + path.removeprefix(shift.strip) for path in there}
    named = {finding.subject for finding in adapter.read}
    wanted = targeted(config, model.form)
    for module in wanted or ():
        if module.path in there or module.path in named or module.tied_to is not None:
            continue
        if module.kind == "matrix" and not model.form.exact and module.path.rpartition(".")[2] in _TOKENS:
            continue
        message = "the configuration targets this module, and the adapter has no tensors for it"
        mend = "push the whole adapter, or correct target_modules"
        yield Finding("C06", "error", module.path, message, "A and B", "nothing", mend)


def _unsaved_copies(case: Case) -> Iterator[Finding]:
    config = case.adapter.config
    copied = [one.module for one in case.adapter.targets if "full" in one.kind.split("+")]
    named = () if config is None else config.modules_to_save
    lacking = [name for name in named if not any(_within(path, name) for path in copied)]
    if lacking and not (set(lacking) <= _TASK_HEADS and len(lacking) < len(named)):
        for name in lacking:
            message = "modules_to_save names this module, and the adapter has no copy of it"
            yield Finding("C06", "error", shown(name), message, "its tensors", "nothing", "push the whole adapter")


def _lacking_parts(case: Case) -> Iterator[Finding]:
    """Parameters of a copied module that did not come with the copy."""
    config, model = case.adapter.config, case.model
    if config is None or model is None or not model.form.exact:
        return
    there = {canonical_name(spec.name) for spec in case.adapter.layout}
    for one in case.placing.placed:
        if not one.target.kind.startswith("full") or one.module is None:
            continue
        if not any(_within(one.module.path, name) for name in config.modules_to_save):
            continue
        for parameter in one.module.parameters:
            if f"{one.target.module}.{parameter.name}" not in there and parameter.name in ("weight", "bias"):
                message = f"modules_to_save copies this module, and its {parameter.name} did not come with the adapter"
                yield Finding("C06", "error", one.path, message, parameter.name, "nothing", "push the whole adapter")


def _lacking_tokens(case: Case) -> Iterator[Finding]:
    config = case.adapter.config
    tokens = None if config is None else config.trainable_token_indices
    if not tokens:
        return
    rows = {
        found[0]: spec.shape[0]
        for spec in case.adapter.layout
        if (found := split_at_tuner(canonical_name(spec.name))) is not None
        and found[1] == "trainable_tokens_delta"
        and spec.shape
    }
    for name, indices in (tokens if isinstance(tokens, dict) else {"": tokens}).items():
        there = [count for path, count in rows.items() if not name or f".{_bare(path)}".endswith(f".{name}")]
        what = name or "trainable_token_indices"
        if not there:
            message = "the configuration trains tokens of this embedding, and the adapter has none of them"
            yield Finding("C06", "error", what, message, f"{len(indices)} rows", "nothing", "push the whole adapter")
        elif len(indices) not in there:
            message = "as many rows as trainable_token_indices has numbers"
            yield Finding("C06", "error", what, message, str(len(indices)), str(there[0]), "correct the numbers")


def _lacking_parameters(case: Case) -> Iterator[Finding]:
    """Modules of which `target_parameters` names more than the adapter has factors for."""
    config, model = case.adapter.config, case.model
    if config is None or model is None or not config.target_parameters or not model.form.exact:
        return
    have = Counter(
        _bare(one.module.path) for one in case.placing.placed if one.module and one.target.kind.startswith("parameter")
    )
    for module in model.form.modules:
        wanted = [
            one.name
            for one in module.parameters
            if any(f".{module.path}.{one.name}".endswith(f".{name}") for name in config.target_parameters)
        ]
        if len(wanted) > have[module.path]:
            message = "target_parameters names these parameters, and the adapter has not a LoRA for each"
            found = f"{have[module.path]} of {len(wanted)}"
            yield Finding("C06", "error", module.path, message, ", ".join(wanted), found, "push the whole adapter")


def _lacking_copies(case: Case) -> Iterator[Finding]:
    """Copies of a replicated layer that have no factors, beside others that have."""
    config = case.adapter.config
    if config is None or not config.layer_replication:
        return
    order = layer_order(config.layer_replication)
    paths = {one.module for one in case.adapter.targets if one.rank}
    for path in sorted(paths):
        segments = path.split(".")
        at = next((at for at, segment in enumerate(segments) if segment.isdecimal() and len(segment) < 7), None)
        if at is None or int(segments[at]) >= len(order):
            continue
        of = order[int(segments[at])]
        for copy in (number for number, layer in enumerate(order) if layer == of):
            other = ".".join([*segments[:at], str(copy), *segments[at + 1 :]])
            if other not in paths:
                message = "a copy of a layer whose other copy has factors, and the adapter has none for it"
                yield Finding("C06", "error", other, message, "A and B", "nothing", "push the whole adapter")


def _lacking_biases(case: Case) -> Iterator[Finding]:
    """Biases that `bias` says were trained, and that did not come with the adapter."""
    config, model = case.adapter.config, case.model
    if config is None or model is None or not model.form.exact or config.bias not in ("all", "lora_only"):
        return
    brought = {
        one.path for one in case.placing.placed if {"full", "bias", "base_bias"} & set(one.target.kind.split("+"))
    }
    if not any({"bias", "base_bias"} & set(one.target.kind.split("+")) for one in case.placing.placed):
        return  # then all are the base's own, whatever the configuration says
    factors = {one.path for one in case.placing.placed if one.target.rank}
    for module in model.form.modules:
        if module.parameter("bias") is None or module.path in brought or module.tied_to is not None:
            continue
        if config.bias == "lora_only" and module.path not in factors:
            continue
        if any(_within(module.path, name) for name in config.modules_to_save) or module.kind == "attention":
            continue
        message = f"bias is {config.bias}, and the adapter has no bias for this module"
        yield Finding("C06", "error", module.path, message, "its bias", "nothing", "push the whole adapter")


def _bare(path: str) -> str:
    return ".".join(without_layers(path.split(".")))


def _within(path: str, name: str) -> bool:
    """Whether a path is the named module, or in it; PEFT compares the ends of names."""
    return f".{name}." in f".{path}."


@rule("C07", "Something is targeted", "error", needs_model=True)
def targets_something(case: Case) -> Iterator[Finding]:
    """`target_modules` matches no module of the model. PEFT raises, with the names that it looked for and none of those
    that are there.

    Reproduce: load an adapter for `q_proj` into GPT-2, whose attention is called `c_attn`.
    """
    config, model = case.adapter.config, case.model
    if config is None or model is None or config.peft_type != "LORA" or config.target_parameters:
        return
    wanted = targeted(config, model.form)
    if wanted is None and config.target_modules is not None and not _is_all_linear(case):
        message = "target_modules is an expression that is not evaluated, so what it matches is not known"
        yield Finding("C07", "undecided", "target_modules", message, "a module", "unknown", "name the modules plainly")
    if config.target_modules is None:
        message = "the configuration names no targets, so PEFT takes those that it knows for the model's type"
        yield Finding("C07", "undecided", "target_modules", message, "names", "nothing", "write target_modules")
    if wanted is None or wanted or config.target_modules is None:
        return
    names = config.target_modules
    text = names if isinstance(names, str) else ", ".join(names)
    ends = sorted({path.rpartition(".")[2] for path in model.form.by_path if not path.rpartition(".")[2].isdecimal()})
    severity: Severity = "error" if _names_are_certain(case) else "undecided"
    near = [one for name in ([text] if isinstance(names, str) else names) for one in get_close_matches(name, ends, 2)]
    told = f"modules called {', '.join(dict.fromkeys(near)) or ', '.join(ends[:8])}"
    message = "target_modules matches no module of the model"
    yield Finding("C07", severity, "target_modules", message, told, shown(text, 120), "is this the right base?")


@rule("C08", "A and B have the sizes of their module", "error")
def sizes(case: Case) -> Iterator[Finding]:
    """A is (r, in) and B is (out, r) of the module that they change; those of a convolution have its kernel as well.
    Other sizes make PEFT fail in the middle of loading. Where a module is square, factors that were saved the wrong
    way round have the right sizes, and only a probe can tell.

    Reproduce: load an adapter of a 768 wide model into a 512 wide one.
    """
    yield from (one for one in case.adapter.read if one.code == "C08")
    if case.model is None or _is_explained(case):
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
    if model is None or _is_explained(case):
        return
    for one in case.placing.placed:
        if not one.target.kind.startswith("full") or not one.fault or _is_vocabulary(one):
            continue
        head = model.is_version and bool(_TASK_HEADS & set(one.target.module.split(".")))
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
            severity: Severity = "error" if _names_are_certain(case) or not head else "undecided"
            mend = "load into a model that has this module"
            message = "the adapter has a copy of it, and the model has no such module"
            yield Finding("C13", severity, one.target.module, message, "a module", "none", mend)
    names = () if config is None else config.modules_to_save
    paths = model.form.paths
    missing = [name for name in names if not any(f".{path}".endswith(f".{name}") for path in paths)]
    if missing and not (set(missing) <= _TASK_HEADS and (len(missing) < len(names) or model.is_version)):
        copied = {one.target.module for one in case.placing.of_fault("module")}
        for name in missing:
            if not any(_within(path, name) for path in copied):
                message = "modules_to_save names it, and the model has no such module"
                mend = _near(name, model.form) or "correct modules_to_save"
                yield Finding("C13", "error", shown(name), message, "a module", "none", mend)


@rule("C14", "The vocabulary is as large as the adapter's", "error", needs_model=True)
def vocabulary(case: Case) -> Iterator[Finding]:
    """An adapter that was trained with added tokens has more rows in the embedding than the base. PEFT notices only
    where the embedding itself is saved, and then fails in the middle of loading.

    Reproduce: `resize_token_embeddings`, train with `modules_to_save=["embed_tokens"]`, load into the plain base.
    """
    if case.model is None or _is_explained(case):
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
    if model is None or _is_explained(case):
        return
    form = model.form
    if config is not None and config.peft_type == "LORA" and form.exact and not _is_all_linear(case):
        for path in unsupported(config, form):
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
    severity: Severity = "error" if _names_are_certain(case) else "undecided"
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
    if adapter.config is None or not _is_peft_folder(case):
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


# ---------------------------------------------------------------- what several of them ask


def _is_explained(case: Case) -> bool:
    """Whether C26 says already why targets are not found; their names and sizes then say nothing."""
    return case.placing.shift is not None and not case.placing.by_family


def _names_are_certain(case: Case) -> bool:
    return case.model is not None and (case.model.form.exact or case.model.form.class_name is not None)


def _is_all_linear(case: Case) -> bool:
    names = None if case.adapter.config is None else case.adapter.config.target_modules
    return isinstance(names, str) and names.lower() == ALL_LINEAR


def _is_vocabulary(one: Placed) -> bool:
    """Whether sizes differ in the number of tokens alone."""
    kind = one.target.kind
    module = one.module
    if module is None or one.fault != "sizes":
        return False
    if module.kind != "embedding" and module.path.rpartition(".")[2] not in _TOKENS:
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


def _near(path: str, form: ModelForm) -> str:
    end = path.rpartition(".")[2]
    near = get_close_matches(path, [one for one in form.by_path if one.endswith(end)][:2000], 1, 0.8)
    return f"the nearest is {shown(near[0], 120)}" if near else ""
