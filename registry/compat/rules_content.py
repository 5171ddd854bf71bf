"""Rules about what is in the tensors, as far as digests and the pass of the push tell it: that they are numbers, and
that they do something."""

from __future__ import annotations

from collections.abc import Iterator

from registry.compat.case import Case
from registry.compat.rule import rule
from registry.core.adapter_config import AdapterConfig, alpha_of
from registry.core.findings import Finding
from registry.core.tensor_names import canonical_name, split_at_tuner, without_layers

_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")


@rule("C17", "All tensors are finite", "error")
def finite(case: Case) -> Iterator[Finding]:
    """A tensor holds NaN or Inf: the training diverged. PEFT loads it silently, and an adapter with NaN can still give
    finite numbers for one input.

    Reproduce: set one element of a B to NaN, save, load.
    """
    for spec in case.adapter.layout:
        if spec.name in case.adapter.nonfinite:
            mend = "train again from the last finite checkpoint"
            yield Finding("C17", "error", spec.name, "the tensor holds NaN or Inf", "finite values", "NaN or Inf", mend)


@rule("C27", "The adapter does something", "warning")
def does_something(case: Case) -> Iterator[Finding]:
    """B starts as zeros, so an adapter that was saved before its first step, or whose training never reached it,
    serves the base model byte for byte. So does one with alpha 0. Nobody says so at load.

    Reproduce: `get_peft_model`, `save_pretrained` without a step between.
    """
    adapter = case.adapter
    factors: dict[str, list[str]] = {}
    for spec in adapter.layout:
        found = split_at_tuner(canonical_name(spec.name))
        if found is not None and found[1] in _FACTORS and not found[2].endswith("bias"):
            factors.setdefault(found[0], []).append(spec.name)
    flags = {flag for target in adapter.targets for flag in target.kind.split("+")[1:]}
    if not factors or flags & {"dora", "kasa"}:  # these do something without B as well
        return
    if any(spec.name.endswith("lora_B.bias") and spec.name not in adapter.zeros for spec in adapter.layout):
        return
    others = any(target.rank == 0 for target in adapter.targets)
    dead = [path for path, names in factors.items() if any(name in adapter.zeros for name in names)]
    mend = "push it after training"
    config = adapter.config
    if config is not None and all(_alpha_is_zero(config, path) for path in factors):
        message = "alpha is 0, so it adds nothing to any module"
        yield Finding("C27", "warning", "lora_alpha", message, "another number", "0", "write the alpha of the training")
    elif len(dead) == len(factors):
        what = "only its copies and biases count" if others else "it serves the base model"
        message = f"all {len(factors)} modules have a factor of zeros: {what}"
        yield Finding("C27", "warning", dead[0], message, "a B that is not zero", "zeros", mend)
    elif dead:
        message = f"{len(dead)} of {len(factors)} modules have a factor of zeros and do nothing"
        yield Finding("C27", "info", dead[0], message, "a B that is not zero", "zeros")


@rule("C32", "The behaviour probe gives the recorded outputs", "error where it does not; else info")
def probe_agrees(case: Case) -> Iterator[Finding]:
    """A push from a running model keeps a behaviour probe: a few seeded inputs, and what the model gave for them.
    Where form leaves a question open and a model with weights is at hand, `Registry.check` loads the adapter into a
    copy of it and runs the probe: equal outputs settle what was undecided, other outputs are an error.

    Reproduce: push a live model, edit `lora_alpha` in a pulled copy, and run the first one's probe on it.
    """
    if case.proof is None:
        return
    if case.proven:
        message = "it gives the recorded outputs, which settles what form cannot tell"
        yield Finding("C32", "info", "probe", message)
    else:
        message = "it gives other outputs than the recorded ones, so this is not the function that was pushed"
        mend = "look for another base, or another alpha"
        yield Finding("C32", "error", "probe", message, "the recorded outputs", case.proof[:300], mend)


def _alpha_is_zero(config: AdapterConfig, path: str) -> bool:
    return alpha_of(config, ".".join(without_layers(path.split(".")))) == 0
