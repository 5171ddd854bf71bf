"""Rules about the configuration: what the PEFT that would load an adapter knows of it, and whether it belongs to the
tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from registry.compat.case import Case
from registry.compat.peft_versions import dropped_keys, fused_expert_layout, parse_peft, type_known
from registry.compat.rule import rule
from registry.compat.rules_model import changed_modules
from registry.core.adapter_config import config_findings
from registry.core.adapter_names import pattern_paths
from registry.core.content_digest import PLAIN_INITS
from registry.core.findings import Finding, Severity
from registry.core.name_patterns import PatternTable, Undecided
from registry.core.peft_keys import CONFIG_KEYS, KNOWN_PEFT
from registry.core.reference import shown

_MOST_KEYS = 500
_STACK = re.compile(r"(^|\.)(layers|encoder\.layer|h)\.[0-9]+\.")
"""Where PEFT finds the layers that it replicates."""


@rule("C01", "The tuner is known", "error")
def known_type(case: Case) -> Iterator[Finding]:
    """`peft_type` names a tuner that the PEFT in question does not have: older than the tuner, or newer than its end
    (Bone became MiSS in 0.19), or a misspelling. PEFT ends with a KeyError that names nothing else.

    Reproduce: set `"peft_type": "BONE"` in adapter_config.json and load with PEFT 0.21.
    """
    config = case.adapter.config
    if config is None:
        return
    yield from (one for one in config_findings(config) if one.code == "C01")
    if config.document["peft_type"] in CONFIG_KEYS and not type_known(config.peft_type, case.peft):
        message = f"PEFT {case.peft} has no tuner of this type"
        yield Finding("C01", "error", "peft_type", message, "a known type", config.peft_type, "use a newer PEFT")


@rule("C02", "No key is dropped that changes what the adapter computes", "error; info where nothing changes")
def known_keys(case: Case) -> Iterator[Finding]:
    """The configuration holds a key that the PEFT in question does not know, with a value that is not its default. PEFT
    warns, drops the key and loads: where the key is `use_dora`, `use_rslora` or `lora_bias`, the adapter then computes
    something else. Ask with `--peft 0.9` what an older installation would do; by default it is the installed one.

    Reproduce: train with `use_dora=True`, and load the folder with PEFT 0.8.
    """
    config = case.adapter.config
    if config is None:
        return
    yield from (one for one in config_findings(config) if one.code == "C02")
    if parse_peft(case.peft)[:2] >= parse_peft(KNOWN_PEFT)[:2]:
        return
    for key in dropped_keys(config, case.peft):
        does = "does not take" if key.refuses else "drops"
        changes = {"maths": "which changes what it computes", "training": "which matters for training alone"}
        why = changes.get(key.changes, "which changes nothing here")
        severity: Severity = "error" if key.changes == "maths" or key.refuses else "info"
        message = f"PEFT {case.peft} {does} this key, {why}"
        mend = f"use PEFT {key.brought_by} or newer" if key.brought_by else "take it out of the file"
        yield Finding("C02", severity, key.key, message, "the default", shown(repr(key.value), 80), mend)


@rule("C03", "Factors of experts are laid out as this PEFT reads them", "error; undecided where the writer is unknown")
def expert_layout(case: Case) -> Iterator[Finding]:
    """With `target_parameters` the factors of all experts lie in one tensor, in an order that changed in PEFT 0.19.0
    and again in 0.19.1. PEFT never reads the `peft_version` that it records: where the dimensions coincide, the
    experts are silently mixed up.

    Reproduce: train with `target_parameters` in PEFT 0.18, load in 0.21.
    """
    config = case.adapter.config
    if config is None or not config.target_parameters:
        return
    reads = fused_expert_layout(case.peft)
    written_by = case.adapter.written_by
    subject, message = "target_parameters", f"PEFT {case.peft} reads the factors of experts in another order"
    if written_by is None:
        message = "which PEFT wrote it is not recorded, and the order of experts' factors depends on that"
        mend = "push it with the PEFT that wrote it, or put peft_version into adapter_config.json"
        yield Finding("C03", "undecided", subject, message, f"as PEFT {case.peft} has it", "unknown", mend)
    elif fused_expert_layout(written_by) != reads:
        mend = f"load it with PEFT {written_by}, or train it again"
        yield Finding("C03", "error", subject, message, f"written by PEFT {case.peft}", written_by, mend)


@rule("C10", "alpha and use_rslora are those of the training", "undecided")
def known_alpha(case: Case) -> Iterator[Finding]:
    """`lora_alpha` and `use_rslora` decide how much an adapter adds, and no tensor shows them: PEFT loads whatever the
    file says. An adapter without a configuration has no alpha at all; one whose tensors are stored with another
    configuration as well was edited on one side. An edit before the first push can be seen by nobody; the behaviour
    probe of a live push settles it (`Registry.load(..., prove=True)`).

    Reproduce: double `lora_alpha` in adapter_config.json and load.
    """
    adapter = case.adapter
    if adapter.config is None:
        message = "it came without a configuration, so lora_alpha is unknown"
        mend = "push it with its adapter_config.json"
        yield Finding("C10", "undecided", "lora_alpha", message, "a number", "nothing", mend)
        return
    if adapter.config.peft_type == "LORA" and adapter.config.lora_alpha is None and not adapter.config.alpha_pattern:
        message, mend = (
            "the configuration has no lora_alpha, and PEFT's default is 8",
            "write the number of the training",
        )
        yield Finding("C10", "undecided", "lora_alpha", message, "a number", "nothing", mend)
    for twin in adapter.twins:
        message = (
            "the same tensors are stored with another configuration; which one they were trained with is not known"
        )
        mend = (
            "prove each with its behaviour probe" if adapter.has_probe else "ask who trained it, and remove the other"
        )
        yield Finding("C10", "undecided", "lora_alpha", message, "one configuration", twin, mend)


@rule("C11", "Keys of rank_pattern and alpha_pattern match modules", "warning")
def pattern_keys(case: Case) -> Iterator[Finding]:
    """A key of `rank_pattern` or `alpha_pattern` that matches no module of the adapter does nothing: a typing
    mistake, or a name of another model. PEFT has warned of it since 0.21, and not before. An expression that is not
    evaluated here (look-around, back-references) leaves ranks and scalings of its modules unknown.

    Reproduce: `rank_pattern={"q_prj": 4}`.
    """
    config = case.adapter.config
    if config is None:
        return
    yield from (one for one in config_findings(config) if one.code == "C11")
    paths = {
        path
        for target in case.adapter.targets
        if target.rank
        for path in (target.module, *pattern_paths(target.module, target.kind.partition("+")[0], config))
    }
    if not paths:
        return
    for name, keys in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for key in list(keys)[:_MOST_KEYS]:
            if not _matches(key, paths):
                message = "the key matches no module of the adapter, so it does nothing"
                mend = "correct the key, or leave it out"
                yield Finding("C11", "warning", f"{name}[{key[:80]!r}]", message, "a module", "none", mend)


def _matches(key: str, paths: Iterable[str]) -> bool:
    table = PatternTable([key])
    try:
        return any(table.find(one) is not None for one in paths)
    except Undecided:
        return True


@rule("C12", "The DoRA flag and the magnitude vectors agree", "error")
def dora_agrees(case: Case) -> Iterable[Finding]:
    """DoRA keeps a magnitude vector for each module, and `use_dora` says that it is used. Without the flag PEFT drops
    the vectors silently and computes plain LoRA; with the flag and without vectors it makes fresh ones and warns.

    Reproduce: train with `use_dora=True`, set it to false in adapter_config.json, load.
    """
    return (one for one in case.adapter.read if one.code == "C12")


@rule("C22", "The initialisation left the base as it was", "warning on another base; error for merge and hotswap")
def plain_init(case: Case) -> Iterator[Finding]:
    """PiSSA, OLoRA, CorDA, LoftQ and KaSA change the base's weights when the adapter is made: the adapter belongs to
    the changed base, and not to the one on disk. PEFT makes the change again at each load, from the weights that it
    finds, silently; merged by plain algebra, or swapped into a slot, it is wrong.

    Reproduce: `init_lora_weights="pissa"`, train, save, and add the delta to the plain base.
    """
    config = case.adapter.config
    init = None if config is None else config.init_lora_weights
    if config is None or (config.peft_type == "LORA" and (init is None or init in PLAIN_INITS)):
        return
    if config.peft_type != "LORA":
        return
    message = "this initialisation changed the base's weights as well"
    mend = "save it with path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
    if case.purpose == "load" and (case.model is None or _is_own_base(case)):
        return
    severity: Severity = "warning" if case.purpose == "load" else "error"
    yield Finding("C22", severity, "init_lora_weights", message, "an init that leaves them", shown(str(init), 80), mend)


def _is_own_base(case: Case) -> bool:
    trained, asked = case.adapter.weights, None if case.model is None else case.model.weights
    if trained is None or asked is None:
        return False
    return trained.reference == asked.reference or set(changed_modules(trained, asked).values()) == {"same"}


@rule("C23", "Names are unambiguous", "error where two adapters are mixed; else warning")
def plain_names(case: Case) -> Iterator[Finding]:
    """PEFT finds an adapter's tensors by parts of their names. Two adapters in one file become one; a module of the
    model that is called `weight`, or whose name begins with `lora_`, is taken for a part of the adapter (PEFT warns,
    or leaves it out of the file).

    Reproduce: save `model.state_dict()` of a model with two adapters as one adapter.
    """
    yield from (one for one in case.adapter.read if one.code == "C23")
    for target in case.adapter.targets:
        segments = target.module.split(".")
        if target.kind.startswith("parameter"):
            segments.pop()  # the parameter itself may have any name
        bad = next((one for one in segments if one.startswith("lora_") or one == "weight"), None)
        if bad is not None:
            message = "PEFT may take a part of this path for its own"
            yield Finding("C23", "warning", target.module, message, "other names", bad, "rename the module")


@rule("C24", "No two adapters with biases", "error beside another adapter, and for merge and hotswap")
def one_bias(case: Case) -> Iterator[Finding]:
    """With `bias="all"` or `"lora_only"` an adapter trains the base's own biases, of which there is one set: PEFT
    refuses a second adapter with a ValueError, and when an adapter is taken off the biases stay.

    Reproduce: load two adapters with `bias="lora_only"` into one model.
    """
    config = case.adapter.config
    if config is None or config.bias in (None, "none"):
        return
    beside = case.model is not None and bool(case.model.adapters)
    if beside or case.purpose != "load":
        message = "it brings the base's biases with it, of which a model has one set"
        yield Finding("C24", "error", "bias", message, "none", shown(str(config.bias), 80), "use it alone, unmerged")


@rule("C25", "Layers are not replicated", "error for merge and hotswap, and where PEFT cannot")
def no_replication(case: Case) -> Iterator[Finding]:
    """`layer_replication` builds a deeper model out of a base's layers, each copy with its own LoRA and one shared
    weight. Merged into that weight, the copies add up: PEFT merges silently, and wrongly.

    Reproduce: `layer_replication=[[0, 2], [1, 3]]`, train, `merge_and_unload`.
    """
    config = case.adapter.config
    if config is None or not config.layer_replication:
        return
    if case.model is not None and case.model.form.exact and not any(map(_STACK.search, case.model.form.by_path)):
        message = "PEFT replicates layers of models that are built like Llama, BERT or Falcon alone"
        found = shown(case.model.form.class_name or case.model.reference, 120)
        yield Finding("C25", "error", "layer_replication", message, "layers, encoder.layer or h", found, "leave it out")
    if case.purpose == "load":
        return
    pairs = str([list(pair) for pair in config.layer_replication])
    message = "several LoRAs share one weight of the base"
    yield Finding("C25", "error", "layer_replication", message, "none", shown(pairs, 80), "load it unmerged")


@rule("C31", "The tuner is one whose targets are compared", "undecided")
def compared_tuner(case: Case) -> Iterator[Finding]:
    """Targets are taken apart for LoRA alone. Of IA3, LoHa, prompt tuning and the others tensors and configuration are
    kept and checked by themselves, and only loading tells whether they fit a model."""
    config = case.adapter.config
    if config is not None and config.peft_type != "LORA" and config.peft_type in CONFIG_KEYS:
        message = "the targets of this tuner are not compared with the model"
        yield Finding("C31", "undecided", "peft_type", message, "LORA", config.peft_type, "load it into the model")


@rule("C33", "PEFT takes these options together", "error")
def options_together(case: Case) -> Iterator[Finding]:
    """Some options exclude each other: with `target_parameters` the factors are added to the weight before it is
    used, and there is no place for a dropout. PEFT raises a ValueError when the adapter is made.

    Reproduce: `target_parameters=["experts.down_proj"]`, and `lora_dropout` 0.1 written into adapter_config.json.
    """
    config = case.adapter.config
    if config is not None and config.target_parameters and config.lora_dropout:
        message = "PEFT takes no dropout with target_parameters"
        yield Finding("C33", "error", "lora_dropout", message, "0", f"{config.lora_dropout:g}", "write 0")
