"""Rules about what is missing: targeted modules without tensors, copies and biases that did not come along, and targets
that match nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from difflib import get_close_matches

from registry.compat.asked import (
    TASK_HEADS,
    TOKENS,
    bare_path,
    is_all_linear,
    is_within,
)
from registry.compat.case import Case
from registry.compat.placing import layer_order
from registry.compat.rule import rule
from registry.core.adapter_names import canonical_name
from registry.core.findings import Finding, Severity
from registry.core.reference import shown
from registry.core.tensor_names import split_at_tuner


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
    if model is None or not adapter.targets or (is_all_linear(case) and not model.form.exact):
        return
    yield from _lacking_parameters(case)
    yield from _lacking_biases(case)
    yield from _lacking_copies(case)
    there = {one.path for one in case.placing.placed}
    if case.placing.shift is not None:
        shift = case.placing.shift
        there |= {shift.add + path.removeprefix(shift.strip) for path in there}
    named = {finding.subject for finding in adapter.read}
    wanted = None if case.targeting is None else case.targeting.modules(model.form)
    for module in wanted or ():
        if module.path in there or module.path in named or module.tied_to is not None:
            continue
        if module.kind == "matrix" and not model.form.exact and module.path.rpartition(".")[2] in TOKENS:
            continue
        message = "the configuration targets this module, and the adapter has no tensors for it"
        mend = "push the whole adapter, or correct target_modules"
        yield Finding("C06", "error", module.path, message, "A and B", "nothing", mend)


def _unsaved_copies(case: Case) -> Iterator[Finding]:
    config = case.adapter.config
    copied = [one.module for one in case.adapter.targets if "full" in one.kind.split("+")]
    named = () if config is None else config.modules_to_save
    lacking = [name for name in named if not any(is_within(path, name) for path in copied)]
    if lacking and not (set(lacking) <= TASK_HEADS and len(lacking) < len(named)):
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
        if not any(is_within(one.module.path, name) for name in config.modules_to_save):
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
        there = [count for path, count in rows.items() if not name or f".{bare_path(path)}".endswith(f".{name}")]
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
        bare_path(one.module.path)
        for one in case.placing.placed
        if one.module and one.target.kind.startswith("parameter")
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
        if any(is_within(module.path, name) for name in config.modules_to_save) or module.kind == "attention":
            continue
        message = f"bias is {config.bias}, and the adapter has no bias for this module"
        yield Finding("C06", "error", module.path, message, "its bias", "nothing", "push the whole adapter")


@rule("C07", "Something is targeted", "error")
def targets_something(case: Case) -> Iterator[Finding]:
    """`target_modules` matches no module of the model. PEFT raises, with the names that it looked for and none of those
    that are there.

    Reproduce: load an adapter for `q_proj` into GPT-2, whose attention is called `c_attn`.
    """
    config, model = case.adapter.config, case.model
    if config is None or model is None or config.peft_type != "LORA" or config.target_parameters:
        return
    wanted = None if case.targeting is None else case.targeting.modules(model.form)
    if wanted is None and config.target_modules is not None and not is_all_linear(case):
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
    severity: Severity = "undecided" if case.placing.shift is not None and not model.form.exact else "error"
    near = [one for name in ([text] if isinstance(names, str) else names) for one in get_close_matches(name, ends, 2)]
    told = f"modules called {', '.join(dict.fromkeys(near)) or ', '.join(ends[:8])}"
    message = "target_modules matches no module of the model"
    yield Finding("C07", severity, "target_modules", message, told, shown(text, 120), "is this the right base?")
