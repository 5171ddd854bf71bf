"""Will it load, what does it need, what can follow it in a compiled slot: the rules of `registry.compat` on versions of
the registry and on models at hand. Of versions only the catalog is read; torch is imported for a live model alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from registry.catalog.versions import resolve
from registry.compat.case import PURPOSES, AdapterSide, Case, ModelSide, Purpose, Weights
from registry.compat.compatibility import Compatibility, in_order
from registry.compat.peft_versions import parse_peft
from registry.compat.rules import check_case
from registry.compat.rules_model import same_base
from registry.core.content_digest import PLAIN_INITS
from registry.core.errors import InvalidInput, NotFound
from registry.core.findings import Finding
from registry.core.peft_keys import KNOWN_PEFT
from registry.core.reference import parse_reference, shown
from registry.operations.context import Context
from registry.operations.sides import Sides

if TYPE_CHECKING:
    from torch import nn

    from registry.compat.hotswap import SwapGroup
    from registry.compat.serving import Needs


def check(
    context: Context,
    reference: str,
    model: str | nn.Module | None = None,
    *,
    peft: str | None = None,
    purpose: str = "load",
    prove: bool = True,
) -> Compatibility:
    """Holds an adapter against a base version or a model; see `Registry.check`."""
    asked = check_purpose(purpose)
    peft_version = peft_to_ask(peft)
    with context.reading() as connection:
        key = resolve(connection, parse_reference(reference))
        sides = Sides(context, connection)
        adapter = sides.adapter(key.id)
        side: ModelSide | None = None
        if isinstance(model, str):
            side = sides.model(resolve(connection, parse_reference(model)).id)
        elif model is None:
            base = sides.base(key.id)
            side = None if base is None else sides.model_or_none(base)
    if model is not None and not isinstance(model, str):
        side = live_side(model, adapter)
    case = Case(adapter, side, peft_version, asked)
    found = check_case(case)
    if side is None:
        message = "it was looked at by itself: no base was given, and none is recorded"
        mend = "give the base or model that it is to be loaded into"
        alone = Finding("C04", "undecided", "base", message, "a base", "none", mend)
        return replace(found, findings=in_order([*found.findings, alone]))
    if prove and found.verdict == "undecided" and adapter.has_probe and _can_run(model):
        return _proven(context, case, model, found)
    return found


def check_purpose(purpose: str) -> Purpose:
    """
    Raises:
        InvalidInput: it is none of `PURPOSES`.
    """
    found = next((one for one in PURPOSES if one == purpose), None)
    if found is None:
        raise InvalidInput(f"purpose '{shown(purpose)}'; expected one of {', '.join(PURPOSES)}")
    return found


def peft_to_ask(peft: str | None) -> str:
    """The PEFT version to ask about: the given one, else the installed one, else the newest that is known.

    Raises:
        InvalidInput: it is no version.
    """
    if peft is not None:
        parse_peft(peft)
        return peft
    return _installed_peft()


@cache
def _installed_peft() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("peft")
    except PackageNotFoundError:
        return KNOWN_PEFT


def live_side(model: Any, adapter: AdapterSide | None) -> ModelSide:
    """A model at hand as the model of a question.

    Args:
        adapter: the model's weights are read where it is known on which weights this one was trained.

    Raises:
        InvalidInput: no module, a merged model, or one that contains itself.
    """
    from torch import nn

    from registry.formats.live import find_adapted
    from registry.formats.live_form import live_form
    from registry.formats.tuner_layers import refuse_merged

    if not isinstance(model, nn.Module):
        raise InvalidInput(f"cannot check against a {type(model).__name__}: expected a reference or a torch module")
    form = live_form(model)
    refuse_merged(model)
    holder: Any = find_adapted(model)
    name = type(model).__name__
    side = ModelSide(
        reference=name,
        form=form,
        is_version=False,
        adapters=() if holder is None else tuple(map(str, holder.peft_config)),
    )
    if adapter is None:
        return side
    if adapter.weights is None:
        # There are weights, and nothing to hold them against: they need not be read.
        return replace(side, weights=Weights(name, {})) if _can_run(model) else side
    return replace(side, weights=_live_weights(model, adapter, name, wrapped=holder is not None))


def _live_weights(model: Any, adapter: AdapterSide, name: str, *, wrapped: bool) -> Weights | None:
    """The weights of a model; None where it has none that can be compared with those that the adapter was made for."""
    from registry.formats.live_weights import live_weights

    init = None if adapter.config is None else adapter.config.init_lora_weights
    if wrapped and init is not None and init not in PLAIN_INITS:
        return None  # PiSSA and the like changed them when the adapter was made
    found = live_weights(model, None)
    if not found.digests:
        return None
    digests = found.digests
    if wrapped:
        # PEFT adds its update to the weights of an attention in each forward pass, and takes it off again: rounded.
        touched = tuple(f"{one.module}." for one in adapter.targets if one.kind.startswith("attention"))
        digests = {one: digest for one, digest in digests.items() if not one.startswith(touched)}
    return replace(found, reference=name, digests=digests)


def live_base_findings(model: Any, adapter: AdapterSide, base: ModelSide) -> tuple[Finding, ...]:
    """What there is to say where the weights under a live adapter are not those of the base that is named for it."""
    weights = _live_weights(model, adapter, f"the live {type(model).__name__}", wrapped=True)
    if weights is None or base.weights is None:
        return ()
    case = Case(replace(adapter, weights=weights), base)
    return tuple(one for one in same_base.function(case) if one.severity in ("error", "warning"))


def _can_run(model: Any) -> bool:
    return hasattr(model, "parameters") and not any(one.is_meta for one in model.parameters())


def _proven(context: Context, case: Case, model: Any, found: Compatibility) -> Compatibility:
    """The answer once a copy of the model has run the adapter's behaviour probe; the copy takes as much memory."""
    from copy import deepcopy

    from registry.core.errors import Incompatible
    from registry.operations.load import load
    from registry.operations.proving import prove

    try:
        loaded = load(context, case.adapter.reference, deepcopy(model), check=False)
        proof = prove(context, case.adapter.reference, loaded)
    except (Incompatible, InvalidInput, NotFound) as error:
        why = shown(str(error).splitlines()[0], 300)
        not_run = Finding("C32", "undecided", "probe", f"it could not be run, so nothing is settled: {why}")
        return replace(found, findings=in_order([*found.findings, not_run]))
    return check_case(replace(case, proof=str(proof), proven=bool(proof)))


def needs(context: Context, reference: str) -> Needs:
    """What a server must allow for an adapter; see `Registry.needs`."""
    from registry.compat.serving import needs as needs_of

    with context.reading() as connection:
        key = resolve(connection, parse_reference(reference))
        return needs_of(Sides(context, connection).adapter(key.id))


def swap_groups(context: Context, references: Sequence[str]) -> tuple[SwapGroup, ...]:
    """Adapters that can follow each other in one compiled slot; see `Registry.swap_groups`."""
    from registry.compat.hotswap import swap_groups as groups_of

    with context.reading() as connection:
        ids = dict.fromkeys(resolve(connection, parse_reference(one)).id for one in references)
        sides = Sides(context, connection)
        return groups_of([sides.adapter(one) for one in ids])
